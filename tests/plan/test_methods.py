"""`maskft plan` of recipes that train otherwise than by masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskft.errors import RecipeError
from maskft.plan import plan, planning
from maskft.recipe import load_recipe
from tests.test_methods import COUNTS, METHODS
from tests.tuner.models import tiny_llava

from .test_command import written

NAMES = {
    "mask and projector": "recipe: S-MFT fast",
    "lora": "recipe: LoRA r2",
    "rslora": "recipe: rsLoRA r2",
    "dora": "recipe: DoRA r2",
    "lora and projector": "recipe: LoRA r2",
    "unilora": "recipe: Uni-LoRA r2, 100 numbers",
    "hira": "recipe: HiRA r2",
    "full attention": "recipe: full",
    "projector": "recipe: projector",
}

QUICK = ("lora and projector", "unilora", "full attention", "projector")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plan"), tiny_llava().config)


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ways take time and change nothing here."""
    monkeypatch.setattr(planning, "_peers", lambda *_: ())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
@pytest.mark.usefixtures("_alone")
def test_the_recipes_own_way_comes_first(name: str, recipe: Path) -> None:
    found = plan(load_recipe(recipe, [f"method={METHODS[name]}"]), budget=1000)
    row, *_ = found.rows
    assert row.name == NAMES[name]
    assert row.peak.trained == 4 * COUNTS[name]  # fp32
    assert row.peak.moments == 8 * COUNTS[name]
    assert not row.fits
    proposed = {setting for change in found.changes for setting in change.settings}
    assert ("model.quantization=nf4" in proposed) <= (name in ("mask and projector", "lora", "rslora"))


@pytest.mark.usefixtures("_alone")
def test_full_fine_tuning_of_all_but_the_vision_encoder(recipe: Path) -> None:
    model = tiny_llava()
    trained = sum(p.numel() for name, p in model.named_parameters() if "vision_tower" not in name)
    found = plan(load_recipe(recipe, ["method={name: full}"]))
    assert found.rows[0].peak.trained == 4 * trained


@pytest.mark.slow
def test_other_ways_to_train_the_layers_of_a_peer(recipe: Path) -> None:
    found = plan(load_recipe(recipe, ["method={name: lora, layers: '1'}", "model.quantization=nf4"]))
    names = [row.name for row in found.rows]
    assert names[0] == "recipe: QLoRA r16, nf4"
    assert {"S-MFT tight", "H-MFT fast", "full, fp32"} <= set(names)
    lora = next(row for row in found.rows if row.name == "QLoRA r16, nf4")
    assert lora.peak.trained == found.rows[0].peak.trained


def test_dora_beside_a_quantised_base_is_not_planned(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"Plan it with model\.quantization=none"):
        plan(load_recipe(recipe, ["method={name: lora, variant: dora}", "model.quantization=nf4"]))


def test_a_fixed_mask_makes_no_step(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.fixed makes no training step"):
        plan(load_recipe(recipe, ["method={fixed: random}"]))
