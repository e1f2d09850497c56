"""Compiled element-wise code: the same numbers in fewer passes, and plain code where there is no compiler."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from maskft import compiling
from maskft.compiling import compiled, has_compiler
from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK
from maskft.linear import Mask, WeightCache, masked_linear, masked_weight
from maskft.scores import Dense, Layout, LowRank, Parameters

ELEMENTWISE: list[Gate] = [
    Soft(0.98),
    Normalized(0.98),
    Centered(0.5),
    Threshold(0.6),
    Soft(0.9, straight_through=True),
]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def results(mask: Mask, weight: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and the gradients of the scores."""
    x = x.clone().requires_grad_()
    y = masked_linear(x, weight, None, [mask])
    return [y.detach(), *torch.autograd.grad(y, [x, *mask.parameters], dy)]


def example(gate: Gate, layout: Layout, base: torch.dtype, scores: torch.dtype) -> tuple[Mask, Tensor, Tensor, Tensor]:
    weight = torch.randn(24, 40).to(base)
    parameters: Parameters = layout.create(weight.shape, 0.5, device=weight.device, dtype=scores)
    parameters = tuple(p.requires_grad_() for p in parameters)
    return Mask(gate, parameters, layout), weight, torch.randn(2, 3, 40).to(base), torch.randn(2, 3, 24).to(base)


@pytest.mark.parametrize("gate", ELEMENTWISE, ids=repr)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_masks_are_bit_equal_and_gradients_agree(
    gate: Gate, dtypes: tuple[torch.dtype, torch.dtype], cached: bool
) -> None:
    mask, weight, x, dy = example(gate, Dense(), *dtypes)
    fast = Mask(gate, mask.parameters, compiled=True, cache=WeightCache() if cached else None)
    assert fast.fused
    ours, plain = results(fast, weight, x, dy), results(mask, weight, x, dy)
    assert torch.equal(ours[0], plain[0])  # so W' has the same bits
    assert torch.equal(ours[1], plain[1])
    # four factors are multiplied in another order, then rounded to the scores' dtype
    torch.testing.assert_close(ours[2], plain[2], rtol=2**-7 if dtypes[1] == torch.bfloat16 else 1e-5, atol=1e-7)


def test_other_layouts_keep_their_own_gradients() -> None:
    mask, weight, x, dy = example(Soft(0.9), LowRank(3), torch.float32, torch.float32)
    fast = Mask(mask.gate, mask.parameters, mask.layout, compiled=True)
    for ours, plain in zip(results(fast, weight, x, dy), results(mask, weight, x, dy), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_transposed_weight_and_a_quantised_one() -> None:
    mask, weight, x, dy = example(Soft(0.9), Dense(), torch.float32, torch.float32)
    fast = Mask(mask.gate, mask.parameters, compiled=True)
    transposed = weight.T.contiguous().T
    expected = results(mask, weight, x, dy)
    for ours, plain in zip(results(fast, transposed, x, dy), expected, strict=True):
        torch.testing.assert_close(ours, plain)
    y = masked_linear(x, lambda: weight, None, [fast])
    assert torch.equal(y, expected[0])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_rankings_are_compiled_once_for_all_cuts(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for keep_ratio in (0.5, 0.9, 0.5):
        mask, weight, x, dy = example(TopK(keep_ratio), Dense(), *dtypes)
        fast = Mask(mask.gate, mask.parameters, compiled=True)
        assert not fast.fused  # before its cut is found
        with torch.compiler.set_stance("default" if keep_ratio == 0.5 else "fail_on_recompile"):
            ours = results(fast, weight, x, dy)
        plain = results(mask, weight, x, dy)
        assert torch.equal(ours[0], plain[0])
        assert torch.equal(ours[1], plain[1])
        torch.testing.assert_close(ours[2], plain[2], rtol=2**-7 if dtypes[1] == torch.bfloat16 else 1e-5, atol=1e-7)


def test_rankings_with_ties_are_left_as_they_are() -> None:
    weight, x, dy = torch.randn(24, 40), torch.randn(3, 40), torch.randn(3, 24)
    scores = torch.ones(24, 40, requires_grad=True)
    gate = TopK(0.5, magnitude_start=False)
    ours, plain = (results(Mask(gate, (scores,), compiled=fast), weight, x, dy) for fast in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    kept = (masked_linear(torch.eye(40), weight, None, [Mask(gate, (scores,))]) != 0).T
    assert kept.flatten().nonzero().flatten().tolist() == list(range(480))


def test_a_cached_weight_is_made_once_and_follows_its_scores() -> None:
    made = []

    class Counted(Soft):
        def value(self, offset: Tensor, weight: Tensor) -> Tensor:
            made.append(1)
            return super().value(offset, weight)

    _, weight, x, _ = example(Soft(0.9), Dense(), torch.float32, torch.float32)
    scores = torch.zeros(24, 40, requires_grad=True)
    mask = Mask(Counted(0.9), (scores,), cache=WeightCache())
    first = [masked_linear(x, weight, None, [mask]).detach() for _ in range(3)]
    assert len(made) == 1
    assert torch.equal(first[0], first[2])
    with torch.no_grad():
        scores.fill_(1.0)
    after = masked_linear(x, weight, None, [mask])
    torch.testing.assert_close(after, x @ masked_weight(weight, [mask]).T)
    assert not torch.equal(after, first[0])


def test_without_a_compiler_the_code_runs_as_written_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no g++ here\nand more")

    monkeypatch.setattr(compiling.torch, "compile", broken)
    has_compiler.cache_clear()
    try:
        double = compiled(lambda x: x * 2)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
            double(torch.ones(3))
        assert [record.message for record in caplog.records] == [
            "torch.compile does not work here, so masks take more time and memory (no g++ here)"
        ]
    finally:
        has_compiler.cache_clear()


def test_tensors_without_data_are_never_compiled() -> None:
    def shape_of(x: Tensor) -> Tensor:
        assert not torch.compiler.is_compiling()
        return x + 1

    assert compiled(shape_of)(torch.empty(2, 3, device="meta")).shape == (2, 3)
