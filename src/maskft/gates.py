"""The method: a frozen weight W is multiplied by a gate m, W' = W * m, and only the gate's score is learnt.

A score is kept as its offset D from the start, S = start + D with D = 0 before training. So a gate is a pure
function of the offset (and, where the start depends on it, of the frozen weight), with a derivative:

    soft        m = sigmoid(S/T)                   published S-MFT [1]; starts at m0 = `init_gate`
    normalized  m = sigmoid(S/T) / m0              starts at exactly 1, range (0, 1/m0)
    centered    m = 2 sigmoid(S/T)                 starts at exactly 1, range (0, 2); S starts at 0
    topk        m = 1 if |S| is among the round(keep_ratio * n) largest of its matrix, or of all matrices, else 0;
                H-MFT [1]
    threshold   m = 1 if S >= 0, else 0            starts at all ones

In soft, normalized and threshold S starts at s0 = T * logit(m0). Soft gates have the exact derivative dm/dD or, on
request, the straight-through one, dm/dS = 1. Hard gates have no exact one: threshold has the straight-through one, and
topk, whose mask is made of |S|, sign(S) or, on request, the straight-through one too.

[1] "Rethinking Fine-Tuning: Unlocking Hidden Capabilities in Vision-Language Models", arXiv 2512.23073. Ranking by
    matrix, the factor sign(S) and random starts follow the code of its predecessor, arXiv 2503.22764.

All functions take offsets and weights of one shape, (..., out, in), and compute in the dtype of `offset`. A gate with
`elementwise = True` looks at each entry alone, and may be compiled into one pass over the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from maskft.selection import above_cut, clear_cut, is_at_hand, kth_smallest, largest


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
    elementwise = True

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
    elementwise = True

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
    elementwise = True

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(offset / (2 * self.temperature)).add_(1)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        if self.straight_through:
            return torch.ones_like(offset)
        m = self.value(offset, weight) if value is None else value
        return _scaled_product(m, 0.5, self.temperature)


@dataclass(frozen=True)
class TopK:
    """1 for the round(keep_ratio * n) entries of each matrix with the largest |S|, else 0 (H-MFT).

    Ties go to the entry that comes first in memory order. S = start + D, where the start is |W| over its root mean
    square (`magnitude_start`: the first mask cuts the smallest weights) or zero (D itself then starts random, as in the
    predecessor's code).

    Attributes:
        keep_ratio: share of entries that stay, in (0, 1].
        magnitude_start: see above.
        slices: heights of matrices that are stacked in one, such as a fused q, k, v; each is ranked by itself.
            Matrices along leading dimensions (experts) always are.
        straight_through: use dm/dD = 1 instead of sign(S).
    """

    keep_ratio: float
    magnitude_start: bool = True
    slices: tuple[int, ...] = ()
    straight_through: bool = False
    identity_at_start = False
    hard = True

    def score(self, offset: Tensor, weight: Tensor) -> Tensor:
        """S, in the dtype of `offset`."""
        if not self.magnitude_start:
            return offset
        return self._each_matrix(_from_magnitude, offset, weight)

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return self._each_matrix(self._kept, self.score(offset, weight))

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return _sign(self, offset, weight)

    def settled(self, weight: Tensor, size: Callable[[AtLeast], Tensor]) -> AtLeast | None:
        """The gate that keeps the same by a cut alone; None where ties or several matrices forbid it, or to look.

        Args:
            weight: W, of the offsets' shape.
            size: returns |S| of a gate, as a tensor of its own, whose entries are put into another order.
        """
        if weight.dim() != 2 or self.slices or not is_at_hand(weight):
            return None
        gate = AtLeast.from_start(weight, self)
        cut = clear_cut(size(gate), round(self.keep_ratio * weight.numel()))
        return None if cut is None else replace(gate, cut=cut)

    def _kept(self, score: Tensor) -> Tensor:
        size = score.abs().flatten(-2) if score.dim() > 1 else score.abs()
        return largest(size, round(self.keep_ratio * size.shape[-1])).to(score.dtype).view_as(score)

    def _each_matrix(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if not self.slices:
            return function(*tensors)
        pieces = zip(*(torch.split(tensor, list(self.slices), dim=-2) for tensor in tensors), strict=True)
        return torch.cat([function(*piece) for piece in pieces], dim=-2)


@dataclass(frozen=True, eq=False)
class AtLeast:
    """1 where |S| >= cut, else 0: a ranking that has come to its cut, so that each entry can be looked at alone.

    Attributes:
        cut: the smallest |S| that stays, a scalar.
        scale: S = D + |W| / scale, with a scalar, or (..., 1, 1) for several matrices; or S = D, with None.
        straight_through: as of `TopK`.
    """

    cut: Tensor
    scale: Tensor | None = None
    straight_through: bool = False
    identity_at_start = False
    elementwise = True
    hard = True

    @classmethod
    def from_start(cls, weight: Tensor, ranked: TopK | TopKGlobal) -> AtLeast:
        """Without a cut yet, for scores that start as those of `ranked` and have its derivative."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        gate = cls(weight.new_zeros((), dtype=wide), straight_through=ranked.straight_through)
        if not ranked.magnitude_start:
            return gate
        scale = _root_mean_square(weight, wide)
        return replace(gate, scale=scale.squeeze() if weight.dim() == 2 else scale)

    def score(self, offset: Tensor, weight: Tensor) -> Tensor:
        """S, in the dtype of `offset`."""
        return offset if self.scale is None else _from_magnitude(offset, weight, self.scale)

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return (self.score(offset, weight).abs() >= self.cut).to(offset.dtype)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return _sign(self, offset, weight)


@dataclass(frozen=True, eq=False)
class TopKGlobal:
    """As TopK, but ranked over all masked matrices of the model together: what is above a common cut stays.

    Attributes:
        cut: the smallest |S| that stays, a scalar; see `global_cut`.
        ties: how many entries of this matrix that equal the cut stay, first ones first.
    """

    cut: Tensor
    ties: int
    magnitude_start: bool = True
    straight_through: bool = False
    identity_at_start = False
    hard = True

    def score(self, offset: Tensor, weight: Tensor) -> Tensor:
        """S, in the dtype of `offset`."""
        return _from_magnitude(offset, weight) if self.magnitude_start else offset

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        size = self.score(offset, weight).abs()
        return above_cut(size.flatten(), self.cut.to(size), self.ties).to(offset.dtype).view_as(offset)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return _sign(self, offset, weight)

    def settled(self, weight: Tensor, size: Callable[[AtLeast], Tensor]) -> AtLeast | None:
        """As `TopK.settled`."""
        if weight.dim() != 2 or not is_at_hand(weight):
            return None
        gate = replace(AtLeast.from_start(weight, self), cut=self.cut)
        if not self.ties and self.cut > 0:
            return replace(gate, cut=torch.nextafter(self.cut, self.cut.new_tensor(math.inf)))
        return gate if int(torch.count_nonzero(size(gate) == self.cut)) == self.ties else None


def global_cut(sizes: Sequence[Tensor], keep_ratio: float) -> tuple[Tensor, list[int]]:
    """The |S| above which round(keep_ratio * n) of all n entries lie, and the ties each tensor may keep, in order.

    Args:
        sizes: |S| of every matrix, any shapes.
        keep_ratio: share of all entries that stay, in (0, 1].
    """
    everything = torch.cat([size.flatten() for size in sizes])
    n = everything.numel()
    keep = round(keep_ratio * n)
    cut = kth_smallest(everything, n - keep + 1)[0] if keep else everything.new_tensor(math.inf)
    room = keep - int(torch.count_nonzero(everything > cut))
    ties = []
    for size in sizes:
        ties.append(min(room, int(torch.count_nonzero(size == cut))) if room else 0)
        room -= ties[-1]
    return cut, ties


@dataclass(frozen=True)
class Threshold:
    """1 where s0 + D >= 0, else 0. s0 = T * logit(m0) is how far a score must fall to cut its weight."""

    init_gate: float
    temperature: float = 1.0
    identity_at_start = True
    elementwise = True
    hard = True

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return (offset >= -self.temperature * _logit(self.init_gate)).to(offset.dtype)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return torch.ones_like(offset)


def _scaled_product(m: Tensor, share: float, temperature: float) -> Tensor:
    """m (1 - share * m) / T, the derivative that all sigmoid gates have in common (share = m0, or 1, or 1/2)."""
    return (m * (-share / temperature)).add_(1 / temperature).mul_(m)


def _sign(gate: TopK | AtLeast | TopKGlobal, offset: Tensor, weight: Tensor) -> Tensor:
    """sign(S), which passes a gradient through |S|; or 1, straight through."""
    return torch.ones_like(offset) if gate.straight_through else torch.sign(gate.score(offset, weight))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _from_magnitude(offset: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """D + |W| / rms(W), the root mean square taken over each matrix where it is not given as `scale`."""
    size = weight.abs().to(offset.dtype)
    return size.div_(_root_mean_square(weight, offset.dtype) if scale is None else scale).add_(offset)


def _root_mean_square(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """rms(W) of each matrix, (..., 1, 1), in a dtype that scores are computed in; never zero."""
    matrix = tuple(range(weight.dim()))[-2:]
    wide = torch.promote_types(weight.dtype, dtype)
    norm: Tensor = torch.linalg.vector_norm(weight, dim=matrix, keepdim=True, dtype=wide)
    return (norm.to(dtype) / math.sqrt(math.prod(weight.shape[-2:]))).clamp_min(torch.finfo(dtype).tiny)
