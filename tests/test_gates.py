"""The gates against hand-worked values, textbook formulas and exact counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskft.gates import AtLeast, Centered, Gate, Normalized, Soft, Threshold, TopK, TopKGlobal, global_cut
from maskft.selection import kth_smallest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STARTS = [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.999]
TEMPERATURES = [0.05, 0.3, 1.0, 2.5, 10.0]

start_values = st.floats(0.01, 0.999)
temperatures = st.floats(0.05, 10.0)


def smooth_gates(m0: float = 0.98, temperature: float = 1.0, straight_through: bool = False) -> list[Gate]:
    return [
        Soft(m0, temperature, straight_through),
        Normalized(m0, temperature, straight_through),
        Centered(temperature, straight_through),
    ]


def textbook(gate: Gate, offset: Tensor) -> Tensor:
    """m as the module's docstring writes it, in plain autograd operations."""
    if isinstance(gate, Centered):
        return 2 * torch.sigmoid(offset / gate.temperature)
    assert isinstance(gate, Soft | Normalized)
    start = gate.temperature * math.log(gate.init_gate / (1 - gate.init_gate))
    m = torch.sigmoid((start + offset) / gate.temperature)
    return m / gate.init_gate if isinstance(gate, Normalized) else m


def value(gate: Gate, offset: Tensor) -> Tensor:
    return gate.value(offset, torch.ones_like(offset))


def derivative(gate: Gate, offset: Tensor) -> Tensor:
    return gate.derivative(offset, torch.ones_like(offset))


class TestStart:
    @pytest.mark.parametrize("m0", STARTS)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_soft_starts_at_init_gate(self, m0: float, temperature: float) -> None:
        start = value(Soft(m0, temperature), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(start, torch.full_like(start, m0), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_identity_gates_start_at_exactly_one(self, dtype: torch.dtype) -> None:
        zeros = torch.zeros(2, 3, dtype=dtype)
        for temperature in TEMPERATURES:
            assert torch.equal(value(Centered(temperature), zeros), torch.ones_like(zeros))
            for m0 in STARTS:
                assert torch.equal(value(Normalized(m0, temperature), zeros), torch.ones_like(zeros)), m0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("m0", [m for m in STARTS if m >= 0.5])
    def test_threshold_starts_with_all_ones(self, m0: float, dtype: torch.dtype) -> None:
        zeros = torch.zeros(2, 3, dtype=dtype)
        for temperature in TEMPERATURES:
            assert torch.equal(value(Threshold(m0, temperature), zeros), torch.ones_like(zeros))

    @given(m0=start_values, temperature=temperatures)
    def test_identity_holds_for_any_parameters(self, m0: float, temperature: float) -> None:
        zeros = torch.zeros(1)
        for gate in (Normalized(m0, temperature), Centered(temperature)):
            assert gate.identity_at_start
            assert value(gate, zeros).item() == 1.0

    def test_which_gates_promise_the_identity(self) -> None:
        gates: list[Gate] = [Soft(0.9), Normalized(0.9), Centered(), TopK(0.5), Threshold(0.9)]
        assert [gate.identity_at_start for gate in gates] == [False, True, True, False, True]


class TestSmoothGates:
    def test_hand_worked_values(self) -> None:
        # T = 2, D = 2 ln 3: exp(-D/T) = 1/3
        offset = torch.tensor([2 * math.log(3)], dtype=torch.float64)
        # m0 = 1/2: s0 = 0, sigmoid = 1/(1 + 1/3) = 3/4; over m0: 3/2; twice the sigmoid: 3/2
        assert value(Soft(0.5, 2.0), offset).item() == pytest.approx(0.75, abs=1e-15)
        assert value(Normalized(0.5, 2.0), offset).item() == pytest.approx(1.5, abs=1e-15)
        assert value(Centered(2.0), offset).item() == pytest.approx(1.5, abs=1e-15)
        # m(1-m)/T = 3/32, over m0 = 3/16, twice = 3/16
        assert derivative(Soft(0.5, 2.0), offset).item() == pytest.approx(3 / 32, abs=1e-15)
        assert derivative(Normalized(0.5, 2.0), offset).item() == pytest.approx(3 / 16, abs=1e-15)
        assert derivative(Centered(2.0), offset).item() == pytest.approx(3 / 16, abs=1e-15)
        # m0 = 0.9: odds 9, at D = 2 ln 3 odds 27
        assert value(Soft(0.9, 2.0), offset).item() == pytest.approx(27 / 28, abs=1e-15)
        assert value(Normalized(0.9, 2.0), offset).item() == pytest.approx(27 / 28 / 0.9, abs=1e-15)

    @pytest.mark.parametrize("m0", STARTS)
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_value_and_derivative_match_autograd_of_the_textbook_form(self, m0: float, temperature: float) -> None:
        for gate in smooth_gates(m0, temperature):
            offset = (torch.linspace(-8, 8, 101, dtype=torch.float64) * temperature).requires_grad_()
            expected = textbook(gate, offset)
            (slope,) = torch.autograd.grad(expected.sum(), offset)
            # float64 keeps 1e-16; 1 - m, which the textbook form loses digits in, costs a few more
            torch.testing.assert_close(value(gate, offset.detach()), expected.detach(), rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(derivative(gate, offset.detach()), slope, rtol=1e-10, atol=1e-14 / temperature)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype_and_shape_are_the_offsets(self, dtype: torch.dtype) -> None:
        offset = torch.randn(3, 5).to(dtype)
        for gate in [*smooth_gates(), TopK(0.5), Threshold(0.9)]:
            for result in (value(gate, offset), derivative(gate, offset)):
                assert result.dtype == dtype
                assert result.shape == offset.shape

    def test_offsets_are_left_alone(self) -> None:
        offset, weight = torch.randn(4, 4), torch.randn(4, 4)
        before = offset.clone(), weight.clone()
        for gate in [*smooth_gates(), TopK(0.5), Threshold(0.9)]:
            gate.value(offset, weight)
            gate.derivative(offset, weight)
            assert torch.equal(offset, before[0])
            assert torch.equal(weight, before[1])

    @given(m0=start_values, temperature=temperatures, offset=st.floats(-100, 100))
    def test_range(self, m0: float, temperature: float, offset: float) -> None:
        at = torch.tensor([offset], dtype=torch.float64)
        for gate, top in zip(smooth_gates(m0, temperature), (1.0, 1 / m0, 2.0), strict=True):
            assert 0 <= value(gate, at).item() <= top * (1 + 1e-15)
            # the derivative of a rising gate; at its upper end 1 - m0 * m rounds to a few units of 1e-16
            assert derivative(gate, at).item() >= -1e-15 / temperature / m0

    @given(m0=start_values, temperature=temperatures, low=st.floats(-20, 20), step=st.floats(0, 20))
    def test_monotone(self, m0: float, temperature: float, low: float, step: float) -> None:
        pair = torch.tensor([low, low + step], dtype=torch.float64)
        for gate in [*smooth_gates(m0, temperature), Threshold(m0, temperature)]:
            lower, upper = value(gate, pair).tolist()
            assert lower <= upper * (1 + 1e-14)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
    def test_extreme_offsets_give_finite_values_and_derivatives(self, dtype: torch.dtype, temperature: float) -> None:
        offset = torch.tensor([-1e4, -300, -90, -20, 20, 90, 300, 1e4], dtype=dtype)
        for m0 in (0.02, 0.5, 0.98):
            for gate in [*smooth_gates(m0, temperature), Threshold(m0, temperature)]:
                assert torch.isfinite(value(gate, offset)).all(), gate
                assert torch.isfinite(derivative(gate, offset)).all(), gate

    def test_limits(self) -> None:
        offset = torch.tensor([-1e4, 1e4], dtype=torch.float64)
        for gate, top in zip(smooth_gates(0.8, 1.0), (1.0, 1.25, 2.0), strict=True):
            assert value(gate, offset).tolist() == pytest.approx([0.0, top], abs=1e-15)
            assert derivative(gate, offset).tolist() == pytest.approx([0.0, 0.0], abs=1e-15)

    def test_straight_through_derivative_is_one_and_leaves_the_value(self) -> None:
        offset = torch.randn(50, dtype=torch.float64) * 3
        exact, straight = smooth_gates(0.9, 0.7), smooth_gates(0.9, 0.7, straight_through=True)
        for one, other in zip(exact, straight, strict=True):
            assert torch.equal(derivative(other, offset), torch.ones_like(offset))
            assert torch.equal(value(one, offset), value(other, offset))


class TestThreshold:
    def test_cuts_where_the_score_falls_below_zero(self) -> None:
        start = 2.0 * math.log(9)  # T logit(0.9)
        offset = torch.tensor([0.0, -start + 1e-6, -start - 1e-6, -100, 100], dtype=torch.float64)
        assert value(Threshold(0.9, 2.0), offset).tolist() == [1, 1, 0, 0, 1]

    def test_derivative_is_one(self) -> None:
        assert torch.equal(derivative(Threshold(0.9), torch.randn(7)), torch.ones(7))


def kept_by_sorting(size: Tensor, keep: int) -> Tensor:
    """The plain version: stable sort, largest first, so that ties keep their order."""
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[torch.sort(size.flatten(), descending=True, stable=True).indices[:keep]] = True
    return mask.view_as(size)


class TestTopK:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (8, 8), (13, 11), (40, 25)], ids=str)
    @pytest.mark.parametrize("ratio", [1e-9, 0.01, 0.1, 1 / 3, 0.5, 0.75, 0.9, 0.999, 1.0])
    def test_keeps_exactly_the_rounded_count(self, shape: tuple[int, int], ratio: float) -> None:
        keep = round(ratio * shape[0] * shape[1])
        inputs = {
            "random": torch.randn(shape),
            "ties": torch.randint(-2, 3, shape).float(),
            "all equal": torch.full(shape, 0.5),
            "all zero": torch.zeros(shape),
        }
        for name, score in inputs.items():
            mask = value(TopK(ratio, magnitude_start=False), score)
            assert mask.sum().item() == keep, name
            assert torch.equal(mask.bool(), kept_by_sorting(score.abs(), keep)), name

    @given(
        scores=st.lists(st.integers(-4, 4), min_size=1, max_size=60),
        ratio=st.floats(0, 1, exclude_min=True),
        dtype=st.sampled_from(DTYPES),
    )
    def test_agrees_with_a_stable_sort_in_every_dtype(
        self, scores: list[int], ratio: float, dtype: torch.dtype
    ) -> None:
        score = torch.tensor(scores, dtype=dtype)
        mask = value(TopK(ratio, magnitude_start=False), score)
        assert torch.equal(mask.bool(), kept_by_sorting(score.abs().float(), round(ratio * len(scores))))

    def test_ties_go_to_the_first_positions(self) -> None:
        score = torch.tensor([[1.0, 3.0, 1.0], [-1.0, 0.5, 1.0]])
        assert value(TopK(0.5, magnitude_start=False), score).tolist() == [[1, 1, 1], [0, 0, 0]]
        assert value(TopK(4 / 6, magnitude_start=False), score).tolist() == [[1, 1, 1], [1, 0, 0]]

    @pytest.mark.parametrize("magnitude_start", [True, False])
    def test_keep_all_is_the_identity(self, magnitude_start: bool) -> None:
        offset, weight = torch.randn(9, 4), torch.randn(9, 4)
        assert torch.equal(TopK(1.0, magnitude_start).value(offset, weight), torch.ones(9, 4))

    def test_same_mask_in_every_dtype_for_representable_scores(self) -> None:
        score = torch.randint(-64, 65, (12, 10)).double() / 16  # at most 7 bits: exact in bf16 and fp16 too
        masks = [value(TopK(0.6, magnitude_start=False), score.to(dtype)).bool() for dtype in DTYPES]
        assert all(torch.equal(mask, masks[0]) for mask in masks)

    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_magnitude_start_cuts_the_smallest_weights(self, weight_dtype: torch.dtype) -> None:
        weight = (torch.randperm(100).view(10, 10) - 50).to(weight_dtype) + 0.25  # all of different size
        mask = TopK(0.7).value(torch.zeros(10, 10), weight)
        smallest = weight.float().abs().flatten().argsort()[:30]
        assert mask.flatten()[smallest].sum() == 0
        assert mask.sum() == 70

    def test_magnitude_start_does_not_depend_on_the_weights_scale(self) -> None:
        weight = torch.randn(8, 8)
        scores = [TopK(0.5).score(torch.ones(8, 8), weight * 2.0**power) for power in (-20, 0, 20)]
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[2], scores[1])
        assert (scores[1] - 1).square().mean().item() == pytest.approx(1.0, rel=1e-5)

    def test_all_zero_weights_stay_finite(self) -> None:
        score = TopK(0.5).score(torch.zeros(2, 2), torch.zeros(2, 2))
        assert torch.equal(score, torch.zeros(2, 2))

    def test_derivative_is_the_sign_of_the_score(self) -> None:
        offset = torch.tensor([-3.0, -0.5, 0.0, 2.0])
        assert TopK(0.5, magnitude_start=False).derivative(offset, torch.ones(4)).tolist() == [-1, -1, 0, 1]
        # |W| over its root mean square is 1 for these weights: scores -2, 0.5, 1, 3
        assert TopK(0.5).derivative(offset, torch.tensor([1.0, -1, 1, -1])).tolist() == [-1, 1, 1, 1]

    @pytest.mark.parametrize("slices", [(), (1, 2)])
    def test_straight_through_derivative_is_one_and_leaves_the_value(self, slices: tuple[int, ...]) -> None:
        offset, weight = torch.randn(3, 4), torch.randn(3, 4)
        gate = TopK(0.5, slices=slices)
        straight = replace(gate, straight_through=True)
        assert torch.equal(straight.derivative(offset, weight), torch.ones(3, 4))
        assert torch.equal(straight.value(offset, weight), gate.value(offset, weight))


class TestStackedMatrices:
    def test_each_slice_keeps_its_own_share(self) -> None:
        score = torch.cat([torch.full((4, 5), 9.0), torch.rand(2, 5), -torch.rand(2, 5)])
        m = TopK(0.5, magnitude_start=False, slices=(4, 2, 2)).value(score, torch.ones(8, 5))
        assert [int(part.sum()) for part in m.split((4, 2, 2))] == [10, 5, 5]
        # ties to the first positions
        assert torch.equal(m[:2], torch.ones(2, 5))

    def test_a_slice_starts_from_its_own_magnitudes(self) -> None:
        weight = torch.cat([torch.randn(3, 4), 100 * torch.randn(3, 4)])
        score = TopK(0.5, slices=(3, 3)).score(torch.zeros(6, 4), weight)
        torch.testing.assert_close(score.square().view(2, -1).mean(-1), torch.ones(2))

    def test_each_expert_is_a_matrix_of_its_own(self) -> None:
        offset, weight = torch.randn(3, 4, 5), torch.randn(3, 4, 5) * torch.tensor([1.0, 10, 100])[:, None, None]
        gate = TopK(0.3)
        together = gate.value(offset, weight)
        alone = torch.stack([gate.value(d, w) for d, w in zip(offset, weight, strict=True)])
        assert torch.equal(together, alone)
        assert together.sum((1, 2)).tolist() == [6, 6, 6]


def size_of(offset: Tensor, weight: Tensor) -> Callable[[AtLeast], Tensor]:
    return lambda gate: gate.score(offset, weight).abs()


class TestSettledRanking:
    """A cut in place of a ranking, where a cut can tell what stays."""

    @pytest.mark.parametrize("magnitude_start", [True, False])
    @pytest.mark.parametrize("keep_ratio", [0.01, 0.5, 0.9, 0.999])
    @pytest.mark.parametrize("straight_through", [True, False])
    def test_keeps_the_same_and_has_the_same_derivative(
        self, keep_ratio: float, magnitude_start: bool, straight_through: bool
    ) -> None:
        offset, weight = torch.randn(20, 50), torch.randn(20, 50).bfloat16()
        gate = TopK(keep_ratio, magnitude_start, straight_through=straight_through)
        settled = gate.settled(weight, size_of(offset, weight))
        assert settled is not None
        assert torch.equal(settled.value(offset, weight), gate.value(offset, weight))
        assert torch.equal(settled.derivative(offset, weight), gate.derivative(offset, weight))

    @given(values=st.lists(st.integers(-4, 4), min_size=2, max_size=12), keep_ratio=st.floats(0.01, 1))
    def test_ties_that_cross_the_cut_are_left_to_the_ranking(self, values: list[int], keep_ratio: float) -> None:
        offset = torch.tensor([values], dtype=torch.float32)
        gate = TopK(keep_ratio, magnitude_start=False)
        settled = gate.settled(offset, size_of(offset, offset))
        keep, falling = round(keep_ratio * len(values)), sorted(map(abs, values), reverse=True)
        clear = 0 < keep < len(values) and falling[keep - 1] > falling[keep]
        assert (settled is not None) == clear
        if settled is not None:
            assert torch.equal(settled.value(offset, offset), gate.value(offset, offset))

    @pytest.mark.parametrize(
        ("gate", "weight"),
        [
            (TopK(0.5, slices=(2, 2)), torch.randn(4, 6)),
            (TopK(0.5), torch.randn(3, 4, 6)),
            (TopK(0.5), torch.randn(4, 6, dtype=torch.float64)),
            (TopK(0.5), torch.empty(4, 6, device="meta")),
        ],
        ids=["slices", "experts", "fp64", "meta"],
    )
    def test_several_matrices_and_what_cannot_be_looked_at_are_left_to_it_too(self, gate: TopK, weight: Tensor) -> None:
        offset = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        assert gate.settled(weight, size_of(offset, weight)) is None


class TestGlobalRanking:
    @given(
        sizes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5),
        keep_ratio=st.floats(0.01, 1),
    )
    def test_keeps_exactly_the_share_of_all_entries_first_ones_first(
        self, sizes: list[list[int]], keep_ratio: float
    ) -> None:
        scores = [torch.tensor(values, dtype=torch.float32) for values in sizes]
        cut, ties = global_cut(scores, keep_ratio)
        kept = torch.cat(
            [TopKGlobal(cut, n, magnitude_start=False).value(s, s) for s, n in zip(scores, ties, strict=True)]
        )
        everything = torch.cat(scores)
        order = sorted(range(len(everything)), key=lambda i: (-everything[i].item(), i))
        expected = torch.zeros_like(everything)
        expected[order[: round(keep_ratio * len(order))]] = 1
        assert torch.equal(kept, expected)

    def test_magnitudes_are_compared_after_scaling_each_matrix(self) -> None:
        small, large = torch.tensor([[1.0, 2.0]]), torch.tensor([[300.0, 400.0]])
        draft = TopKGlobal(torch.zeros(()), 0)
        scores = [draft.score(torch.zeros(1, 2), weight).abs() for weight in (small, large)]
        cut, ties = global_cut(scores, 0.5)
        masks = [TopKGlobal(cut, n).value(torch.zeros(1, 2), w) for w, n in zip((small, large), ties, strict=True)]
        assert [mask.tolist() for mask in masks] == [[[0, 1]], [[0, 1]]]

    @given(
        sizes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5),
        keep_ratio=st.floats(0.01, 1),
    )
    def test_settled_gates_keep_the_same_or_there_are_ties(self, sizes: list[list[int]], keep_ratio: float) -> None:
        scores = [torch.tensor([values], dtype=torch.float32) for values in sizes]
        cut, ties = global_cut(scores, keep_ratio)
        for score, n in zip(scores, ties, strict=True):
            gate = TopKGlobal(cut, n, magnitude_start=False)
            settled = gate.settled(score, lambda found, score=score: found.score(score, score).abs())
            equal = int((score == cut).sum())
            assert (settled is None) == (n != equal and (n > 0 or cut == 0))
            if settled is not None:
                assert torch.equal(settled.value(score, score), gate.value(score, score))

    def test_derivative_is_the_sign_of_the_score(self) -> None:
        gate = TopKGlobal(torch.tensor(1.0), 0, magnitude_start=False)
        offset, weight = torch.tensor([-3.0, 0.0, 2.0]), torch.ones(3)
        assert gate.derivative(offset, weight).tolist() == [-1, 0, 1]
        assert replace(gate, straight_through=True).derivative(offset, weight).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["normal", "sizes", "ties", "zeros", "one", "extremes", "long", "long, ties"])
def test_the_fast_selection_finds_what_torch_finds(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 500, generator=generator)
    values = {
        "normal": values,
        "sizes": values.abs(),
        "ties": (values * 2).round(),
        "zeros": torch.zeros(2, 9),
        "one": values[:, :1],
        "long": torch.randn(1, (1 << 22) + 5, generator=generator),
        "long, ties": torch.randn(1, (1 << 22) + 5, generator=generator).round(),
        "extremes": torch.tensor([[-float("inf"), float("inf"), -1e-45, 1e-45, -0.0, 0.0, 3e38, -3e38]]),
    }[kind]
    for k in range(1, values.shape[-1] + 1, 7 if values.shape[-1] <= 500 else values.shape[-1] // 4):
        expected = values.kthvalue(k, dim=-1, keepdim=True).values
        assert torch.equal(kth_smallest(values, k), expected)
        assert torch.equal(kth_smallest(values[0], k), expected[0])
