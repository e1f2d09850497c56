"""The quick start by other methods: what its recipes train."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskft.preview import preview
from maskft.recipe import load_recipe
from maskft.vlm.load import load_skeleton

from .conftest import QUICKSTART

PEERS = QUICKSTART.parent / "peers"
FEW = ["data.limits={train: 8, validation: 4, test: 4}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "qlora", "unilora", "hira", "full"])
def test_dry_run(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(PEERS / f"quickstart-{name}.yaml", FEW)
    quickstart = load_recipe(QUICKSTART, FEW)
    for section in ("data", "evaluation"):
        assert getattr(recipe, section) == getattr(quickstart, section)
    for key in ("max_steps", "per_device_train_batch_size", "warmup_steps", "seed"):
        assert recipe.training[key] == quickstart.training[key]
    seen, masked = preview(recipe, tmp_path / "run"), preview(quickstart, tmp_path / "run")["masked_modules"]
    model = load_skeleton("embedded", dtype="bfloat16")
    if name == "full":
        trained = {key: p.numel() for key, p in model.named_parameters() if "vision_tower" not in key}
        assert set(seen["whole_parameters"]) == set(trained)
        assert seen["trainable_parameters"] == sum(trained.values())
        return
    assert sorted(seen["adapted_modules"]) == sorted(masked)
    ends = sum(sum(model.get_submodule(layer).weight.shape) for layer in masked)
    assert seen["trainable_parameters"] == (100_000 if name == "unilora" else 16 * ends)
