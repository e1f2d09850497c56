"""masked_linear: y = x (W * m(D))^T + b, keeping only x, W and the offsets D for backward.

`plain_masked_linear` is the one-line version that autograd differentiates. It defines the truth, takes several masks
at once (they multiply), and keeps the gates and the masked weight of every layer alive; tests compare the two,
forward and every gradient.

Shapes: x (..., in), W and D (out, in), b (out). The gate is computed in fp32 (or in the dtype of D or W, if
wider), since bf16 cannot tell 0.998 from 1; the masked weight is rounded once, to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.gates import Gate

Mask = tuple[Tensor, Gate]
"""Offsets D (out, in) and the gate that turns them into m."""


def masked_weight(weight: Tensor, masks: Sequence[Mask]) -> Tensor:
    """W' = W * m_1(D_1) * m_2(D_2) ..., (out, in), in the dtype of the gates (at least fp32)."""
    product = weight
    for offset, gate in masks:
        product = gate.value(_wide(offset, weight), weight).mul_(product)
    return product


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
    """x (W * m(D))^T + b in the dtype of x; see the module's docstring."""
    y: Tensor = _MaskedLinear.apply(x, weight, bias, *mask)  # type: ignore[no-untyped-call]
    return y


def plain_masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, masks: Sequence[Mask]) -> Tensor:
    """The same for any number of masks, by autograd alone."""
    product = weight
    for offset, gate in masks:
        product = _Gated.apply(_wide(offset, weight), weight, gate) * product  # type: ignore[no-untyped-call]
    return F.linear(x, product.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Gated(torch.autograd.Function):
    """m(D) whose derivative is the gate's own, exact or straight-through."""

    @staticmethod
    def forward(ctx: Any, offset: Tensor, weight: Tensor, gate: Gate) -> Tensor:
        ctx.save_for_backward(offset, weight)
        ctx.gate = gate
        return gate.value(offset, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        offset, weight = ctx.saved_tensors
        return grads[0] * ctx.gate.derivative(offset, weight), None, None


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, gate: Gate) -> Tensor:
        ctx.save_for_backward(x, weight, offset)
        ctx.gate = gate
        masked = masked_weight(weight, [(offset, gate)]).to(x.dtype)
        return F.linear(x, masked, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        x, weight, offset = ctx.saved_tensors
        dy, d = grads[0], _wide(offset, weight)
        m = ctx.gate.value(d, weight)
        dx = doffset = None
        if ctx.needs_input_grad[3]:
            dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)
            doffset = ctx.gate.derivative(d, weight, m).mul_(weight).mul_(dweight).to(offset.dtype)
        if ctx.needs_input_grad[0]:
            dx = dy @ m.mul_(weight).to(dy.dtype)
        return dx, None, None, doffset, None


def _wide(offset: Tensor, weight: Tensor) -> Tensor:
    """D in the dtype to compute the gate in."""
    return offset.to(torch.promote_types(torch.promote_types(offset.dtype, weight.dtype), torch.float32))
