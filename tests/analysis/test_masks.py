"""Statistics of masks against values worked out by hand, and of saved adapters against plain computations."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from maskft.analysis import (
    LayerMask,
    Statistics,
    attached_masks,
    by_place,
    histogram,
    rank_share,
    saved_masks,
    statistics,
    together,
)
from maskft.errors import AdapterError
from maskft.measures import Place, place
from maskft.tuner import attach_saved
from tests.adapters.helpers import LAYERS, ONE, edit, gates, saved, settings
from tests.tuner.models import tiny_llama

SOFT = LayerMask(
    "one",
    torch.tensor([[0.98, 0.9799], [0.995, 0.005]]),
    torch.full((2, 2), 0.98),
    1.0,
    torch.tensor([[1.0, 2], [2, 4]]),
)


def test_soft_gates_by_hand() -> None:
    found = statistics(SOFT, rank=True)
    m = [0.98, 0.9799, 0.995, 0.005]
    mean = sum(m) / 4
    assert found.gates == 4
    assert found.mean == pytest.approx(mean)
    assert found.spread == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in m) / 4))
    assert found.distance == pytest.approx((0 + 0.0001 + 0.015 + 0.975) / 4, rel=1e-5)
    assert found.moved == 0.5  # 0.9799 is nearer than a thousandth
    assert found.saturated == 0.5  # 0.995 and 0.005
    assert found.kept is None
    assert found.norm == pytest.approx(5)
    change = [1 * 0.02, 2 * 0.0201, 2 * 0.005, 4 * 0.995]
    assert found.change == pytest.approx(math.sqrt(sum(c * c for c in change)) / 5, rel=1e-5)
    assert found.share_rank == 0.5  # one entry outweighs the rest


def test_hard_masks_by_hand() -> None:
    found = statistics(LayerMask("one", torch.tensor([1.0, 0, 1, 1]), torch.ones(4), None))
    assert (found.kept, found.moved, found.distance, found.mean) == (0.75, 0.25, 0.25, 0.75)
    assert (found.saturated, found.change, found.share_rank) == (None, None, None)
    unknown = statistics(LayerMask("one", torch.tensor([1.0, 0]), None, None))
    assert (unknown.distance, unknown.moved, unknown.kept) == (None, None, 0.5)


def test_a_weight_of_zeros_does_not_change() -> None:
    found = statistics(LayerMask("one", torch.full((2, 2), 0.5), None, 1.0, torch.zeros(2, 2)), rank=True)
    assert (found.change, found.norm, found.share_rank) == (0, 0, 0)
    assert together([found, found]).change == 0


@pytest.mark.parametrize(
    ("diagonal", "share"),
    [([3.0, 1.0], 0.5), ([3.0, 1.01], 1.0), ([1.0, 1.0, 1.0, 1.0], 1.0), ([5.0, 0, 0, 0], 0.25), ([0.0, 0.0], 0.0)],
)
def test_rank_of_a_diagonal(diagonal: list[float], share: float) -> None:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    assert rank_share(matrix) == share  # 9 of 10 is 90 % exactly
    assert rank_share(torch.stack([matrix, torch.zeros_like(matrix)])) == share / 2  # experts


def test_together_is_as_of_one_matrix() -> None:
    m, start, weight = torch.rand(6, 4), torch.full((6, 4), 0.7), torch.randn(6, 4)
    whole = statistics(LayerMask("x", m, start, 1.0, weight))
    pieces = [LayerMask("x", m[rows], start[rows], 1.0, weight[rows]) for rows in (slice(0, 1), slice(1, 6))]
    found = together(map(statistics, pieces))
    for field in fields(Statistics):
        assert getattr(found, field.name) == pytest.approx(getattr(whole, field.name)), field.name
    hard = statistics(LayerMask("x", torch.ones(2), None, None))
    assert together([whole, hard]).kept is None


def test_histogram_by_hand() -> None:
    masks = [
        LayerMask("x", torch.tensor([0.0, 0.1, 0.6, 1.9, 2.0]), None, 2.0),
        LayerMask("y", torch.tensor([2.5]), None, 2.0),
    ]
    assert histogram(masks, bins=4) == ([2, 1, 0, 3], 2.0)
    assert histogram([LayerMask("z", torch.tensor([0.0, 1, 1]), None, None)], bins=2) == ([1, 2], 1.0)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("base_model.model.model.language_model.layers.12.mlp.up_proj", Place("language", "mlp.up_proj", 12)),
        ("base_model.model.model.multi_modal_projector.linear_1", Place("projector", "linear_1", -1)),
        ("base_model.model.model.vision_tower.encoder.layers.3.fc1", Place("vision", "fc1", 3)),
        ("model.layers.7.mlp.base_layer.experts.5.w1", Place("language", "mlp.experts.w1", 7)),
        ("lm_head", Place("other", "lm_head", -1)),
    ],
)
def test_places(name: str, where: Place) -> None:
    assert place(name) == where


def test_places_are_sorted_and_experts_taken_together() -> None:
    one = statistics(SOFT)
    found = by_place({f"model.layers.{i}.mlp.experts.{e}.w1": one for i in (10, 2) for e in range(3)})
    assert [where.layer for where in found] == [2, 10]
    assert [s.gates for s in found.values()] == [12, 12]


FIELDS: dict[str, dict] = {
    "soft": {"gate": "soft", "init_weights": True},
    "normalized int4": {"gate": "normalized", "storage": "int4"},
    "centered low-rank": {"gate": "centered", "score_layout": "low-rank", "rank": 2},
    "threshold": {"gate": "threshold", "init_gate": 0.6},
    "topk": {"gate": "topk", "keep_ratio": 0.7, "bits": True},
}


@pytest.mark.parametrize("name", FIELDS)
def test_saved_and_attached_agree(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **FIELDS[name])
    settings(folder, init_weights=True)
    model = attach_saved(tiny_llama(), folder)
    attached = {mask.name: mask for mask in attached_masks(model)}
    alone = {mask.name: mask for mask in saved_masks(folder)}
    assert alone.keys() == attached.keys() == gates(folder).keys()
    assert len(alone) == LAYERS
    for layer, mask in alone.items():
        torch.testing.assert_close(mask.m.float(), attached[layer].m.float(), rtol=0, atol=1e-6)
        assert mask.top == pytest.approx(attached[layer].top)
        assert mask.gates == attached[layer].gates
        if mask.start is not None and attached[layer].start is not None:
            torch.testing.assert_close(mask.start.float(), attached[layer].start.float())
        assert statistics(attached[layer]).change is not None
    assert (alone[ONE].start is None) == (name == "topk")


def test_a_start_that_is_not_on_disk_is_not_known(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", gate="threshold", init_weights="random", init_gate=0.6)
    assert next(saved_masks(folder)).start is None
    assert next(attached_masks(attach_saved(tiny_llama(), folder))).start is None


@pytest.mark.parametrize("name", FIELDS)
def test_a_sample_is_of_the_same_gates_in_every_adapter(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **FIELDS[name])
    whole = {mask.name: mask for mask in saved_masks(folder)}
    for one, two in zip(saved_masks(folder, sample=100), saved_masks(folder, sample=100), strict=True):
        assert torch.equal(one.m, two.m)
        assert one.m.shape == (100,)
        assert one.gates == whole[one.name].gates
        assert torch.isin(one.m, whole[one.name].m).all()
    everything = next(saved_masks(folder, sample=10**6))
    assert torch.equal(everything.m.sort().values, whole[everything.name].m.flatten().sort().values)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="depends on the base's weights"):
        list(saved_masks(saved(tmp_path / "topk", gate="topk")))
    broken = saved(tmp_path / "broken")
    edit(broken, lambda content: content[f"{ONE}.mask_scores"].fill_(math.nan))
    for sample in (None, 10):
        with pytest.raises(AdapterError, match="not finite"):
            list(saved_masks(broken, sample=sample))
