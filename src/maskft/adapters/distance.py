"""How far apart two saved adapters on one base are, layer by layer and overall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskft.adapters.operands import Operands


@dataclass(frozen=True)
class Measures:
    """Distance and overlap of two masks; a layer that one of them leaves out has m = 1 there.

    Attributes:
        scores: gates compared; with dense scores, weights.
        mean_difference: mean of |m1 - m2|; for hard masks the share of weights that one keeps and the other cuts.
        largest_difference: largest |m1 - m2|.
        cosine: of m1 - 1 and m2 - 1; None where one of them is 0 throughout.
        correlation: Pearson's, of the offsets of layers that both mask; None with a hard mask, or where one is
            constant.
        jaccard_kept: entries that both keep, as a share of those that either keeps; None unless both are hard.
        jaccard_cut: the same of entries that are cut; 1 where there are none.
    """

    scores: int
    mean_difference: float
    largest_difference: float
    cosine: float | None
    correlation: float | None
    jaccard_kept: float | None
    jaccard_cut: float | None


@dataclass(frozen=True)
class Distance:
    """Two adapters compared.

    Attributes:
        hard: whether both are hard masks.
        overall: over all gates.
        layers: by name of the layer.
    """

    hard: bool
    overall: Measures
    layers: dict[str, Measures]


def distance(a: Path, b: Path) -> Distance:
    """Compare two saved adapters.

    Raises:
        AdapterError: one is damaged, or they do not belong together.
    """
    operands = Operands([a, b])
    hard = operands.hard(0) and operands.hard(1)
    sums = {layer: _sums(operands, layer) for layer in operands.layers}
    layers = {layer: _measures(one, hard) for layer, one in sums.items()}
    total = _Sums(
        torch.stack([one.m for one in sums.values()]).sum(0),
        torch.stack([one.d for one in sums.values()]).sum(0),
        max(one.largest for one in sums.values()),
    )
    return Distance(hard, _measures(total, hard), layers)


@dataclass(frozen=True)
class _Sums:
    """Sums over the gates of a layer, in fp64.

    Attributes:
        m: of 1, |m1 - m2|, u u, v v, u v with u = m1 - 1 and v = m2 - 1, and of what both keep, either keeps.
        d: of 1, D1, D2, D1 D1, D2 D2, D1 D2; zeros where there are no two offsets.
        largest: |m1 - m2|.
    """

    m: Tensor
    d: Tensor
    largest: float


def _sums(operands: Operands, layer: str) -> _Sums:
    first, second = (operands.offset(i, layer) for i in (0, 1))
    m1, m2 = (operands.gates(i, layer, offset).flatten() for i, offset in ((0, first), (1, second)))
    difference = (m1 - m2).abs()
    u, v = m1 - 1, m2 - 1
    both, either = ((m1 > 0) & (m2 > 0)).sum(), ((m1 > 0) | (m2 > 0)).sum()
    m = torch.stack([torch.tensor(m1.numel()), difference.sum(), u @ u, v @ v, u @ v, both, either])
    d = torch.zeros(6, dtype=torch.float64)
    if first is not None and second is not None and not (operands.hard(0) or operands.hard(1)):
        x, y = first.flatten(), second.flatten()
        d = torch.stack([torch.tensor(x.numel()), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    return _Sums(m.double(), d.double(), difference.max().item())


def _measures(sums: _Sums, hard: bool) -> Measures:
    count, difference, uu, vv, uv, both, either = sums.m.tolist()
    n, x, y, xx, yy, xy = sums.d.tolist()
    # either cuts: not both keep; both cut: neither keeps
    return Measures(
        scores=int(count),
        mean_difference=difference / count,
        largest_difference=sums.largest,
        cosine=_ratio(uv, uu, vv),
        correlation=_ratio(xy - x * y / n, _spread(xx, x, n), _spread(yy, y, n)) if n else None,
        jaccard_kept=_share(both, either) if hard else None,
        jaccard_cut=_share(count - either, count - both) if hard else None,
    )


def _ratio(product: float, first: float, second: float) -> float | None:
    """product / sqrt(first second), held within -1 and 1 against rounding; None where that is 0 / 0."""
    if first <= 0 or second <= 0:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(first) / math.sqrt(second)))


def _spread(squares: float, total: float, n: float) -> float:
    """Sum of squares about the mean; 0 where nothing but rounding is left of it."""
    spread = squares - total * total / n
    return spread if spread > 1e-12 * squares else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
