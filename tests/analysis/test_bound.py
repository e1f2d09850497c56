"""Occam's bound: the inequalities it rests on, its inverses, that it holds as often as it says, and what codes cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskft.adapters import pack
from maskft.analysis.bound import (
    bernoulli_kl,
    choice_bits,
    examples_needed,
    image_errors,
    integer_bits,
    kl_inverse,
    learnt_bits,
    most_bits,
    occam_bound,
)
from maskft.errors import AdapterError
from tests.adapters.helpers import edit, saved

SHARE = st.floats(0, 1)
RATE = st.floats(1e-6, 50)


@given(SHARE, SHARE)
def test_pinsker(q: float, p: float) -> None:
    assert bernoulli_kl(q, p) >= 2 * (p - q) ** 2 - 1e-12
    assert bernoulli_kl(q, q) == 0


@given(SHARE, RATE)
def test_the_inverse_is_the_largest_that_fits(q: float, rate: float) -> None:
    p = kl_inverse(q, rate)
    assert q <= p <= 1
    assert p == 1 or bernoulli_kl(q, p) > rate
    assert bernoulli_kl(q, max(q, math.nextafter(p, 0))) <= rate


def test_closed_forms() -> None:
    assert bernoulli_kl(0, 0.5) == pytest.approx(math.log(2))
    assert bernoulli_kl(0.3, 1) == math.inf
    assert bernoulli_kl(1, 1) == 0
    assert kl_inverse(0, 1) == pytest.approx(1 - math.exp(-1))  # (1 - p)^n = e^-rate with no error in n examples
    assert kl_inverse(1, 1) == 1


@given(st.integers(0, 10_000), st.integers(1, 10**6), st.floats(0, 0.9), st.floats(0.001, 1))
def test_the_sharper_form_is_never_above_the_other(bits: int, examples: int, error: float, delta: float) -> None:
    found = occam_bound(bits, examples, error, delta)
    assert error <= found.kl <= found.hoeffding + 1e-9
    assert found.rate == pytest.approx((bits * math.log(2) - math.log(delta)) / examples)
    assert occam_bound(bits + 1, examples, error, delta).kl >= found.kl
    assert occam_bound(bits, examples + 1, error, delta).kl <= found.kl


@given(st.integers(1, 10**9), st.floats(0, 0.4), st.floats(0.05, 0.5))
def test_examples_and_bits_for_a_target(bits: int, error: float, above: float) -> None:
    target = error + above
    needed = examples_needed(bits, error, target)
    assert occam_bound(bits, needed, error).kl <= target + 1e-9
    assert needed == 1 or occam_bound(bits, needed - 1, error).kl > target - 1e-9
    assert most_bits(needed, error, target) >= bits * (1 - 1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: occam_bound(1, 0, 0.1),
        lambda: occam_bound(-1, 1, 0.1),
        lambda: occam_bound(1, 1, 1.1),
        lambda: occam_bound(1, 1, 0.1, delta=0),
        lambda: examples_needed(1, 0.5, 0.5),
        lambda: examples_needed(1, 0.5, 1.0),
        lambda: choice_bits(3, 4),
    ],
)
def test_impossible_questions(call) -> None:
    with pytest.raises(ValueError):
        call()


def test_it_holds_at_least_as_often_as_it_says() -> None:
    """256 models of one error each, the best in training chosen: how often does the chosen one break the bound?"""
    draw = torch.Generator().manual_seed(0)
    models, examples, error, trials, delta = 256, 40, 0.5, 2000, 0.2
    errors = torch.binomial(torch.full((trials, models), float(examples)), torch.tensor(error), generator=draw)
    best = (errors.min(1).values / examples).tolist()
    kl = sum(occam_bound(math.log2(models), examples, b, delta).kl < error for b in best) / trials
    hoeffding = sum(occam_bound(math.log2(models), examples, b, delta).hoeffding < error for b in best) / trials
    assert hoeffding <= kl <= delta
    assert kl > delta / 20  # it is not idle either: the chosen one does look too good
    assert sum(b < error - 0.1 for b in best) / trials > 0.99


def test_codes_are_prefix_codes_by_krafts_sum() -> None:
    assert [integer_bits(n) for n in (0, 1, 2, 3, 6, 7)] == [1, 3, 3, 5, 5, 7]
    assert sum(2.0 ** -integer_bits(n) for n in range(1 << 14)) <= 1
    for total in (1, 5, 12):
        assert sum(math.comb(total, k) * 2.0 ** -choice_bits(total, k) for k in range(total + 1)) <= 1
    assert choice_bits(1000, 0) == 1
    assert choice_bits(10**8, 100) < 100 * math.log2(math.e * 10**6) + 15


def test_bits_of_saved_adapters(tmp_path: Path) -> None:
    folder = saved(tmp_path / "full")
    full = learnt_bits(folder)
    pack(folder, tmp_path / "int4", "int4")
    packed = learnt_bits(tmp_path / "int4")
    assert full["total"] == full["tensors"] + full["settings"]
    size = 8 * (folder / "adapter_model.safetensors").stat().st_size
    assert 0.8 * size < full["tensors"] < size
    assert packed["tensors"] < full["tensors"] / 4
    edit(folder, lambda content: [scores.zero_() for scores in content.values()])
    assert learnt_bits(folder)["tensors"] < full["tensors"] / 50  # what has not moved costs next to nothing
    assert packed["settings"] < 8 * 2000


def test_damaged_adapters(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="has not been trained to its end"):
        learnt_bits(tmp_path)
    folder = saved(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match="cannot be read"):
        learnt_bits(folder)


WEIGHTS, ROWS, RANK_ONE = 106_721_280, 30 * 5184 + 2 * 576, 30 * 10176 + 2112
"""Of the embedded base's language layers and projector: weights, rows, and rows plus columns."""
CODES = {
    "soft, dense, 32 bits each": 32 * WEIGHTS,
    "soft, dense, 4 bits each": 4 * WEIGHTS,
    "hard, one weight in ten cut": choice_bits(WEIGHTS, WEIGHTS // 10),
    "LoRA of rank 16 on the same matrices, 16 bits each": 16 * 16 * RANK_ONE,
    "soft, low-rank of rank 1, 4 bits each": 4 * RANK_ONE,
    "soft, a gate for each row, 4 bits each": 4 * ROWS,
    "hard, a gate for each row": ROWS,
    "hard, 1,000 weights cut": choice_bits(WEIGHTS, 1000),
    "soft, rows of one layer, 4 bits each": 4 * 5184,
    "hard, rows of one layer": 5184,
    "hard, 100 weights cut": choice_bits(WEIGHTS, 100),
}


def test_the_pages_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    for name, bits in CODES.items():
        needed = (examples_needed(bits, error, 0.374) for error in (0, 0.15))
        assert f"| {name} | {round(bits):,} | {' | '.join(f'{n:,}' for n in needed)} |" in page
    assert most_bits(1600, 0, 0.374) == pytest.approx(1076.9, abs=0.1)
    assert most_bits(1600, 0.15, 0.374) == pytest.approx(279.5, abs=0.1)
    assert choice_bits(WEIGHTS, 47) <= 1076 < choice_bits(WEIGHTS, 48)


def test_questions_about_one_image_are_one_example() -> None:
    records = [{"group": "x"}, {"group": "x"}, {"image": "y.png"}, {"image": None}, {"image": None}]
    assert image_errors(records, [1.0, 0.5, 0.0, 1.0, 0.0]) == [0.25, 1.0, 0.0, 1.0]
