"""Each scope finds exactly the weights it should in every family, and each of them learns."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from maskft import MaskConfig
from maskft.targets import SCOPES, find_weights, resolve_parameters, resolve_targets
from tests.targets.forms import Family, Stack
from tests.targets.seeing import SEEING
from tests.targets.zoo import FAMILIES, inputs, random_model

PAGE = Path(__file__).parents[2] / "docs" / "scopes.md"
EACH = pytest.mark.parametrize("name", FAMILIES)


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[name].build()


def scopes_of(family: Family) -> list[str]:
    return [part for part in SCOPES if family.names(part)]


@EACH
def test_scopes_find_exactly_these(name: str) -> None:
    family, model = FAMILIES[name], meta_model(name)
    for part in scopes_of(family):
        for kind in ("attn", "mlp", "both"):
            layers = resolve_targets(model, scope=[part], modules=kind)
            parameters = resolve_parameters(model, scope=[part], modules=kind)
            assert Counter(layers + parameters) == Counter(family.names(part, kind)), (part, kind)
            for layer in layers:
                assert isinstance(model.get_submodule(layer), nn.Linear | Conv1D), layer
            for parameter in parameters:
                dimensions = model.get_parameter(parameter).dim()
                assert dimensions == (2 if part == "projector" else 3), parameter


@EACH
def test_scopes_add_up(name: str) -> None:
    family, model = FAMILIES[name], meta_model(name)
    scope = scopes_of(family)
    everything = [name for part in scope for name in family.names(part)]
    found = resolve_targets(model, scope=scope) + resolve_parameters(model, scope=scope)
    assert sorted(found) == sorted(everything)
    order = [module for module, _ in model.named_modules()]
    targets = resolve_targets(model, scope=scope)
    assert targets == sorted(targets, key=order.index)


@EACH
def test_nothing_else_is_hit(name: str) -> None:
    model = meta_model(name)
    family = FAMILIES[name]
    found = resolve_targets(model, scope=scopes_of(family)) + resolve_parameters(model, scope=scopes_of(family))
    forbidden = r"lm_head|embed|wte|wpe|shared\.|norm|router|mlp\.gate$|expert_gate|gate_attn|predictions|\.head\."
    hit = [target for target in found if re.search(forbidden, target)]
    assert hit == []
    tied = [id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]
    weights = [model.get_parameter(f"{layer}.weight") for layer in resolve_targets(model, scope=scopes_of(family))]
    assert not {id(weight) for weight in weights} & set(tied)


@EACH
def test_every_mask_learns(name: str) -> None:
    family, model = FAMILIES[name], random_model(name)
    batch = inputs(name, model)
    scope = scopes_of(family)
    masked = get_peft_model(model, MaskConfig(scope=scope))
    masked(**batch).loss.backward()

    scores = {n: p for n, p in masked.named_parameters() if p.requires_grad}
    assert len(scores) == sum(len(family.names(part)) for part in scope)
    assert [n for n, p in scores.items() if p.grad is None or not p.grad.any()] == []


def test_layers_above_the_features_would_not_learn() -> None:
    model = random_model("LLaVA (CLIP + Llama)")
    batch = inputs("LLaVA (CLIP + Llama)", model)
    assert model.config.vision_feature_layer == -2
    left_out = ["vision_tower.encoder.layers.2.mlp.fc1", "vision_tower.encoder.layers.1.mlp.fc1"]
    masked = get_peft_model(model, MaskConfig(target_modules=left_out))
    masked(**batch).loss.backward()
    gradients = [p.grad for p in masked.parameters() if p.requires_grad]
    assert [gradient is not None for gradient in gradients] == [True, False]


def test_what_belongs_to_no_part() -> None:
    others = {weight.name.split(".")[0] for weight in find_weights(meta_model("BLIP-2")) if weight.part == "other"}
    assert others == {"qformer"}
    heads = [w for w in find_weights(meta_model("LLaVA (SigLIP + Qwen2)")) if w.part == "vision" and w.layer is None]
    assert {re.sub(r"\.layers\.\d+\..*", ".layers", w.name) for w in heads} == {
        "model.vision_tower.encoder.layers",  # above the features
        "model.vision_tower.head.mlp.fc1",
        "model.vision_tower.head.mlp.fc2",
    }


def test_gemma_3_projector_alone() -> None:
    """With no linear layer at all to mask."""
    model = random_model("Gemma-3")
    batch = inputs("Gemma-3", model)
    masked = get_peft_model(model, MaskConfig(scope=["projector"]))
    masked(**batch).loss.backward()
    (scores,) = [p for p in masked.parameters() if p.requires_grad]
    assert scores.grad is not None
    assert scores.grad.any()


@pytest.mark.parametrize("name", SEEING)
def test_families_that_see_are_fed_an_image(name: str) -> None:
    model = random_model(name)
    assert "pixel_values" in inputs(name, model)


# -- the page ---------------------------------------------------------------------------------------------------------


def cell(names: list[str]) -> str:
    return "<br>".join(f"`{name}`" for name in names) or "none"


def stack_rows(part: str) -> list[str]:
    """Table rows: families that share names share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, family in FAMILIES.items():
        stacks: tuple[Stack, ...] = getattr(family, part)
        columns = [
            list(dict.fromkeys(stack.prefix for stack in stacks)),
            list(dict.fromkeys(piece for stack in stacks for piece in stack.attn.split())),
            list(dict.fromkeys(piece for stack in stacks for piece in stack.mlp.split())),
        ]
        if stacks:
            rows.setdefault(tuple(cell(column) for column in columns), []).append(name)  # type: ignore[arg-type]
    return [f"| {', '.join(names)} | {' | '.join(columns)} |" for columns, names in rows.items()]


def projector_rows() -> list[str]:
    rows: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        if family.projector:
            rows.setdefault(cell(family.projector.split()), []).append(name)
    return [f"| {', '.join(names)} | {names_in_model} |" for names_in_model, names in rows.items()]


@pytest.mark.parametrize("part", SCOPES)
def test_the_page_shows_what_is_found(part: str) -> None:
    rows = projector_rows() if part == "projector" else stack_rows(part)
    section = PAGE.read_text(encoding="utf-8").split(f"## Scope `{part}`")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert shown == rows, "docs/scopes.md should show:\n" + "\n".join(rows)
