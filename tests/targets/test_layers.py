"""Ranges of layers, and what a wrong choice is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from maskft.errors import ModelError
from maskft.targets import find_weights, layer_index, resolve_parameters, resolve_targets
from tests.targets.forms import TEXT
from tests.targets.zoo import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "scopes.md"


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[name].build()


def llama(depth: int = 6) -> nn.Module:
    with torch.device("meta"):
        return t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, "num_hidden_layers": depth}))


@pytest.fixture(scope="module")
def llava() -> nn.Module:
    return meta_model("LLaVA (CLIP + Llama)")


def layers_of(names: list[str]) -> set[int]:
    return {int(name.split("layers.")[1].split(".")[0]) for name in names}


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
        model = llama(depth)
        seen: list[int] = []
        for third in ("first-third", "middle-third", "last-third"):
            try:
                seen += sorted(layers_of(resolve_targets(model, layers=third)))
            except ModelError:
                assert depth < 3  # an empty third
        assert seen == list(range(depth))

    def test_are_counted_in_each_part(self, llava: nn.Module) -> None:
        targets = resolve_targets(llava, scope=["language", "vision"], layers="last-third")
        assert layers_of([name for name in targets if "language_model" in name]) == {2}
        assert layers_of([name for name in targets if "vision_tower" in name]) == {1}  # of two: the third is not seen

    @pytest.mark.parametrize(
        ("layers", "first", "second"),
        [("all", {0, 1, 2}, {0, 1}), ("0-3", {0, 1, 2}, {0}), ("4", set(), {1}), ("first-third", {0, 1}, set())],
    )
    def test_are_counted_on_in_a_second_stack(self, layers: str, first: set[int], second: set[int]) -> None:
        targets = resolve_targets(meta_model("Mllama"), scope=["vision"], layers=layers)
        assert layers_of([name for name in targets if ".transformer." in name]) == first
        assert layers_of([name for name in targets if ".global_transformer." in name]) == second

    def test_of_a_decoder_follow_those_of_its_encoder(self) -> None:
        targets = resolve_targets(meta_model("T5"), layers="3-5")
        assert {name.split(".")[0] for name in targets} == {"decoder"}
        assert len(targets) == 3 * 10

    def test_of_experts(self) -> None:
        model = meta_model("DeepSeek-V3")
        assert resolve_parameters(model, layers="0") == []
        assert resolve_parameters(model, layers="2") == [
            "model.layers.2.mlp.experts.gate_up_proj",
            "model.layers.2.mlp.experts.down_proj",
        ]
        assert resolve_parameters(model, modules="attn") == []

    def test_without_weights_to_mask_count_too(self) -> None:
        with torch.device("meta"):
            config = t.JambaConfig(**TEXT, num_experts=1, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=4)
            model = t.JambaForCausalLM(config)
        assert layers_of(resolve_targets(model, modules="attn", layers="middle-third")) == {1}
        assert layers_of(resolve_targets(model, modules="mlp", layers="last-third")) == {2}

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
        with pytest.raises(ModelError, match=r"names \[2\], but the vision part has layers 0 to 1"):
            resolve_targets(llava, scope=["language", "vision"], layers="0-2")

    @pytest.mark.parametrize(
        ("name", "index"),
        [
            ("base_model.model.model.layers.7.mlp.up_proj", 7),
            ("model.layers.7.mlp.experts.3.up_proj", 7),
            ("model.layers.7.", 7),
            ("model.layers.7", None),
            ("model.multi_modal_projector.linear_1", None),
        ],
    )
    def test_index_in_a_name(self, name: str, index: int | None) -> None:
        assert layer_index(name) == index


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

    @pytest.mark.parametrize("resolve", [resolve_targets, resolve_parameters])
    @pytest.mark.parametrize(
        ("scope", "named"),
        [
            (["vision"], "in the part vision"),
            (["language", "vision"], "in the part vision"),
            (["projector"], "in the part projector"),
            (["projector", "vision"], "in the part projector and the part vision"),
        ],
    )
    def test_parts_that_are_missing(self, resolve: Any, scope: list[str], named: str) -> None:
        with pytest.raises(ModelError, match=rf"match no linear layer of LlamaForCausalLM {named}\. .*language \(42\)"):
            resolve(llama(), scope=scope)

    def test_no_layers_chosen(self) -> None:
        with pytest.raises(ModelError, match=r"layers \[\] match no linear layer of LlamaForCausalLM\. "):
            resolve_targets(llama(), layers=[])

    def test_model_without_linear_layers(self) -> None:
        with pytest.raises(ModelError, match=r"match no linear layer of Sequential in the part language.*place: none"):
            resolve_targets(nn.Sequential(nn.ReLU()))

    def test_a_model_that_sees_needs_a_known_projector(self) -> None:
        with torch.device("meta"):
            model = meta_model("LLaVA (CLIP + Llama)")
            model.model.gateway = model.model.multi_modal_projector
            del model.model.multi_modal_projector
        with pytest.raises(ModelError, match=r"in the part projector.*model\.gateway \(2\).*target_modules"):
            resolve_targets(model)
        assert len(resolve_targets(model, scope=["language"])) == 21

    def test_message_on_the_page(self) -> None:
        with torch.device("meta"):
            model = t.WhisperForConditionalGeneration(t.WhisperConfig())
        with pytest.raises(ModelError) as caught:
            resolve_targets(model, scope=["language", "vision"])
        assert str(caught.value) in " ".join(PAGE.read_text(encoding="utf-8").split())


def test_weights_in_pieces_are_found() -> None:
    """DeepSpeed's ZeRO-3 leaves empty parameters, with the whole one's shape beside."""
    model = FAMILIES["Mixtral"].build()
    whole = find_weights(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert find_weights(model) == whole
