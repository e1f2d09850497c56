"""masked_linear against plain_masked_linear: forward, every gradient, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK
from maskft.linear import Mask, masked_linear, masked_weight, plain_masked_linear

GATES: list[Gate] = [
    Soft(0.9, 0.5),
    Soft(0.9, 0.5, straight_through=True),
    Normalized(0.9, 0.5),
    Normalized(0.9, 0.5, straight_through=True),
    Centered(0.7),
    Centered(0.7, straight_through=True),
    TopK(0.6),
    TopK(0.6, magnitude_start=False),
    TopK(0.6, straight_through=True),
    Threshold(0.6, 0.5),
]
EXACT = [gate for gate in GATES if isinstance(gate, Soft | Normalized | Centered) and not gate.straight_through]
BATCHES = [(), (1,), (4,), (2, 3), (2, 1, 3), (2, 2, 2, 2)]


def mask(offset: Tensor, gate: Gate) -> Mask:
    return Mask(gate, (offset,))


def inputs(
    batch: tuple[int, ...] = (4,),
    shape: tuple[int, int] = (5, 7),
    dtype: torch.dtype = torch.float32,
    offset_dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, frozen W and b, offsets."""
    out, width = shape
    x = torch.randn(*batch, width, dtype=dtype).requires_grad_()
    weight = torch.randn(out, width, dtype=dtype)
    return (
        x,
        weight,
        torch.randn(out, dtype=dtype) if bias else None,
        torch.randn(out, width, dtype=offset_dtype).requires_grad_(),
    )


def both(
    x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, gate: Gate
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(y, dx, doffset) of the fast and of the plain version, for the same incoming gradient."""
    results = []
    dy = None
    for fast in (True, False):
        y = (
            masked_linear(x, weight, bias, [mask(offset, gate)])
            if fast
            else plain_masked_linear(x, weight, bias, [mask(offset, gate)])
        )
        dy = torch.randn_like(y) if dy is None else dy
        results.append((y.detach(), *torch.autograd.grad(y, [x, offset], dy)))
    return results


def assert_same(results: list[tuple[Tensor, Tensor, Tensor]], **tolerance: float) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, **tolerance)


@pytest.mark.parametrize("gate", GATES, ids=repr)
class TestAgainstThePlainVersion:
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_batch_shapes(self, gate: Gate, batch: tuple[int, ...], bias: bool) -> None:
        # the order of three products differs, a few units of fp32's 6e-8
        assert_same(both(*inputs(batch, bias=bias), gate), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 17), (31, 2)], ids=str)
    def test_odd_shapes(self, gate: Gate, shape: tuple[int, int]) -> None:
        assert_same(both(*inputs((2, 3), shape), gate), rtol=1e-5, atol=1e-6)

    def test_fp64_throughout(self, gate: Gate) -> None:
        results = both(*inputs((2, 3), dtype=torch.float64, offset_dtype=torch.float64), gate)
        assert_same(results, rtol=1e-13, atol=1e-14)
        assert all(tensor.dtype == torch.float64 for tensor in results[0])

    def test_fp64_base_with_fp32_offsets(self, gate: Gate) -> None:
        # fast rounds the gate's derivative to fp32 where the plain version rounds the finished gradient
        assert_same(both(*inputs((2, 3), dtype=torch.float64), gate), rtol=1e-5, atol=1e-6)

    def test_bf16_base_with_fp32_offsets(self, gate: Gate) -> None:
        results = both(*inputs((2, 3), dtype=torch.bfloat16), gate)
        assert [tensor.dtype for tensor in results[0]] == [torch.bfloat16, torch.bfloat16, torch.float32]
        # both round W', y, dx and dy^T x to bf16 once, at the same places: what is left is the fp32 products' order
        # and, where that falls on an edge, one bf16 step (2^-8)
        assert_same(results, rtol=2**-8, atol=1e-3)

    def test_bf16_offsets(self, gate: Gate) -> None:
        results = both(*inputs((2, 3), dtype=torch.bfloat16, offset_dtype=torch.bfloat16), gate)
        assert results[0][2].dtype == torch.bfloat16
        # both compute the gate in fp32 and round the finished gradient once to bf16
        assert_same(results, rtol=2**-7, atol=1e-3)

    def test_fp32_input_on_a_bf16_base(self, gate: Gate) -> None:
        _, weight, bias, offset = inputs(dtype=torch.bfloat16)
        x = torch.randn(4, 7, requires_grad=True)
        results = both(x, weight, bias, offset, gate)
        assert results[0][0].dtype == torch.float32
        assert_same(results, rtol=1e-5, atol=1e-6)

    def test_under_autocast(self, gate: Gate) -> None:
        x, weight, bias, offset = inputs((2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            fast = masked_linear(x, weight, bias, [mask(offset, gate)])
            plain = plain_masked_linear(x, weight, bias, [mask(offset, gate)])
        assert fast.dtype == plain.dtype == torch.bfloat16
        assert torch.equal(fast, plain)
        dy = torch.randn_like(fast)
        results = [torch.autograd.grad(y, [x, offset], dy) for y in (fast, plain)]
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype == torch.float32
            # matrix products in bf16, 2^-8 each; the two round x and dx at different places
            torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)

    def test_input_that_is_not_contiguous(self, gate: Gate) -> None:
        _, weight, bias, offset = inputs()
        for x in (torch.randn(7, 4).T, torch.randn(3, 7, 2).transpose(1, 2), torch.randn(4, 14)[:, ::2]):
            assert not x.is_contiguous()
            assert_same(both(x.detach().requires_grad_(), weight, bias, offset, gate), rtol=1e-5, atol=1e-6)

    def test_weight_that_is_not_contiguous(self, gate: Gate) -> None:
        x, _, bias, offset = inputs()
        weight = torch.randn(7, 5).T
        assert_same(both(x, weight, bias, offset, gate), rtol=1e-5, atol=1e-6)

    def test_gradient_that_is_expanded(self, gate: Gate) -> None:
        x, weight, bias, offset = inputs((2, 3))
        grads = [
            torch.autograd.grad(y.sum(), [x, offset])  # the gradient of a sum is a scalar, expanded
            for y in (
                masked_linear(x, weight, bias, [mask(offset, gate)]),
                plain_masked_linear(x, weight, bias, [mask(offset, gate)]),
            )
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_plain_is_the_textbook_product(self, gate: Gate) -> None:
        x, weight, bias, offset = inputs()
        expected = x @ (gate.value(offset, weight) * weight).T + bias
        torch.testing.assert_close(plain_masked_linear(x, weight, bias, [mask(offset, gate)]), expected)

    def test_saves_x_weight_and_offsets_and_nothing_else(self, gate: Gate) -> None:
        x, weight, bias, offset = inputs((2, 3))
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            masked_linear(x, weight, bias, [mask(offset, gate)])
        assert [tensor.data_ptr() for tensor in saved] == [t.data_ptr() for t in (x, weight, offset)]

    def test_saves_the_same_three_on_a_bf16_base(self, gate: Gate) -> None:
        x, weight, bias, offset = inputs((2, 3), dtype=torch.bfloat16)
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            masked_linear(x, weight, bias, [mask(offset, gate)])
        assert [tensor.dtype for tensor in saved] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("gate", EXACT, ids=repr)
@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=str)
def test_gradcheck_of_the_exact_gates(gate: Gate, batch: tuple[int, ...]) -> None:
    x, weight, bias, offset = inputs(batch, (3, 4), torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: masked_linear(a, weight, bias, [mask(b, gate)]), (x, offset))
    assert torch.autograd.gradcheck(lambda a, b: plain_masked_linear(a, weight, bias, [mask(b, gate)]), (x, offset))


@pytest.mark.parametrize("gate", EXACT, ids=repr)
def test_gradcheck_of_two_masks(gate: Gate) -> None:
    x, weight, bias, offset = inputs((2,), (3, 4), torch.float64, torch.float64)
    other = torch.randn_like(offset).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, c: plain_masked_linear(a, weight, bias, [mask(b, gate), mask(c, Centered())]), (x, offset, other)
    )


def test_masks_multiply() -> None:
    x, weight, bias, _ = inputs()
    # T = 1, m0 = 1/2: gates of sigmoid(ln 3) = 3/4 and 2 sigmoid(-ln 3) = 1/2
    three_quarters = mask(torch.full((5, 7), 3.0).log(), Soft(0.5))
    half = mask(-torch.full((5, 7), 3.0).log(), Centered())
    y = plain_masked_linear(x, weight, bias, [three_quarters, half])
    torch.testing.assert_close(y, x @ (weight * 0.375).T + bias)
    torch.testing.assert_close(masked_weight(weight, [three_quarters, half]), weight * 0.375)


def test_no_mask_leaves_the_weight() -> None:
    x, weight, bias, _ = inputs()
    assert masked_weight(weight, []) is weight
    assert torch.equal(plain_masked_linear(x, weight, bias, []), torch.nn.functional.linear(x, weight, bias))


def test_masked_weight_is_computed_in_fp32_at_least() -> None:
    weight, offset = torch.randn(3, 3).bfloat16(), torch.zeros(3, 3).bfloat16()
    assert masked_weight(weight, [mask(offset, Centered())]).dtype == torch.float32
    assert masked_weight(weight.double(), [mask(offset, Centered())]).dtype == torch.float64
    # bf16 would round 0.998 to 1
    gate = Soft(0.998)
    assert (masked_weight(torch.ones(1, 1).bfloat16(), [mask(torch.zeros(1, 1), gate)]) < 1).all()


@pytest.mark.parametrize("gate", [Normalized(0.98), Centered(), Threshold(0.98)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_offsets_are_bit_equal_to_the_frozen_layer(gate: Gate, dtype: torch.dtype) -> None:
    x, weight, bias, _ = inputs((2, 3), dtype=dtype)
    y = masked_linear(x, weight, bias, [mask(torch.zeros(5, 7), gate)])
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate", GATES, ids=repr)
@pytest.mark.parametrize(("wanted", "products"), [(("x", "offset"), 2), (("offset",), 1), (("x",), 1)], ids=str)
def test_only_wanted_gradients_are_computed(gate: Gate, wanted: tuple[str, ...], products: int) -> None:
    x, weight, bias, offset = inputs()
    x.requires_grad_("x" in wanted)
    offset.requires_grad_("offset" in wanted)
    y = masked_linear(x, weight, bias, [mask(offset, gate)])
    with Products() as counted:
        y.backward(torch.ones_like(y))
    assert counted.count == products
    assert (x.grad is not None) == ("x" in wanted)
    assert (offset.grad is not None) == ("offset" in wanted)


def test_frozen_weight_and_bias_get_no_gradient() -> None:
    x, weight, bias, offset = inputs()
    masked_linear(x, weight, bias, [mask(offset, Centered())]).sum().backward()
    assert weight.grad is None
    assert bias is not None
    assert bias.grad is None


def test_empty_batch() -> None:
    x, weight, bias, offset = inputs((0,))
    y = masked_linear(x, weight, bias, [mask(offset, Centered())])
    assert y.shape == (0, 5)
    y.sum().backward()
    assert torch.equal(offset.grad, torch.zeros(5, 7))


@pytest.mark.parametrize("shape", [(3, 5), (4, 16)], ids=str)
def test_what_is_ranked_with_ties_is_ranked_once_and_remembered_in_bits(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias, _ = inputs((2,), shape)
    offset = torch.ones(shape).requires_grad_()
    ranked: list[torch.Size] = []
    value = TopK.value
    monkeypatch.setattr(TopK, "value", lambda gate, d, w: ranked.append(d.shape) or value(gate, d, w))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = masked_linear(x, weight, bias, [mask(offset, TopK(0.5, magnitude_start=False))])
    y.sum().backward()
    assert ranked == [weight.shape]
    assert [t.numel() for t in saved if t.dtype == torch.uint8] == [-(-weight.numel() // 8)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("magnitude_start", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_what_is_ranked_without_ties_is_remembered_by_its_cut(
    compiled: bool, magnitude_start: bool, straight_through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = TopK(0.9, magnitude_start, straight_through=straight_through)
    x, weight, bias, offset = inputs((2,), (24, 40), dtype=torch.bfloat16)
    y = plain_masked_linear(x, weight, bias, [mask(offset, gate)])
    dy = torch.randn_like(y)
    expected = [y.detach(), *torch.autograd.grad(y, [x, offset], dy)]
    kept = int(gate.value(offset, weight).sum())
    monkeypatch.delattr(TopK, "value")
    y = masked_linear(x, weight, bias, [Mask(gate, (offset,), compiled=compiled)])
    dx, doffset = torch.autograd.grad(y, [x, offset], dy)
    assert kept == round(0.9 * weight.numel())
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1])
    torch.testing.assert_close(doffset, expected[2], rtol=2**-7, atol=1e-7)  # dL/dW' is rounded to bf16
