"""The paper's recipes are what their table writes, and each can be looked at without weights, data or a network."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from maskft.preview import preview
from maskft.recipe import load_recipe
from maskft.targets import find_weights
from maskft.vlm.load import load_skeleton

ROOT = Path(__file__).parents[2]
RECIPES = Path("recipes") / "paper"
PAPER = ROOT / RECIPES
CONFIGS = ROOT / "recipes" / "configs"


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", PAPER / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


generate = _generator()
BACKBONES, METHODS = list(generate.BACKBONES), list(generate.METHODS)
PLANS = json.loads((PAPER / "plans.json").read_text())
SHARES = {  # of the language model's parameters, as the paper reports them: attention, feed-forward
    "qwen2.5-0.5b": (8.9, 63.5),
    "tinyllama-1.1b": (18.9, 69.2),
    "gemma-2b": (6.8, 72.3),
    "phi-2": (30.2, 60.4),
}


def test_the_files_are_what_the_table_writes(tmp_path: Path) -> None:
    page = tmp_path / "paper.md"
    page.write_text((ROOT / "docs" / "paper.md").read_text())
    generate.write(tmp_path, page)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.yaml")}
    assert len(written) == 36
    assert written == {path.name: path.read_text() for path in PAPER.glob("*.yaml")}
    assert page.read_text() == (ROOT / "docs" / "paper.md").read_text()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_configs_have_the_shares_that_the_paper_reports(backbone: str) -> None:
    model = load_skeleton(str(CONFIGS / f"tinyllava-{backbone}"), dtype="bfloat16")
    named = dict(model.named_parameters())
    language = sum(p.numel() for name, p in named.items() if "language_model" in name or name == "lm_head.weight")
    kinds = {"attn": 0, "mlp": 0}
    for weight in find_weights(model):
        if weight.part == "language" and weight.kind is not None:
            kinds[weight.kind] += model.get_submodule(weight.name).weight.numel()
    found = tuple(round(100 * kinds[kind] / language, 1) for kind in ("attn", "mlp"))
    assert found == SHARES[backbone]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_dry_run(backbone: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has nothing but the recipe and its base's config."""
    monkeypatch.chdir(tmp_path)
    name = f"{backbone}-{method}"
    recipe = load_recipe(PAPER / f"{name}.yaml", [f"model.base={CONFIGS / f'tinyllava-{backbone}'}"])
    seen = preview(recipe, tmp_path / "run")
    plan = PLANS["recipes"][name]
    assert seen["trainable_parameters"] == plan["trainable_parameters"]
    assert seen["base_parameters"] == plan["base_parameters"]
    assert seen["rows_per_step"] == (32 if method == "stage1" else 16)
    assert len(seen["missing"]) == 4  # rows, images, processor, weights
    assert list(tmp_path.iterdir()) == []


def test_soft_masks_take_the_published_rate() -> None:
    for name in generate.names():
        recipe = load_recipe(PAPER / f"{name}.yaml")
        if recipe.method.name == "mask":
            assert recipe.training["learning_rate"] == 0.1
        if getattr(recipe.method, "gate", None) == "soft":
            assert recipe.method.config().learning_rate(0.002) == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_plans_are_up_to_date(backbone: str, method: str) -> None:
    assert generate.planned(backbone, method) == PLANS["recipes"][f"{backbone}-{method}"]


def test_hours_are_counted_by_hand() -> None:
    plan = {"trainable_parameters": 10, "language_weights": 100, "vision_weights": 1000}
    operations = 665_298 * (1024 * (6 * 100 + 2 * 10) + 729 * 2 * 1000)
    hours = operations / (312e12 * 0.3) / 3600
    assert generate.estimated_hours(generate.METHODS["full"], plan) == pytest.approx(hours)
    assert generate.estimated_hours(generate.METHODS["lora"], plan) < hours
