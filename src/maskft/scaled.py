"""Masks of whole rows or columns, without a masked weight: diag(m) W x = m * (W x), and W diag(m) x = W (m * x).

The weight is read as it is, and nothing of its size is made, forward or backward. A row's mask keeps the output of the
frozen layer for backward, where LoRA keeps the layer's input; so memory is LoRA's, and a step has two products of the
weight's size where a mask of single weights has three.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.gates import Gate


class Gated(torch.autograd.Function):
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


def scaled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate, offset: Tensor, of: Literal["outputs", "inputs"]
) -> Tensor:
    """x (W * m(D))^T + b where m is one number for each output or each input.

    Args:
        x: (..., in).
        weight: W (out, in), frozen, in the dtype of x or another.
        bias: b (out), or None.
        gate: looks at scores alone, not at the weight.
        offset: D, (out, 1) for outputs, (1, in) for inputs, in the dtype to compute the gate in.
        of: what is scaled.

    Returns:
        (..., out) in the dtype of x; products with m are computed in the wider dtype of the two and rounded once.
    """
    m: Tensor = Gated.apply(offset, offset, gate).flatten()  # type: ignore[no-untyped-call]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if of == "inputs":
        return F.linear((x * m).to(x.dtype), weight, bias)
    y = F.linear(x, weight, bias)
    if bias is None:
        return (y * m).to(x.dtype)
    return (y + (y.to(m.dtype) - bias) * (m - 1)).to(x.dtype)  # exactly y where m is 1
