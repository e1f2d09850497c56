"""Targets found in the structures of real architectures, built tiny on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from maskft.errors import ModelError
from maskft.targets import SCOPES, resolve_targets

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TYPED = {**TEXT, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"}
QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llava-clip": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT))
    ),
    "llava-dinov2": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=t.Dinov2Config(**DINO), text_config=t.LlamaConfig(**TEXT))
    ),
    "llava-siglip": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=t.SiglipVisionConfig(**VISION), text_config=t.Qwen2Config(**TEXT))
    ),
    "llava-next": lambda: t.LlavaNextForConditionalGeneration(
        t.LlavaNextConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT))
    ),
    "llava-onevision": lambda: t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(vision_config=t.SiglipVisionConfig(**VISION), text_config=t.Qwen2Config(**TEXT))
    ),
    "qwen2-vl": lambda: t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config=TEXT, vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
        )
    ),
    "qwen2.5-vl": lambda: t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(text_config=TEXT, vision_config=QWEN_VISION)
    ),
    "qwen3-vl": lambda: t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(text_config=TYPED, vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1]})
    ),
    "smolvlm": lambda: t.SmolVLMForConditionalGeneration(
        t.SmolVLMConfig(text_config={"model_type": "llama", **TEXT}, vision_config=VISION)
    ),
    "idefics3": lambda: t.Idefics3ForConditionalGeneration(
        t.Idefics3Config(text_config={"model_type": "llama", **TEXT}, vision_config=VISION)
    ),
    "paligemma": lambda: t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            text_config={"model_type": "gemma", **TYPED},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            projection_dim=32,
        )
    ),
    "gemma3": lambda: t.Gemma3ForConditionalGeneration(t.Gemma3Config(text_config=TYPED, vision_config=VISION)),
    "internvl": lambda: t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        )
    ),
    "mistral3": lambda: t.Mistral3ForConditionalGeneration(
        t.Mistral3Config(
            text_config={"model_type": "mistral", **TYPED}, vision_config={"model_type": "pixtral", **VISION}
        )
    ),
    "vip-llava": lambda: t.VipLlavaForConditionalGeneration(
        t.VipLlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**TEXT))
    ),
    "blip2": lambda: t.Blip2ForConditionalGeneration(
        t.Blip2Config(
            vision_config=VISION,
            qformer_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64},
            text_config={"model_type": "llama", **TEXT},
        )
    ),
}
NO_LINEAR_PROJECTOR = {"gemma3"}  # its projector is one bare parameter
ATTENTION_PER_VISION_LAYER = {"qwen2-vl": 2, "qwen2.5-vl": 2, "qwen3-vl": 2, "blip2": 2}  # fused qkv, and the output
MLP_PER_VISION_LAYER = {"qwen2.5-vl": 3, "mistral3": 3}


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return ARCHITECTURES[name]()


def llama(**overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, **overrides}))


@pytest.fixture(scope="module")
def llava() -> nn.Module:
    return build("llava-clip")


def layers_of(names: list[str]) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_of_vision_language_models(name: str) -> None:
    model = build(name)
    linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    scopes = [scope for scope in SCOPES if not (scope == "projector" and name in NO_LINEAR_PROJECTOR)]
    parts = {scope: resolve_targets(model, scope=[scope]) for scope in scopes}

    everything = [target for targets in parts.values() for target in targets]
    assert all(parts.values())
    assert len(everything) == len(set(everything))
    assert set(everything) <= linears
    for target in everything:
        assert not any(word in target for word in ("lm_head", "embed", "qformer", "vision_tower.head"))
    assert len(parts["language"]) == 6 * 7  # q, k, v, o, gate, up, down in each layer
    mixed = [s for s in SCOPES if s in scopes]
    assert sorted(resolve_targets(model, scope=mixed)) == sorted(everything)

    for scope, per_layer in {
        "language": (4, 3),
        "vision": (ATTENTION_PER_VISION_LAYER.get(name, 4), MLP_PER_VISION_LAYER.get(name, 2)),
    }.items():
        depth = {"language": 6, "vision": 3}[scope]
        for modules, count in zip(("attn", "mlp"), per_layer, strict=True):
            assert len(resolve_targets(model, scope=[scope], modules=modules)) == depth * count, (scope, modules)


def test_language_model_alone() -> None:
    model = llama()
    targets = resolve_targets(model)
    assert targets[:7] == [
        *(f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"),
        *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
    ]
    assert len(targets) == 42
    assert resolve_targets(model, scope=["language"]) == targets


@pytest.mark.parametrize(
    ("build_text", "attention", "feed_forward"),
    [
        (
            lambda: t.OPTForCausalLM(
                t.OPTConfig(hidden_size=24, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2)
            ),
            8,
            4,
        ),
        (
            lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)),
            4,
            4,
        ),
        (lambda: t.Phi3ForCausalLM(t.Phi3Config(**{**TEXT, "num_hidden_layers": 2})), 4, 4),
        (
            lambda: t.BertModel(
                t.BertConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
            ),
            8,
            4,
        ),
    ],
    ids=["opt", "gpt-neox", "phi3", "bert"],
)
def test_other_language_models(build_text: Callable[[], nn.Module], attention: int, feed_forward: int) -> None:
    with torch.device("meta"):
        model = build_text()
    assert len(resolve_targets(model, modules="attn")) == attention
    assert len(resolve_targets(model, modules="mlp")) == feed_forward
    assert len(resolve_targets(model)) == attention + feed_forward


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("all", {0, 1, 2, 3, 4, 5}),
            ("first-third", {0, 1}),
            ("middle-third", {2, 3}),
            ("last-third", {4, 5}),
            ("0", {0}),
            ("0-1,3", {0, 1, 3}),
            (" 0 - 1, 5 ", {0, 1, 5}),
            ("2-2", {2}),
            ([0, 4], {0, 4}),
            ((5,), {5}),
            (range(2, 4), {2, 3}),
        ],
        ids=str,
    )
    def test_forms(self, layers: Any, expected: set[int]) -> None:
        targets = resolve_targets(llama(), layers=layers)
        assert layers_of(targets) == expected
        assert len(targets) == 7 * len(expected)

    @pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 7])
    def test_thirds_part_the_layers(self, depth: int) -> None:
        model = llama(num_hidden_layers=depth)
        seen: list[int] = []
        for third in ("first-third", "middle-third", "last-third"):
            try:
                seen += sorted(layers_of(resolve_targets(model, layers=third)))
            except ModelError:
                assert depth < 3  # an empty third
        assert seen == list(range(depth))

    def test_are_counted_in_each_part(self, llava: nn.Module) -> None:
        targets = resolve_targets(llava, scope=["language", "vision"], layers="last-third")
        assert layers_of([name for name in targets if "language_model" in name]) == {4, 5}
        assert layers_of([name for name in targets if "vision_tower" in name]) == {2}

    def test_do_not_apply_to_the_projector(self, llava: nn.Module) -> None:
        targets = resolve_targets(llava, layers="0", modules="attn")
        assert [name for name in targets if "projector" in name] == [
            "model.multi_modal_projector.linear_1",
            "model.multi_modal_projector.linear_2",
        ]
        assert len(targets) == 4 + 2

    @pytest.mark.parametrize("layers", ["first", "1-", "-1", "1;2", "", "0,,1", "3-1", "a-b"])
    def test_malformed(self, layers: str) -> None:
        with pytest.raises(ModelError, match=r"layers is '.*'; it must be 'all', 'first-third'"):
            resolve_targets(llama(), layers=layers)

    @pytest.mark.parametrize("layers", ["6", "0-6", [6], [-1, 0]], ids=str)
    def test_out_of_range(self, layers: Any) -> None:
        with pytest.raises(ModelError, match=r"layers names \[(6|-1)\], but the language part has layers 0 to 5"):
            resolve_targets(llama(), layers=layers)

    def test_out_of_range_names_the_part(self, llava: nn.Module) -> None:
        with pytest.raises(ModelError, match=r"names \[3, 4\], but the vision part has layers 0 to 2"):
            resolve_targets(llava, scope=["language", "vision"], layers="0-4")


class TestErrors:
    def test_unknown_scope(self) -> None:
        with pytest.raises(ModelError, match=r"scope is \['speech'\].*language, projector, vision"):
            resolve_targets(llama(), scope=["speech"])

    def test_empty_scope(self) -> None:
        with pytest.raises(ModelError, match="one is needed"):
            resolve_targets(llama(), scope=[])

    def test_unknown_modules(self) -> None:
        with pytest.raises(ModelError, match="modules is 'attention'; it must be one of attn, mlp, both"):
            resolve_targets(llama(), modules="attention")

    @pytest.mark.parametrize("scope", [["vision"], ["projector"], ["projector", "vision"]])
    def test_nothing_matched(self, scope: list[str]) -> None:
        with pytest.raises(ModelError, match=r"match no linear layer of LlamaForCausalLM.*language \(42\)"):
            resolve_targets(llama(), scope=scope)

    def test_no_layers_chosen(self) -> None:
        with pytest.raises(ModelError, match="nothing to mask"):
            resolve_targets(llama(), layers=[])

    def test_model_without_linear_layers(self) -> None:
        with pytest.raises(ModelError, match="match no linear layer of Sequential"):
            resolve_targets(nn.Sequential(nn.ReLU()))


def test_children_of_multihead_attention_are_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2)
            self.fc1 = nn.Linear(8, 8)
            self.out_proj = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.lm_head = nn.Linear(8, 8)

    model = Model()
    assert isinstance(model.get_submodule("layers.0.self_attn.out_proj"), nn.Linear)
    assert resolve_targets(model) == ["layers.0.fc1", "layers.0.out_proj", "layers.1.fc1", "layers.1.out_proj"]
