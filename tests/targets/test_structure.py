"""Structures that names alone would mislead about: other parts, unknown models, wrapped layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn

from maskft import MaskConfig
from maskft.errors import ModelError
from maskft.targets import find_weights, projector_names, resolve_parameters, resolve_targets
from maskft.whole import find_projector
from tests.targets.forms import TEXT, VISION, tokens
from tests.targets.zoo import FAMILIES, random_model

AUDIO = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8}
WHISPER = {**AUDIO, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 128}


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


def heads(names: list[str]) -> set[str]:
    """First pieces of names, up to the number of the layer."""
    return {name.split(".layers.")[0].split(".layer.")[0].split(".h.")[0] for name in names}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2)
        self.fc1 = nn.Linear(8, 8)
        self.extra = nn.Linear(8, 8)


class Tower(nn.Module):
    """Layers without anything that Transformers would know."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))


class TestOtherParts:
    def test_audio_encoder(self) -> None:
        model = on_meta(
            lambda: t.Qwen2AudioForConditionalGeneration(
                t.Qwen2AudioConfig(text_config={"model_type": "qwen2", **TEXT}, audio_config=AUDIO)
            )
        )
        assert heads(resolve_targets(model)) == {"model.language_model", "model.multi_modal_projector.linear"}
        parts = {weight.part for weight in find_weights(model) if "audio_tower" in weight.name}
        assert parts == {"other"}
        with pytest.raises(ModelError, match=r"part vision.*model\.audio_tower \(12\)"):
            resolve_targets(model, scope=["vision"])

    def test_encoder_that_no_name_tells(self) -> None:
        model = on_meta(lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER, **tokens())))
        assert heads(resolve_targets(model)) == {"model.decoder"}
        assert len(resolve_targets(model)) == 2 * 10

    def test_two_towers(self) -> None:
        model = on_meta(
            lambda: t.CLIPModel(
                t.CLIPConfig(
                    text_config={**{k: v for k, v in TEXT.items() if "key_value" not in k}, "projection_dim": 16},
                    vision_config={**VISION, "projection_dim": 16},
                    projection_dim=16,
                )
            )
        )
        assert heads(resolve_targets(model, scope=["language"])) == {"text_model.encoder"}
        assert heads(resolve_targets(model, scope=["vision"])) == {"vision_model.encoder"}

    @pytest.mark.parametrize("tied", [True, False])
    def test_encoder_and_decoder(self, tied: bool) -> None:
        config = t.BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            vocab_size=128,
            tie_word_embeddings=tied,
        )
        model = on_meta(lambda: t.BartForConditionalGeneration(config))
        assert heads(resolve_targets(model)) == {"model.encoder", "model.decoder"}
        assert len(resolve_targets(model)) == 2 * 6 + 2 * 10

    def test_projector_within_the_vision_encoder(self) -> None:
        model = FAMILIES["Qwen3-VL"].build()
        assert projector_names(model) == ["model.visual.merger", "model.visual.deepstack_merger_list"]
        assert not any("merger" in name for name in resolve_targets(model, scope=["vision"]))


class TestUnknownStructure:
    @pytest.mark.parametrize("name", ["CLIPVisionModel", "WhisperEncoder"])
    def test_encoder_alone(self, name: str) -> None:
        builders: dict[str, Any] = {
            "CLIPVisionModel": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
            "WhisperEncoder": lambda: t.WhisperModel(t.WhisperConfig(**WHISPER, **tokens())).encoder,
        }
        with pytest.raises(ModelError, match=rf"{name} in the part language.*by place: (encoder\.)?layers \(\d+\)"):
            resolve_targets(on_meta(builders[name]))

    def test_neither_attention_nor_feed_forward(self) -> None:
        model = on_meta(lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64)))
        with pytest.raises(ModelError, match=r"part language.*backbone\.layers \(8\).*target_modules"):
            resolve_targets(model)

    def test_one_stack_is_the_language_model(self) -> None:
        assert resolve_targets(Tower()) == ["layers.0.fc1", "layers.1.fc1"]

    def test_two_stacks_are_not_told_apart(self) -> None:
        model = nn.ModuleDict({"first": Tower(), "second": Tower(3)})
        with pytest.raises(ModelError, match=r"in the part language.*first\.layers \(4\), second\.layers \(6\)"):
            resolve_targets(model)

    def test_names_tell_where_there_is_no_embedding(self) -> None:
        model = nn.ModuleDict({"vision_tower": Tower(), "mlp1": nn.Linear(8, 8), "language_model": Tower()})
        model["sound"] = Tower()
        assert resolve_targets(model) == ["mlp1", "language_model.layers.0.fc1", "language_model.layers.1.fc1"]

    def test_an_audio_tower_is_no_language_model(self) -> None:
        model = nn.ModuleDict({"audio_tower": Tower(), "decoder": Tower()})
        assert resolve_targets(model) == ["decoder.layers.0.fc1", "decoder.layers.1.fc1"]


@pytest.mark.parametrize(
    ("own", "kind"),
    [("q_proj", "attn"), ("o_proj", "attn"), ("up_proj", "mlp"), ("w2", "mlp"), ("in_proj", None), ("out_proj", None)],
)
def test_kind_by_its_own_name_where_nothing_around_tells(own: str, kind: str | None) -> None:
    """As in Nemotron-H, where a layer's mixer may be attention, feed-forward or a state-space block."""
    layer = nn.ModuleDict({"mixer": nn.ModuleDict({own: nn.Linear(4, 4)}), "fc1": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    assert {w.name: w.kind for w in find_weights(model)} == {f"layers.0.mixer.{own}": kind, "layers.0.fc1": "mlp"}


def test_children_of_multihead_attention_are_left_out() -> None:
    model = Tower()
    assert isinstance(model.get_submodule("layers.0.self_attn.out_proj"), nn.Linear)
    assert not any("self_attn" in weight.name for weight in find_weights(model))


@pytest.mark.parametrize("name", ["LLaVA (CLIP + Llama)", "GPT-2", "Qwen2-MoE", "Gemma-3"])
class TestWrappedModels:
    def test_masked_layers_go_by_their_own_names(self, name: str) -> None:
        scope = ["language", "projector"] if FAMILIES[name].projector else ["language"]
        model = random_model(name)
        before = resolve_targets(model, scope=scope), resolve_parameters(model, scope=scope)
        get_peft_model(model, MaskConfig(scope=scope))
        assert (resolve_targets(model, scope=scope), resolve_parameters(model, scope=scope)) == before

    def test_wrapper_of_the_whole(self, name: str) -> None:
        model = random_model(name)
        before = find_weights(model)
        masked = get_peft_model(model, MaskConfig(scope=["language"]))
        after = find_weights(masked)
        assert [w.name.removeprefix("base_model.model.") for w in after] == [w.name for w in before]
        assert [(w.part, w.kind, w.layer) for w in after] == [(w.part, w.kind, w.layer) for w in before]

    def test_matrices_of_other_adapters_are_not_seen(self, name: str) -> None:
        model = random_model(name)
        before = resolve_targets(model, scope=["language"])
        get_peft_model(model, LoraConfig(target_modules=".*(q_proj|c_attn)", fan_in_fan_out=name == "GPT-2"))
        assert resolve_targets(model, scope=["language"]) == before


def test_modules_that_are_trained_whole_are_not_masked() -> None:
    model = random_model("LLaVA (CLIP + Llama)")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]))
    with pytest.raises(ModelError, match="in the part projector"):
        resolve_targets(model)
    assert len(resolve_targets(model, scope=["language"])) == 21


class TestFindProjector:
    def test_one_module(self) -> None:
        model: Any = FAMILIES["LLaVA (CLIP + Llama)"].build()
        assert find_projector(model) is model.model.multi_modal_projector

    def test_a_bare_layer(self) -> None:
        model: Any = FAMILIES["Mllama"].build()
        assert find_projector(model) is model.model.multi_modal_projector

    def test_several_modules(self) -> None:
        model: Any = FAMILIES["Llama-4"].build()
        projector = find_projector(model)
        assert set(projector) == {"vision_model/vision_adapter", "multi_modal_projector"}
        state = {name: torch.ones_like(tensor) for name, tensor in projector.state_dict().items()}
        projector.load_state_dict(state)
        assert bool((model.vision_model.vision_adapter.mlp.fc1.weight == 1).all())
        assert bool((model.multi_modal_projector.linear_1.weight == 1).all())

    def test_none(self) -> None:
        with pytest.raises(ModelError, match=r"LlamaForCausalLM has no projector.*model, lm_head"):
            find_projector(FAMILIES["Llama"].build())
