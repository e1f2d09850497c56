"""The method: a frozen weight W is multiplied by a gate m, W' = W * m, and only the gate's score is learnt.

A score is kept as its offset D from the start, S = start + D with D = 0 before training. So a gate is a pure
function of the offset (and, where the start depends on it, of the frozen weight), with a derivative:

    soft        m = sigmoid(S/T)                   published S-MFT [1]; starts at m0 = `init_gate`
    normalized  m = sigmoid(S/T) / m0              starts at exactly 1, range (0, 1/m0)
    centered    m = 2 sigmoid(S/T)                 starts at exactly 1, range (0, 2); S starts at 0
    topk        m = 1 if |S| is among the round(keep_ratio * n) largest of its matrix, else 0   H-MFT [1]
    threshold   m = 1 if S >= 0, else 0            starts at all ones

In soft, normalized and threshold S starts at s0 = T * logit(m0). Soft gates have the exact derivative dm/dD or, on
request, the straight-through one, dm/dS = 1. The hard gates have only the straight-through one; for topk, whose
mask is made of |S|, that is sign(S).

[1] "Rethinking Fine-Tuning: Unlocking Hidden Capabilities in Vision-Language Models", arXiv 2512.23073. Ranking by
    matrix, the factor sign(S) and random starts follow the code of its predecessor, arXiv 2503.22764.

All functions are element-wise over tensors of one shape, the weight's, and compute in the dtype of `offset`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Gate(Protocol):
    """A gate's value m and derivative dm/dD at the offsets D; `weight` is the frozen weight, of the same shape."""

    @property
    def identity_at_start(self) -> bool:
        """Whether m is exactly 1 at offset 0, in every dtype."""
        ...

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        """m, in the dtype of `offset`, as a tensor of its own."""
        ...

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        """dm/dD, in the dtype of `offset`: exact, or what stands in for it in the backward pass.

        `value` is m, where the caller has it already. The result is a tensor of its own, which the caller may change.
        """
        ...


@dataclass(frozen=True)
class Soft:
    """sigmoid((s0 + D)/T), the published soft gate (S-MFT).

    Attributes:
        init_gate: m0 in (0, 1), the gate at the start.
        temperature: T > 0.
        straight_through: use dm/dD = 1 instead of m(1-m)/T.
    """

    init_gate: float
    temperature: float = 1.0
    straight_through: bool = False
    identity_at_start = False

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return torch.sigmoid(offset / self.temperature + _logit(self.init_gate))

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        if self.straight_through:
            return torch.ones_like(offset)
        m = self.value(offset, weight) if value is None else value
        return _scaled_product(m, 1.0, self.temperature)


@dataclass(frozen=True)
class Normalized:
    """sigmoid((s0 + D)/T) / m0, written so that D = 0 gives exactly 1.

    With d = D/T and m0 = sigmoid(s0/T):  m = 1 / (1 + (1 - m0) expm1(-d)),  dm/dD = m^2 (1 - m0) exp(-d) / T.
    """

    init_gate: float
    temperature: float = 1.0
    straight_through: bool = False
    identity_at_start = True

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        decay = torch.expm1(offset / -self.temperature)
        return decay.mul_(1 - self.init_gate).add_(1).reciprocal_()

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        if self.straight_through:
            return torch.ones_like(offset)
        # exp(-d) (1 - m0) = (1/m - m0), which stays finite where exp(-d) m^2 would be infinity times zero
        m = self.value(offset, weight) if value is None else value
        return _scaled_product(m, self.init_gate, self.temperature)


@dataclass(frozen=True)
class Centered:
    """2 sigmoid(D/T) = 1 + tanh(D/2T): exactly 1 at the start, where its derivative 1/(2T) is largest."""

    temperature: float = 1.0
    straight_through: bool = False
    identity_at_start = True

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(offset / (2 * self.temperature)).add_(1)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        if self.straight_through:
            return torch.ones_like(offset)
        m = self.value(offset, weight) if value is None else value
        return _scaled_product(m, 0.5, self.temperature)


@dataclass(frozen=True)
class TopK:
    """1 for the round(keep_ratio * n) entries of the matrix with the largest |S|, else 0 (H-MFT).

    Ties go to the entry that comes first in memory order. S = start + D, where the start is |W| over its root mean
    square (`magnitude_start`: the first mask cuts the smallest weights) or zero (D itself then starts random, as in the
    predecessor's code).
    """

    keep_ratio: float
    magnitude_start: bool = True
    identity_at_start = False

    def score(self, offset: Tensor, weight: Tensor) -> Tensor:
        """S, in the dtype of `offset`."""
        if not self.magnitude_start:
            return offset
        magnitude = weight.to(offset.dtype).abs()
        root_mean_square = magnitude.square().mean().sqrt().clamp_min(torch.finfo(offset.dtype).tiny)
        return offset + magnitude / root_mean_square

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        size = self.score(offset, weight).abs().flatten()
        keep = round(self.keep_ratio * size.numel())
        return _largest(size, keep).to(offset.dtype).view_as(offset)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return torch.sign(self.score(offset, weight))


@dataclass(frozen=True)
class Threshold:
    """1 where s0 + D >= 0, else 0. s0 = T * logit(m0) is how far a score must fall to cut its weight."""

    init_gate: float
    temperature: float = 1.0
    identity_at_start = True

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return (offset >= -self.temperature * _logit(self.init_gate)).to(offset.dtype)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return torch.ones_like(offset)


def _scaled_product(m: Tensor, share: float, temperature: float) -> Tensor:
    """m (1 - share * m) / T, the derivative that all sigmoid gates have in common (share = m0, or 1, or 1/2)."""
    return (m * (-share / temperature)).add_(1 / temperature).mul_(m)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _largest(values: Tensor, keep: int) -> Tensor:
    """Boolean mask (n,) of exactly `keep` largest entries of `values` (n,), ties to the first positions."""
    n = values.numel()
    if keep <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if keep >= n:
        return torch.ones_like(values, dtype=torch.bool)
    cut = values.kthvalue(n - keep + 1).values
    above = values > cut
    at_cut = values == cut
    room = keep - int(above.sum())
    return above | (at_cut & (at_cut.cumsum(0) <= room))
