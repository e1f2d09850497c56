"""Layouts of scores: shapes, starts, and gradients against autograd's."""

from __future__ import annotations

import pytest
import torch

from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK
from maskft.linear import Mask, masked_linear, masked_weight, plain_masked_linear
from maskft.scores import PUBLISHED_STD, Block, Column, Dense, Layout, LowRank, Row

LAYOUTS: list[Layout] = [Dense(), LowRank(1), LowRank(3), Row(), Column(), Block(1), Block(2), Block(4), Block(9)]
SOFT: list[Gate] = [Soft(0.9, 0.5), Normalized(0.9, 0.5), Centered(0.7)]
HARD: list[Gate] = [Soft(0.9, straight_through=True), TopK(0.6), TopK(0.6, slices=(2, 3)), Threshold(0.6)]
SHAPES = [(5, 7), (1, 1), (4, 4), (3, 5, 7)]
SPOT = {"device": torch.device("cpu"), "dtype": torch.float64}

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def scattered(layout: Layout, shape: tuple[int, ...] = (5, 7)) -> tuple[torch.Tensor, ...]:
    """Parameters off the start, that want a gradient."""
    return tuple(torch.randn_like(p).requires_grad_() for p in layout.create(torch.Size(shape), 0.0, **SPOT))


@each_layout
@each_shape
class TestOffsets:
    def test_start_at_zero(self, layout: Layout, shape: tuple[int, ...]) -> None:
        parameters = layout.create(torch.Size(shape), 0.0, **SPOT)
        assert len(parameters) == len(layout.names)
        assert all(p.dtype == torch.float64 for p in parameters)
        assert torch.equal(layout.offset(parameters, torch.Size(shape)), torch.zeros(shape, dtype=torch.float64))

    def test_have_the_weights_shape(self, layout: Layout, shape: tuple[int, ...]) -> None:
        assert layout.offset(scattered(layout, shape), torch.Size(shape)).shape == shape

    def test_gradients_are_those_of_autograd(self, layout: Layout, shape: tuple[int, ...]) -> None:
        parameters = scattered(layout, shape)
        offset = layout.offset(parameters, torch.Size(shape))
        doffset = torch.randn_like(offset)
        expected = torch.autograd.grad(offset, parameters, doffset)
        for ours, theirs, parameter in zip(layout.gradients(doffset, parameters), expected, parameters, strict=True):
            assert ours.shape == parameter.shape
            torch.testing.assert_close(ours, theirs)


@each_layout
def test_random_offsets_have_the_asked_spread(layout: Layout) -> None:
    shape = torch.Size([300, 300])
    offset = layout.offset(layout.create(shape, PUBLISHED_STD, **SPOT), shape)
    # a low-rank product is spread as its factors' random sizes have it, and a coarse block has few draws
    assert offset.std().item() == pytest.approx(PUBLISHED_STD, rel=0.4 if layout == LowRank(1) else 0.2)


def test_shared_scores() -> None:
    shape = torch.Size([2, 3])
    row = torch.tensor([[1.0], [2.0]])
    assert Row().offset((row,), shape).tolist() == [[1, 1, 1], [2, 2, 2]]
    column = torch.tensor([[1.0, 2.0, 3.0]])
    assert Column().offset((column,), shape).tolist() == [[1, 2, 3], [1, 2, 3]]
    block = torch.tensor([[1.0, 2.0]])
    assert Block(2).offset((block,), shape).tolist() == [[1, 1, 2], [1, 1, 2]]
    assert LowRank(1).offset((row, column), shape).tolist() == [[1, 2, 3], [2, 4, 6]]


@each_layout
@pytest.mark.parametrize("gate", SOFT, ids=repr)
def test_gradcheck(layout: Layout, gate: Gate) -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def fast(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return masked_linear(x, weight, bias, [Mask(gate, parameters, layout)])

    def two_masks(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return masked_linear(x, weight, bias, [Mask(gate, parameters, layout), Mask(Centered(), parameters, layout)])

    parameters = scattered(layout)
    assert torch.autograd.gradcheck(fast, (x, *parameters))
    assert torch.autograd.gradcheck(two_masks, (x, *parameters))


@each_layout
@pytest.mark.parametrize("gate", [*SOFT, *HARD], ids=repr)
def test_fast_and_plain_paths_agree(layout: Layout, gate: Gate) -> None:
    x = torch.randn(2, 3, 7, requires_grad=True)
    weight, dy = torch.randn(5, 7), torch.randn(2, 3, 5)
    parameters = tuple(p.detach().float().requires_grad_() for p in scattered(layout))
    masks = [Mask(gate, parameters, layout)]
    fast, plain = masked_linear(x, weight, None, masks), plain_masked_linear(x, weight, None, masks)
    assert torch.equal(fast, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, [x, *parameters], dy), torch.autograd.grad(plain, [x, *parameters], dy), strict=True
    ):
        # sums of up to 35 products in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", HARD, ids=repr)
def test_straight_through_gradients_written_out(gate: Gate) -> None:
    weight, offset = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    dmasked = torch.randn(5, 7)
    (given,) = torch.autograd.grad(masked_weight(weight, [Mask(gate, (offset,))]), [offset], dmasked)
    scores = gate.score(offset, weight).sign() if isinstance(gate, TopK) else torch.ones(5, 7)
    torch.testing.assert_close(given, dmasked * weight * scores)


@pytest.mark.parametrize("gate", [TopK(0.5), Centered()], ids=repr)
def test_several_masks_see_the_frozen_weight(gate: Gate) -> None:
    weight, first, second = torch.randn(5, 7), torch.randn(5, 7), torch.randn(5, 7)
    both = masked_weight(weight, [Mask(Centered(), (first,)), Mask(gate, (second,))])
    torch.testing.assert_close(both, weight * Centered().value(first, weight) * gate.value(second, weight))


def test_a_weight_given_as_a_function_is_read_anew_and_not_kept() -> None:
    reads = []
    weight = torch.randn(5, 7)

    def read() -> torch.Tensor:
        reads.append(1)
        return weight.clone()

    x = torch.randn(4, 7, requires_grad=True)
    offset = torch.randn(5, 7, requires_grad=True)
    masks = [Mask(Normalized(0.9), (offset,))]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = masked_linear(x, read, None, masks)
    assert [t.shape for t in kept] == [x.shape, offset.shape]
    expected = masked_linear(x, weight, None, masks)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), [x, offset]), torch.autograd.grad(expected.sum(), [x, offset]), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert len(reads) == 2


def test_gradients_have_the_scores_dtype() -> None:
    scores = torch.randn(5, 7, dtype=torch.bfloat16, requires_grad=True)
    masked_linear(torch.randn(3, 7), torch.randn(5, 7), None, [Mask(Centered(), (scores,))]).sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == torch.bfloat16
