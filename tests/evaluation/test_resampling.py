"""Intervals by resampling, and the exact paired test."""

from __future__ import annotations

from fractions import Fraction
from math import comb, erfc, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.evaluation.resampling import bootstrap_interval, difference_interval, mcnemar


class TestMcNemar:
    @pytest.mark.parametrize(
        ("only_a", "only_b", "p"),
        [
            (0, 0, Fraction(1)),
            (5, 5, Fraction(1)),
            (0, 1, Fraction(1)),  # 2 * 1/2
            (0, 5, Fraction(2, 32)),
            (1, 5, Fraction(2 * (1 + 6), 64)),
            (3, 15, Fraction(2 * (1 + 18 + 153 + 816), 2**18)),
            (4, 5, Fraction(1)),  # 2 * 256/512
        ],
    )
    def test_by_hand(self, only_a: int, only_b: int, p: Fraction) -> None:
        assert mcnemar(only_a, only_b) == pytest.approx(float(p), rel=1e-12)

    @given(only_a=st.integers(0, 300), only_b=st.integers(0, 300))
    def test_equals_the_sum_in_fractions(self, only_a: int, only_b: int) -> None:
        pairs = only_a + only_b
        tail = Fraction(sum(comb(pairs, k) for k in range(min(only_a, only_b) + 1)), 2**pairs)
        assert mcnemar(only_a, only_b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-10)
        assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)

    @pytest.mark.parametrize("off", [0, 100, 500, 1000])
    def test_a_hundred_thousand_pairs(self, off: int) -> None:
        """Against the normal distribution with its continuity correction."""
        z = max(0, 2 * off - 1) / sqrt(100_000)
        assert mcnemar(50_000 - off, 50_000 + off) == pytest.approx(erfc(z / sqrt(2)), rel=2e-3)

    def test_one_side_only(self) -> None:
        assert mcnemar(0, 1000) == pytest.approx(2.0**-999, rel=1e-9)
        assert mcnemar(100_000, 0) == 0.0  # below the smallest float


class TestInterval:
    def test_of_two_groups(self) -> None:
        """Means 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4."""
        assert bootstrap_interval([[0.0, 1.0]], ["a", "b"]) == (0.0, 1.0)

    def test_one_group_says_nothing(self) -> None:
        assert bootstrap_interval([[0.3, 0.4]], ["a", "a"]) == (0.0, 1.0)
        assert bootstrap_interval([[0.3]]) == (0.0, 1.0)
        assert difference_interval([[0.3, 0.4]], [[0.5, 0.5]], ["a", "a"]) == (-1.0, 1.0)

    def test_groups_weigh_by_their_examples(self) -> None:
        """A mean over drawn questions, not over images: 9 of 10 right in one image, none of 1 in the other."""
        scores = [1.0] * 9 + [0.0] + [0.0]
        low, high = bootstrap_interval([scores], ["big"] * 10 + ["small"])
        assert (low, high) == (0.0, 0.9)

    @given(
        scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=30),
        data=st.data(),
    )
    def test_ignores_the_order_of_examples(self, scores: list[float], data) -> None:
        groups = data.draw(st.lists(st.sampled_from("abcdef"), min_size=len(scores), max_size=len(scores)))
        order = data.draw(st.permutations(range(len(scores))))
        shuffled = [scores[i] for i in order], [groups[i] for i in order]
        assert bootstrap_interval([scores], groups) == bootstrap_interval([shuffled[0]], shuffled[1])
        assert bootstrap_interval([scores]) == bootstrap_interval([shuffled[0]])
        low, high = bootstrap_interval([scores], groups)
        assert 0 <= low <= high <= 1

    def test_groups_of_one_are_examples(self) -> None:
        scores = [0.0] * 30 + [0.5] * 20 + [1.0] * 50
        alone = bootstrap_interval([scores])
        assert bootstrap_interval([scores], [f"{n:03d}" for n in range(100)]) == alone
        # standard deviation of the mean: sqrt((0.55 - 0.36) / 100)
        assert alone == pytest.approx((0.6 - 1.96 * 0.0436, 0.6 + 1.96 * 0.0436), abs=0.01)

    def test_many_groups_are_drawn_in_pieces(self) -> None:
        scores = [float(n % 2) for n in range(3000)]
        low, high = bootstrap_interval([scores])
        assert (low, high) == pytest.approx((0.5 - 1.96 * 0.00913, 0.5 + 1.96 * 0.00913), abs=2e-3)


class TestDifference:
    def test_is_paired(self) -> None:
        """Equal answers to hard and easy questions cancel, though each side alone is uncertain."""
        a = [float(n % 2) for n in range(100)]
        groups = [str(n) for n in range(100)]
        assert difference_interval([a], [a], groups) == (0.0, 0.0)
        low, high = bootstrap_interval([a], groups)
        assert high - low > 0.15

    @given(data=st.data(), count=st.integers(2, 40))
    def test_changes_sign_with_the_sides(self, data, count: int) -> None:
        rows = st.lists(st.sampled_from([0.0, 1.0]), min_size=count, max_size=count)
        a, b = data.draw(rows), data.draw(rows)
        groups = [str(n % 7) for n in range(count)]
        low, high = difference_interval([a], [b], groups)
        assert difference_interval([b], [a], groups) == pytest.approx((-high, -low), abs=1e-12)
        assert -1 <= low <= high <= 1

    def test_runs_are_drawn_too(self) -> None:
        """Two seeds of B, one all right and one all wrong, on as many questions as one likes: nothing is sure."""
        groups = [str(n) for n in range(200)]
        low, high = difference_interval([[0.0] * 200], [[0.0] * 200, [1.0] * 200], groups)
        assert (low, high) == (0.0, 1.0)
        assert bootstrap_interval([[0.0] * 200, [1.0] * 200], groups) == (0.0, 1.0)
        assert difference_interval([[0.5] * 200], [[0.5] * 200] * 3, groups) == (0.0, 0.0)
