"""What a mask has learnt, in numbers. Pure functions of gates; saved adapters are read, nothing is written.

The measures are those of `maskft.measures`, and

    share_rank  share of the singular values of W' - W that hold 90 % of its energy (the sum of their squares)

`change` and `share_rank` need the base's weights: `attached_masks` gives them, `saved_masks` does without a base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.adapters.operands import Operands
from maskft.audit import masked_layers
from maskft.errors import AdapterError
from maskft.gates import Gate
from maskft.measures import Place, measure, place, top_of
from maskft.tuner import MaskConfig

ENERGY = 0.9
SAMPLE = 1 << 14
"""Gates of each matrix that are looked at where a sample is enough."""
_ELEMENTWISE = ("soft", "normalized", "centered", "threshold")


@dataclass(frozen=True)
class LayerMask:
    """The gates of one masked matrix.

    Attributes:
        name: of the layer.
        m: gates, any shape; (..., out, in) where there is `weight`.
        start: m at offset 0, of the same shape; None where it is not known.
        top: upper end of a soft gate's range (the lower one is 0); None for hard gates.
        weight: the frozen weight W (..., out, in).
        gates: how many the matrix has, also where `m` is a sample of them.
    """

    name: str
    m: Tensor
    start: Tensor | None
    top: float | None
    weight: Tensor | None = None
    gates: int = 0


@dataclass(frozen=True)
class Statistics:
    """What `statistics` finds; None where it does not apply or is not known. `norm` is ||W||."""

    gates: int
    mean: float
    spread: float
    distance: float | None = None
    moved: float | None = None
    saturated: float | None = None
    kept: float | None = None
    change: float | None = None
    norm: float | None = None
    share_rank: float | None = None


def saved_masks(folder: Path, *, sample: int | None = None) -> Iterator[LayerMask]:
    """The masks of a saved adapter, one matrix at a time, without its base.

    Args:
        folder: the adapter's.
        sample: look at no more gates of a matrix than this, at fixed places (the same in matrices of one shape).

    Raises:
        AdapterError: the adapter is damaged, or its mask depends on the base's weights.
    """
    operands = Operands([folder])
    adapter = operands.adapters[0]
    config, gate = adapter.config, adapter.config.make_gate()
    top = None if operands.hard(0) else top_of(gate)
    for layer in operands.layers:
        score = f"{layer}.mask_scores"
        dense = config.score_layout == "dense" and config.gate in _ELEMENTWISE and not adapter.packed(score)
        if sample is not None and dense:  # the file is mapped, so that no more than the sample's pages are read
            scores = adapter.tensor(adapter.scores[score][""])
            offset, gates = _sampled(scores, sample).double(), scores.numel()
            if not torch.isfinite(offset).all():
                raise AdapterError(f"{adapter.weights}: {score} has values that are not finite numbers")
        else:
            whole = operands.offset(0, layer)
            assert whole is not None
            offset, gates = whole if sample is None else _sampled(whole, sample), whole.numel()
        m = operands.gates(0, layer, offset)
        yield LayerMask(layer, m, _start(config, gate, m), top, gates=gates)


def attached_masks(model: Any, adapter_name: str = "default") -> Iterator[LayerMask]:
    """The masks of an adapter on its base, one matrix at a time, with the weights under them."""
    for name, layer in masked_layers(model, adapter_name).items():
        mask, weight = layer.mask(adapter_name), layer.pretrained_matrix()
        config = model.peft_config[adapter_name]
        with torch.no_grad():
            offset = mask.offset(weight)
            m = mask.gate.value(offset, weight)
            start = mask.gate.value(torch.zeros_like(offset), weight) if config.init_weights is True else None
        yield LayerMask(name, m, start, top_of(mask.gate), weight, m.numel())


def sampled(mask: LayerMask, count: int = SAMPLE) -> LayerMask:
    """A mask with no more than `count` of its gates, those that `saved_masks` would take, without weight."""
    start = None if mask.start is None else _sampled(mask.start, count)
    return LayerMask(mask.name, _sampled(mask.m, count), start, mask.top, gates=mask.gates or mask.m.numel())


def statistics(mask: LayerMask, *, rank: bool = False) -> Statistics:
    """What one matrix's gates say.

    Args:
        mask: the gates.
        rank: also find the rank of the change, by a singular value decomposition: seconds for a large matrix.
    """
    m, weight = mask.m.double(), None if mask.weight is None else mask.weight.double()
    start = None if mask.start is None else mask.start.double().flatten()
    found = measure(m.flatten(), start, mask.top, None if weight is None else weight.flatten())
    return Statistics(
        gates=mask.gates or m.numel(),
        norm=None if weight is None else float(weight.norm()),
        share_rank=None if weight is None or not rank else rank_share(weight * (m - 1)),
        **{name: float(value) for name, value in found.items()},
    )


def rank_share(matrix: Tensor, energy: float = ENERGY) -> float:
    """Share of the singular values of a matrix (..., out, in) that is needed for `energy` of the sum of their squares.

    0 for a matrix of zeros; the mean over leading dimensions.
    """
    squares: Tensor = torch.linalg.svdvals(matrix).square()
    total = squares.sum(-1, keepdim=True)
    needed = (squares.cumsum(-1) < energy * total * (1 - 1e-12)).sum(-1) + 1
    needed = torch.where(total.squeeze(-1) > 0, needed, 0)
    return float(needed.double().mean()) / squares.shape[-1]


def together(found: Iterable[Statistics]) -> Statistics:
    """Statistics of several matrices as of one; a value that one of them lacks is None. Ranks are averaged."""
    parts = list(found)
    gates = sum(one.gates for one in parts)

    def mean(name: str) -> float | None:
        values = [getattr(one, name) for one in parts]
        return (
            None if None in values else math.fsum(one.gates * v for one, v in zip(parts, values, strict=True)) / gates
        )

    middle = math.fsum(one.gates * one.mean for one in parts) / gates
    square = math.fsum(one.gates * (one.spread**2 + (one.mean - middle) ** 2) for one in parts) / gates
    norms = [(one.change, one.norm) for one in parts]
    change = norm = None
    if all(c is not None and n is not None for c, n in norms):
        norm = math.sqrt(math.fsum((n or 0) ** 2 for _, n in norms))
        change = math.sqrt(math.fsum(((c or 0) * (n or 0)) ** 2 for c, n in norms)) / norm if norm else 0.0
    rest = {name: mean(name) for name in ("distance", "moved", "saturated", "kept", "share_rank")}
    return Statistics(gates=gates, mean=middle, spread=math.sqrt(square), change=change, norm=norm, **rest)


def by_place(found: Mapping[str, Statistics]) -> dict[Place, Statistics]:
    """Statistics by place, sorted; matrices of one place (experts, stacks of layers) are taken together."""
    groups: dict[Place, list[Statistics]] = {}
    for name, one in found.items():
        groups.setdefault(place(name), []).append(one)
    return {where: together(group) for where, group in sorted(groups.items())}


def histogram(masks: Iterable[LayerMask], bins: int = 50) -> tuple[list[int], float]:
    """Counts of gates in equal bins from 0 to the top of their range (1 for hard gates), and that top.

    A value beyond the range counts in the outermost bin.
    """
    counts, top = torch.zeros(bins, dtype=torch.float64), 1.0
    for mask in masks:
        top = mask.top or 1.0
        counts += torch.histc(mask.m.double().clamp(0, top), bins, 0, top)
    return [int(count) for count in counts], top


def _sampled(values: Tensor, count: int) -> Tensor:
    """`count` values at fixed random places, or all of them, flat."""
    if values.numel() <= count:
        return values.flatten()
    draw = torch.Generator().manual_seed(values.numel())
    return values.flatten()[torch.randint(values.numel(), (count,), generator=draw)]


def _start(config: MaskConfig, gate: Gate, m: Tensor) -> Tensor | None:
    """The gates at offset 0; None where training started elsewhere or the start depends on the base's weights."""
    if config.init_weights is not True or config.gate not in _ELEMENTWISE:
        return None
    zeros = torch.zeros_like(m)
    return gate.value(zeros, zeros)
