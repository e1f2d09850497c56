"""Distances are symmetric, zero on the adapter itself, and what a plain computation on whole tensors gives."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from maskft.adapters import distance
from maskft.errors import AdapterError

from .helpers import LAYERS, edit, gates, saved

FIELDS: dict[str, dict] = {
    "soft": {"gate": "soft"},
    "centered low-rank": {"gate": "centered", "score_layout": "low-rank", "rank": 2},
    "normalized row": {"gate": "normalized", "score_layout": "row"},
    "threshold": {"gate": "threshold", "init_gate": 0.6},
    "topk": {"gate": "topk", "keep_ratio": 0.7, "bits": True},
}


@pytest.fixture(params=FIELDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    fields = FIELDS[request.param]
    return saved(tmp_path / "a", seed=1, **fields), saved(tmp_path / "b", seed=2, **fields)


def test_symmetric(pair: tuple[Path, Path]) -> None:
    one, two = distance(*pair), distance(*pair[::-1])
    for first, second in zip(astuple(one.overall), astuple(two.overall), strict=True):
        assert (first is None and second is None) or first == pytest.approx(second, rel=1e-12)
    assert one.layers.keys() == two.layers.keys()
    assert len(one.layers) == LAYERS


def test_zero_on_itself(pair: tuple[Path, Path]) -> None:
    found = distance(pair[0], pair[0])
    for measures in (found.overall, *found.layers.values()):
        assert measures.mean_difference == measures.largest_difference == 0
        assert measures.cosine in (pytest.approx(1), None)
        if found.hard:
            assert measures.jaccard_kept == measures.jaccard_cut == 1
            assert measures.correlation is None
        else:
            assert measures.correlation == pytest.approx(1)
            assert measures.jaccard_kept is measures.jaccard_cut is None


def test_of_whole_tensors(pair: tuple[Path, Path]) -> None:
    found = distance(*pair)
    first, second = gates(pair[0]), gates(pair[1])
    if found.overall.scores == sum(m.numel() for m in first.values()):
        m1, m2 = (torch.cat([m.flatten() for m in one.values()]).double() for one in (first, second))
    else:  # a score for each row
        m1, m2 = (torch.cat([m[:, 0].flatten() for m in one.values()]).double() for one in (first, second))
    assert found.overall.scores == m1.numel()
    assert found.overall.mean_difference == pytest.approx((m1 - m2).abs().mean().item(), rel=1e-5)
    assert found.overall.largest_difference == pytest.approx((m1 - m2).abs().max().item(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(m1 - 1, m2 - 1, dim=0).item()
    assert found.overall.cosine == pytest.approx(cosine, abs=1e-5)
    if found.hard:
        kept = (m1 * m2).sum() / torch.maximum(m1, m2).sum()
        cut = ((1 - m1) * (1 - m2)).sum() / (1 - m1 * m2).sum()
        assert found.overall.jaccard_kept == pytest.approx(kept.item())
        assert found.overall.jaccard_cut == pytest.approx(cut.item())


def test_correlation_of_offsets(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=1, gate="centered")
    assert distance(a, b).overall.correlation == pytest.approx(1)
    edit(b, lambda content: [scores.neg_() for scores in content.values()])
    assert distance(a, b).overall.correlation == pytest.approx(-1)
    edit(b, lambda content: [scores.fill_(0.3) for scores in content.values()])
    assert distance(a, b).overall.correlation is None
    assert abs(distance(a, saved(tmp_path / "c", seed=9)).overall.correlation or 1) < 0.05


def test_masks_that_are_one_have_no_direction(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", gate="centered"), saved(tmp_path / "b", gate="centered")
    edit(b, lambda content: [scores.zero_() for scores in content.values()])
    assert distance(a, b).overall.cosine is None
    hard = saved(tmp_path / "c", gate="threshold")
    edit(hard, lambda content: [scores.zero_() for scores in content.values()])
    found = distance(hard, hard).overall
    assert (found.cosine, found.jaccard_kept, found.jaccard_cut) == (None, 1, 1)


def test_layers_left_out(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", gate="centered", modules="attn")
    b = saved(tmp_path / "b", gate="centered", seed=2)
    found = distance(a, b)
    assert len(found.layers) == LAYERS
    for name, measures in found.layers.items():
        assert (measures.correlation is None) == (".mlp." in name)
        if ".mlp." in name:
            m = gates(b)[name]
            assert measures.mean_difference == pytest.approx((m - 1).abs().mean().item(), rel=1e-5)


def test_hard_and_soft(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", gate="threshold"), saved(tmp_path / "b", gate="soft")
    found = distance(a, b)
    assert not found.hard
    assert found.overall.correlation is found.overall.jaccard_kept is None
    assert 0 < found.overall.mean_difference < 1


def test_another_base(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="trained on different bases"):
        distance(saved(tmp_path / "a"), saved(tmp_path / "b", base=3))
