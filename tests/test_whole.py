"""Which parameters full fine-tuning trains, and in what dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskft.errors import ModelError, UserError
from maskft.targets import resolve_targets
from maskft.tuner import Peer, Targets
from maskft.whole import train_whole, whole_parameters
from tests.tuner.models import tiny_llama, tiny_llava


def parameters(model: Any, *pieces: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if any(piece in name for piece in pieces)]


class TestChosen:
    def test_parts_are_whole_and_disjoint(self) -> None:
        model = tiny_llava()
        parts = {part: whole_parameters(model, scope=[part]) for part in ("vision", "projector", "language")}
        assert parts["vision"] == parameters(model, "vision_tower")
        assert parts["projector"] == parameters(model, "multi_modal_projector")
        assert parts["language"] == parameters(model, "language_model", "lm_head")
        assert sum(map(len, parts.values())) == len(list(model.parameters()))

    def test_a_language_model_by_itself(self) -> None:
        model = tiny_llama()
        assert whole_parameters(model, scope=["language"]) == parameters(model, "")
        assert whole_parameters(model) == parameters(model, "")

    @pytest.mark.parametrize("modules", ["attn", "mlp", "both"])
    def test_weights_that_masks_would_lie_on(self, modules: str) -> None:
        model = tiny_llava()
        found = whole_parameters(model, modules=modules, layers="1")
        assert set(found) == {f"{name}.weight" for name in resolve_targets(model, modules=modules, layers="1")}

    def test_names_as_peft_matches_them(self) -> None:
        model = tiny_llava()
        assert whole_parameters(model, target_modules=["linear_1"]) == parameters(model, "linear_1")
        assert whole_parameters(model, target_modules=r".*\.layers\.0\.mlp") == parameters(model, "layers.0.mlp")
        linear = whole_parameters(model, target_modules="all-linear")
        assert "lm_head.weight" not in linear
        assert set(parameters(model, "q_proj", "linear_")) < set(linear)
        assert not [name for name in linear if "embed" in name or "norm" in name]

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"scope": ["speech"]}, "each part must be one of language, projector, vision"),
            ({"scope": []}, "and one is needed"),
            ({"scope": ["language", "vision"]}, "LlamaForCausalLM has no part vision by a known name"),
            ({"target_modules": "nothing"}, "target_modules 'nothing' match no module"),
            ({"target_modules": ["act_fn"]}, "match no module with parameters"),
        ],
    )
    def test_refused(self, choice: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            whole_parameters(tiny_llama(), **choice)


def test_the_rest_is_frozen_and_keeps_its_dtype() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    train_whole(model, ["lm_head.weight"])
    assert {(p.dtype, p.requires_grad) for n, p in model.named_parameters() if n == "lm_head.weight"} == {
        (torch.float32, True)
    }
    rest = {(p.dtype, p.requires_grad) for n, p in model.named_parameters() if n != "lm_head.weight"}
    assert rest == {(torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vera", "targets": Targets()}, "kind is 'vera'; allowed: lora, unilora, hira"),
        ({"kind": "lora", "targets": Targets(), "variant": "x"}, "variant is 'x'; allowed: lora, rslora, dora"),
    ],
)
def test_settings_of_peers_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Peer(rank=4, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": ("speech",)}, r"scope has \['speech'\]; allowed: language"),
        ({"modules": "heads"}, "modules is 'heads'; allowed: attn"),
    ],
)
def test_targets_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Targets(**settings)
