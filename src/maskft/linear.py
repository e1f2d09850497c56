"""masked_linear: y = x (W * m(D))^T + b, keeping only x, W and the scores for backward.

`plain_masked_linear` is the one-line version that autograd differentiates. It defines the truth and keeps the gates
and the masked weight of every layer alive; tests compare the two, forward and every gradient. Several masks multiply.

Shapes: x (..., in), W (out, in), b (out); scores as their layout has them (`maskft.scores`). The gate is computed
in fp32 (or in the dtype of the scores or W, if wider), since bf16 cannot tell 0.998 from 1; the masked weight is
rounded once, to the dtype of x.

A quantised W is given as a function that returns it in full; it is called anew in backward and never kept.

A gate that ranks its scores does so in the forward pass alone: its cut is remembered or, where several scores share
it or there are several, what it keeps, in bits.

With `Mask.compiled` gate, product and gradient are one pass over W and the scores each, instead of one per operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.compiling import compiled
from maskft.gates import AtLeast, Gate, TopK, TopKGlobal
from maskft.packing import from_bits, to_bits
from maskft.scores import Dense, Layout, Parameters

DENSE = Dense()
Weight = Tensor | Callable[[], Tensor]


class ScoreStep(Protocol):
    """Updates scores in the backward pass from the gradient of the masked weight."""

    def takes(self) -> bool:
        """Whether it makes the step of this backward pass."""
        ...

    def __call__(self, mask: Mask, weight: Tensor, dmasked: Tensor) -> Tensor:
        """Make it.

        Args:
            mask: with dense scores (out, in), which are changed in place.
            weight: W (out, in).
            dmasked: dL/dW' (out, in).

        Returns:
            W' of the scores before the step, in the dtype of `dmasked`.
        """
        ...


class WeightCache:
    """A masked weight, kept for as long as its scores stay as they are.

    Whoever changes scores must see to it that autograd counts it: fused optimizers don't, see
    `maskft.memory.cache_weights`.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._kept: Tensor | None = None

    def get(self, mask: Mask, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W' of this mask, in `dtype`."""
        state = [(p.data_ptr(), p._version) for p in (weight, *mask.parameters)]
        if self._kept is None or self._key != (mask.gate, dtype, state):
            self._key, self._kept = (mask.gate, dtype, state), _masked(mask, weight, dtype)
        return self._kept


@dataclass(frozen=True)
class Mask:
    """One mask of one weight.

    Attributes:
        gate: what turns offsets into m.
        parameters: the learnt scores.
        layout: what turns the scores into offsets D.
        compiled: compute by compiled code, where the gate looks at each entry alone.
        cache: keeps the masked weight until the scores change.
        step: makes the optimizer's step on the scores inside the backward pass, in place of a gradient.
    """

    gate: Gate
    parameters: Parameters
    layout: Layout = DENSE
    compiled: bool = False
    cache: WeightCache | None = None
    step: ScoreStep | None = None

    @property
    def elementwise(self) -> bool:
        """Whether the gate looks at each entry alone."""
        return getattr(self.gate, "elementwise", False)

    @property
    def ranked(self) -> bool:
        """Whether to find out what is kept takes longer than to remember it, in a bit for each weight."""
        return getattr(self.gate, "hard", False) and not self.elementwise

    @property
    def fused(self) -> bool:
        """Whether the compiled code serves this mask."""
        return self.compiled and self.elementwise

    def raw_offset(self, weight: Tensor) -> Tensor:
        """D, in the dtype it is kept in."""
        return self.parameters[0] if isinstance(self.layout, Dense) else self.offset(weight)

    def offset(self, weight: Tensor) -> Tensor:
        """D, in the dtype to compute the gate in; not to be changed in place."""
        dtypes = [parameter.dtype for parameter in self.parameters] + [weight.dtype]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return self.layout.offset(tuple(p.to(wide) for p in self.parameters), weight.shape)

    def gradients(self, offset: Tensor, weight: Tensor, m: Tensor | None, *dm: Tensor) -> list[Tensor]:
        """Gradients of the parameters; that of m, where it is known, is the product of the factors `dm`."""
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
    y: Tensor = _MaskedLinear.apply(x, weight, bias, replace(mask, parameters=()), *mask.parameters)  # type: ignore[no-untyped-call]
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
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, mask: Mask, *parameters: Tensor) -> Tensor:
        ctx.kept = isinstance(weight, Tensor)
        ctx.weight = None if ctx.kept else weight
        frozen = weight if isinstance(weight, Tensor) else weight()
        mask = _settled(replace(mask, parameters=parameters), frozen)
        if ranked := mask.ranked and mask.cache is None and any(ctx.needs_input_grad):
            kept = mask.gate.value(mask.offset(frozen), frozen).bool()
            masked = _cut(frozen, kept, x.dtype)
        else:
            masked = masked_matrix(mask, frozen, x.dtype)
        ctx.mask, ctx.ranked = replace(mask, parameters=()), ranked
        ctx.save_for_backward(x, *([frozen] if ctx.kept else []), *([to_bits(kept)] if ranked else []), *parameters)
        # data: of more than two dimensions the result is a view, which callers could not change in place
        return F.linear(x, _ordered(masked, frozen), _like(bias, x)).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weight = parameters.pop(0) if ctx.kept else ctx.weight()
        bits = parameters.pop(0) if ctx.ranked else None
        mask, dy = replace(ctx.mask, parameters=tuple(parameters)), grads[0].reshape(-1, grads[0].shape[-1])
        masked = None if mask.cache is None else masked_matrix(mask, weight, dy.dtype)
        if bits is not None:
            masked = _cut(weight, from_bits(bits), dy.dtype)
        scores: list[Tensor | None] = [None] * len(parameters)
        if any(ctx.needs_input_grad[4:]):
            dmasked = dy.T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)
            if mask.step is not None and mask.elementwise and mask.step.takes():
                masked = mask.step(mask, weight, dmasked)
            else:
                masked, gradients = _masked_and_gradients(mask, weight, dmasked, masked)
                scores = [*gradients]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ (_masked(mask, weight, dy.dtype) if masked is None else masked)).view(x.shape)
        return dx, None, None, None, *scores


def masked_matrix(mask: Mask, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W' (out, in) in `dtype`, from the mask's cache where it has one; without a gradient, and not to be changed."""
    return _masked(mask, weight, dtype) if mask.cache is None else mask.cache.get(mask, weight, dtype)


def _masked(mask: Mask, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W' in `dtype`."""
    if mask.fused:
        flat, offset = _flat(weight, mask.raw_offset(weight))
        return _product(flat, offset, mask.gate, dtype).view(weight.shape)
    return mask.gate.value(mask.offset(weight), weight).mul_(weight).to(dtype)


def score_sizes(mask: Mask, weight: Tensor) -> Tensor:
    """|S| of a mask with the gate `AtLeast`, of W's shape or flat, in the dtype of the gate; a tensor of its own."""
    assert isinstance(mask.gate, AtLeast)
    if not mask.compiled or weight.dim() != 2:
        return mask.gate.score(mask.offset(weight), weight).abs()
    flat, offset = _flat(weight, mask.raw_offset(weight))
    return _sizes(flat, offset, mask.gate)


def _settled(mask: Mask, weight: Tensor) -> Mask:
    """The mask with its ranking's cut, where that tells all and there is no cache, which knows gates by settings."""
    if not isinstance(mask.gate, TopK | TopKGlobal) or mask.cache is not None:
        return mask
    gate = mask.gate.settled(weight, lambda gate: score_sizes(replace(mask, gate=gate), weight))
    return mask if gate is None else replace(mask, gate=gate)


def _masked_and_gradients(
    mask: Mask, weight: Tensor, dmasked: Tensor, masked: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """W' in the dtype of its gradient `dmasked`, if it isn't given, and the gradients of the parameters."""
    if not mask.fused:
        offset = mask.offset(weight)
        if masked is not None:
            return masked, mask.gradients(offset, weight, None, weight, dmasked)
        m = mask.gate.value(offset, weight)
        gradients = mask.gradients(offset, weight, m, weight, dmasked)
        return m.mul_(weight).to(dmasked.dtype), gradients
    dflat, flat, offset = _flat(dmasked, weight, mask.raw_offset(weight))
    if masked is None:
        masked, doffset = _product_and_gradient(dflat, flat, offset, mask.gate)
    else:
        doffset = _gradient(dflat, flat, offset, mask.gate)
    return masked.view(weight.shape), [*mask.layout.gradients(doffset.view(weight.shape), mask.parameters)]


@compiled
def _sizes(weight: Tensor, offset: Tensor, gate: AtLeast) -> Tensor:
    return gate.score(_wide(offset, weight), weight).abs()


@compiled
def _product(weight: Tensor, offset: Tensor, gate: Gate, dtype: torch.dtype) -> Tensor:
    """W * m(D), rounded once."""
    return (gate.value(_wide(offset, weight), weight) * weight).to(dtype)


@compiled
def _gradient(dmasked: Tensor, weight: Tensor, offset: Tensor, gate: Gate) -> Tensor:
    """dL/dD, in the dtype of D; in the memory of dL/dW' where that has the same dtype."""
    return _into(dmasked, (gate.derivative(_wide(offset, weight), weight) * weight * dmasked).to(offset.dtype))


@compiled
def _product_and_gradient(dmasked: Tensor, weight: Tensor, offset: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Both of the above; W' in the dtype of dL/dW'."""
    masked, doffset = masked_and_gradient(dmasked, weight, offset, gate)
    return masked, _into(dmasked, doffset.to(offset.dtype))


def masked_and_gradient(dmasked: Tensor, weight: Tensor, offset: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """W' in the dtype of its gradient dL/dW', and dL/dD in that of the gate; all of one shape."""
    wide = _wide(offset, weight)
    m = gate.value(wide, weight)
    return (m * weight).to(dmasked.dtype), gate.derivative(wide, weight, m) * weight * dmasked


def _cut(weight: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """W' in `dtype` of a binary mask, whose entries come flat or in W's shape, with spare ones at their end or none."""
    return (weight * kept.flatten()[: weight.numel()].view_as(weight).to(weight.dtype)).to(dtype)


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as vectors, so that code compiled for one shape serves all, where they lie alike in memory."""
    return tuple(t.view(-1) for t in tensors) if all(t.is_contiguous() for t in tensors) else tensors


def _wide(offset: Tensor, weight: Tensor) -> Tensor:
    """D in the dtype to compute gates in."""
    return offset.to(torch.float64 if torch.float64 in (offset.dtype, weight.dtype) else torch.float32)


def _into(buffer: Tensor, value: Tensor) -> Tensor:
    return buffer.copy_(value) if buffer.dtype == value.dtype else value


def _ordered(masked: Tensor, weight: Tensor) -> Tensor:
    """A masked weight (out, in) that lies in memory as W does, so that its products are summed as those of W."""
    return masked if masked.stride() == weight.stride() else masked.mT.contiguous().mT


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
