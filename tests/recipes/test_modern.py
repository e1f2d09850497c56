"""Recipes for today's models: their heads hold what planning says, on configs alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from maskft.plan import plan
from maskft.preview import preview
from maskft.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "modern").glob("*.yaml"))
PARAMETERS = {  # as the models' pages give them, in billions
    "gemma-3-4b": 4.3,
    "internvl3-2b": 2.09,
    "qwen3-vl-2b": 2.13,
    "smolvlm2-2.2b": 2.25,
}
each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_is_one_for_each_config() -> None:
    assert {path.stem.removesuffix("-mask") for path in RECIPES} == set(PARAMETERS)


@each
def test_dry_run_agrees_with_the_head(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = path.stem.removesuffix("-mask")
    recipe = load_recipe(path, [f"model.base={ROOT / 'recipes' / 'configs' / name}"])
    seen = preview(recipe, tmp_path / "run")
    assert seen["base_parameters"] == pytest.approx(PARAMETERS[name] * 1e9, rel=0.005)
    assert f"# Masked    {seen['trainable_parameters']:,} weights" in path.read_text()
    assert seen["rows_per_step"] == 16


@pytest.mark.slow
@each
def test_planned_memory_is_the_heads(path: Path) -> None:
    name = path.stem.removesuffix("-mask")
    recipe = load_recipe(path, [f"model.base={ROOT / 'recipes' / 'configs' / name}"])
    peak = plan(recipe, alone=True).rows[0].peak.total
    (said,) = re.findall(r"# Memory    (\d+\.\d) GB", path.read_text())
    assert f"{peak / 1e9:.1f}" == said
    assert peak < 22e9  # 2 GB of a GPU of 24 for CUDA and gaps
