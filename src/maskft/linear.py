"""masked_linear: y = x (W * m(D))^T + b, keeping only x, W and the scores for backward.

`plain_masked_linear` is the one-line version that autograd differentiates. It defines the truth and keeps the gates
and the masked weight of every layer alive; tests compare the two, forward and every gradient. Several masks multiply.

Shapes: x (..., in), W (out, in), b (out); scores as their layout has them (`maskft.scores`). The gate is computed
in fp32 (or in the dtype of the scores or W, if wider), since bf16 cannot tell 0.998 from 1; the masked weight is
rounded once, to the dtype of x.

A quantised W is given as a function that returns it in full; it is called anew in backward and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.gates import Gate
from maskft.scores import Dense, Layout, Parameters

DENSE = Dense()
Weight = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Mask:
    """One mask of one weight.

    Attributes:
        gate: what turns offsets into m.
        parameters: the learnt scores.
        layout: what turns the scores into offsets D.
    """

    gate: Gate
    parameters: Parameters
    layout: Layout = DENSE

    def offset(self, weight: Tensor) -> Tensor:
        """D, in the dtype to compute the gate in; not to be changed in place."""
        dtypes = [parameter.dtype for parameter in self.parameters] + [weight.dtype]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return self.layout.offset(tuple(p.to(wide) for p in self.parameters), weight.shape)

    def gradients(self, offset: Tensor, weight: Tensor, m: Tensor, *dm: Tensor) -> list[Tensor]:
        """Gradients of the parameters; that of m is the product of the factors `dm`."""
        doffset = self.gate.derivative(offset, weight, m)
        for factor in dm:
            doffset.mul_(factor)
        gradients = self.layout.gradients(doffset, self.parameters)
        return [g.to(p.dtype) for g, p in zip(gradients, self.parameters, strict=True)]


def masked_weight(weight: Weight, masks: Sequence[Mask]) -> Tensor:
    """W' = W * m_1(D_1) * m_2(D_2) ..., (..., out, in), in the dtype of the gates (at least fp32)."""
    frozen = weight if isinstance(weight, Tensor) else weight()
    product = frozen
    for mask in masks:
        before = None if product is frozen else product  # torch.compile wants each tensor once
        product = _Masked.apply(before, frozen, mask.gate, mask.layout, *mask.parameters)  # type: ignore[no-untyped-call]
    return product


def masked_linear(x: Tensor, weight: Weight, bias: Tensor | None, masks: Sequence[Mask]) -> Tensor:
    """x (W * m(D))^T + b in the dtype of x; see the module's docstring."""
    if len(masks) != 1:
        masked = masked_weight(weight, masks).to(x.dtype)
        return F.linear(x, _ordered(masked, weight) if isinstance(weight, Tensor) else masked, _like(bias, x))
    mask = masks[0]
    y: Tensor = _MaskedLinear.apply(x, weight, bias, mask.gate, mask.layout, *mask.parameters)  # type: ignore[no-untyped-call]
    return y


def plain_masked_weight(weight: Tensor, masks: Sequence[Mask]) -> Tensor:
    """`masked_weight` by autograd alone."""
    product = weight
    for mask in masks:
        product = _Gated.apply(mask.offset(weight), weight, mask.gate) * product  # type: ignore[no-untyped-call]
    return product


def plain_masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, masks: Sequence[Mask]) -> Tensor:
    """`masked_linear` by autograd alone."""
    return F.linear(x, plain_masked_weight(weight, masks).to(x.dtype), _like(bias, x))


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


class _Masked(torch.autograd.Function):
    """product * m(D), keeping the product, W and the scores; the product is what other masks made of W, or None: W."""

    @staticmethod
    def forward(
        ctx: Any, product: Tensor | None, weight: Tensor, gate: Gate, layout: Layout, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(product, weight, *parameters)
        ctx.gate, ctx.layout = gate, layout
        m = gate.value(Mask(gate, parameters, layout).offset(weight), weight)
        return m.mul_(weight if product is None else product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        product, weight, *parameters = ctx.saved_tensors
        mask = Mask(ctx.gate, tuple(parameters), ctx.layout)
        offset = mask.offset(weight)
        m = mask.gate.value(offset, weight)
        scores: list[Tensor | None] = [None] * len(parameters)
        if any(ctx.needs_input_grad[4:]):
            scores = [*mask.gradients(offset, weight, m, weight if product is None else product, grads[0])]
        dproduct = m.mul_(grads[0]).to(product.dtype) if ctx.needs_input_grad[0] else None
        return dproduct, None, None, None, *scores


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, gate: Gate, layout: Layout, *parameters: Tensor
    ) -> Tensor:
        ctx.kept, ctx.gate, ctx.layout = isinstance(weight, Tensor), gate, layout
        ctx.weight = None if ctx.kept else weight
        ctx.save_for_backward(x, *([weight] if isinstance(weight, Tensor) else []), *parameters)
        frozen = weight if isinstance(weight, Tensor) else weight()
        masked = gate.value(Mask(gate, parameters, layout).offset(frozen), frozen).mul_(frozen)
        # data: of more than two dimensions the result is a view, which callers could not change in place
        return F.linear(x, _ordered(masked.to(x.dtype), frozen), _like(bias, x)).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weight = parameters.pop(0) if ctx.kept else ctx.weight()
        mask = Mask(ctx.gate, tuple(parameters), ctx.layout)
        dy, offset = grads[0], mask.offset(weight)
        m = mask.gate.value(offset, weight)
        dx = None
        scores: list[Tensor | None] = [None] * len(parameters)
        if any(ctx.needs_input_grad[5:]):
            dmasked = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)
            scores = [*mask.gradients(offset, weight, m, weight, dmasked)]
        if ctx.needs_input_grad[0]:
            dx = dy @ m.mul_(weight).to(dy.dtype)
        return dx, None, None, None, None, *scores


def _ordered(masked: Tensor, weight: Tensor) -> Tensor:
    """A masked weight (out, in) that lies in memory as W does, so that its products are summed as those of W."""
    return masked if masked.stride() == weight.stride() else masked.mT.contiguous().mT


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
