"""Overlap and drift on masks small enough to count by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskft.analysis import LayerMask, checkpoints, drift, overlap, relation
from maskft.errors import AdapterError
from maskft.recipe import Recipe
from tests.adapters.helpers import edit, saved


def hard(*rows: list[int]) -> list[LayerMask]:
    return [LayerMask(f"layer {i}", torch.tensor(row, dtype=torch.float64), None, None) for i, row in enumerate(rows)]


def soft(m: Tensor) -> list[LayerMask]:
    return [LayerMask("layer", m, torch.full_like(m, 0.5), 1.0)]


def test_hard_masks_by_hand() -> None:
    # cut: of four {0, 1} and {1, 2}; of two {0} and {0}
    found = overlap(hard([0, 0, 1, 1], [0, 1]), hard([1, 0, 0, 1], [0, 1]))
    assert found.shared == pytest.approx(2 / 3)
    assert found.by_chance == pytest.approx((2 * 2 / 4 + 1 * 1 / 2) / 3)
    variance = 2 * 2 * 2 * 2 / (16 * 3) + 1 * 1 * 1 * 1 / (4 * 1)
    assert found.deviation == pytest.approx(math.sqrt(variance) / 3)
    assert found.layers == {"layer 0": 0.5, "layer 1": 1.0}


def test_nothing_cut() -> None:
    found = overlap(hard([1, 1]), hard([0, 1]))
    assert (found.shared, found.by_chance, found.layers) == (None, 0, {"layer 0": None})


def test_the_farthest_tenth_of_soft_gates() -> None:
    m = torch.full((20,), 0.5)
    m[3], m[7], m[9] = 0.9, 0.1, 0.6
    other = torch.full((20,), 0.5)
    other[3], other[8], other[9] = 0.1, 0.3, 0.45
    found = overlap(soft(m), soft(other))  # {3, 7} and {3, 8}
    assert found.shared == 0.5
    assert found.by_chance == pytest.approx(0.1)
    assert overlap(soft(m), soft(m)).shared == 1


def test_ties_are_not_settled_by_position() -> None:
    tied = torch.full((20,), 0.5)
    tied[5:10] = 0.6  # five tie for two places
    assert overlap(soft(tied), soft(tied)).shared is None
    assert overlap(soft(tied[:4]), soft(tied[:4])).shared is None  # a tenth of four is none


def test_random_masks_meet_as_chance_says() -> None:
    found = overlap(soft(torch.rand(40_000)), soft(torch.rand(40_000)))
    assert found.shared is not None
    assert abs(found.shared - found.by_chance) < 4 * found.deviation < 0.02


def test_masks_that_cannot_be_compared() -> None:
    with pytest.raises(AdapterError, match="no layer in common"):
        overlap(hard([1]), [])
    with pytest.raises(AdapterError, match="shape"):
        overlap(hard([1, 0]), hard([1]))


def test_drift_over_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    last = saved(run / "checkpoints" / "checkpoint-100", gate="centered", init_weights=True)
    half = shutil.copytree(last, run / "checkpoints" / "checkpoint-20")
    edit(half, lambda content: [scores.mul_(0.5) for scores in content.values()])
    (run / "checkpoints" / "README.md").write_text("no checkpoint")
    found = checkpoints(run)
    assert list(found) == [20, 100]
    early, late = drift(found)
    assert (early.step, late.step) == (20, 100)
    assert late.to_last == 0
    assert early.correlation == late.correlation == pytest.approx(1)
    assert early.from_start is not None
    assert late.from_start is not None
    assert 0 < early.from_start < late.from_start
    assert early.to_last == pytest.approx(late.from_start - early.from_start, rel=1e-4)  # each gate moved one way
    assert drift({}) == []


def recipe(data_seed: int = 0, part: str = "vqa", gate: str = "soft", **training: object) -> Recipe:
    data = {"kind": "easy-vqa", "part": part, "seed": data_seed}
    return Recipe.model_validate({"data": data, "training": training, "method": {"name": "mask", "gate": gate}})


def test_relations() -> None:
    assert relation(recipe(), recipe()) == "repeat"
    assert relation(recipe(seed=1), recipe(seed=2)) == relation(recipe(), recipe(data_seed=3)) == "seed"
    assert relation(recipe(), recipe(part="captions", gate="topk")) == "task"
    assert relation(recipe(), recipe(gate="topk")) == "setting"
