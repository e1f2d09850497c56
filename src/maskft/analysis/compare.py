"""How masks differ: over the steps of a training, and between adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.adapters import distance
from maskft.analysis.masks import SAMPLE, LayerMask, saved_masks, statistics, together
from maskft.errors import AdapterError
from maskft.recipe import Recipe

FAR = 0.1
"""Share of each matrix's gates, those that moved farthest, that `overlap` compares."""


@dataclass(frozen=True)
class Drift:
    """How far a mask is at a step of its training.

    Attributes:
        step: of the checkpoint.
        from_start: mean |m - start|; None where the start is not known.
        to_last: mean |m - m_last|, to the last checkpoint's mask.
        correlation: Pearson's, of the offsets with the last checkpoint's; None with a hard mask.
    """

    step: int
    from_start: float | None
    to_last: float
    correlation: float | None


def checkpoints(run: Path) -> dict[int, Path]:
    """The saved adapters of a run's checkpoints by their step, in order."""
    folders = (path.parent for path in (run / "checkpoints").glob("checkpoint-*/adapter_config.json"))
    return dict(sorted((int(folder.name.rpartition("-")[2]), folder) for folder in folders))


def drift(folders: Mapping[int, Path]) -> list[Drift]:
    """Drift of saved adapters of one run, by step in order.

    Raises:
        AdapterError: one is damaged, or they do not belong together.
    """
    steps = list(folders)
    found = []
    for step in steps:
        from_start = together(map(statistics, saved_masks(folders[step], sample=SAMPLE))).distance
        apart = distance(folders[step], folders[steps[-1]]).overall
        found.append(Drift(step, from_start, apart.mean_difference, apart.correlation))
    return found


@dataclass(frozen=True)
class Overlap:
    """Whether two masks change the same weights.

    Of hard masks, the cut entries are compared; of others, in each matrix, the share FAR of the gates that are
    farthest from their start.

    Attributes:
        shared: share of the first one's entries that are the second one's too; None where there are none.
        by_chance: what two such sets share on average that know nothing of each other.
        deviation: standard deviation of that.
        layers: `shared` by layer.
    """

    shared: float | None
    by_chance: float
    deviation: float
    layers: dict[str, float | None]


def overlap(first: Sequence[LayerMask], second: Sequence[LayerMask]) -> Overlap:
    """Compare the masks of two adapters on one base, in the layers that both mask.

    Raises:
        AdapterError: they have no layer in common, or gates at different places.
    """
    others = {mask.name: mask for mask in second}
    pairs = [(mask, others[mask.name]) for mask in first if mask.name in others]
    if not pairs:
        raise AdapterError("these adapters mask no layer in common, so there is no overlap to measure.")
    both = size = chance = variance = 0.0
    layers: dict[str, float | None] = {}
    for one, other in pairs:
        if one.m.shape != other.m.shape:
            raise AdapterError(f"{one.name} has gates of shape {tuple(one.m.shape)} and {tuple(other.m.shape)}.")
        a, b = _changed(one), _changed(other)
        n, in_a, in_b, common = a.numel(), int(a.sum()), int(b.sum()), int((a & b).sum())
        layers[one.name] = common / in_a if in_a else None
        both, size, chance = both + common, size + in_a, chance + in_a * in_b / n
        variance += in_a * in_b * (n - in_a) * (n - in_b) / (n * n * max(n - 1, 1))  # hypergeometric
    scale = size or 1.0
    return Overlap(both / size if size else None, chance / scale, math.sqrt(variance) / scale, layers)


def relation(first: Recipe, second: Recipe) -> str:
    """How two runs are related: "repeat" (one recipe), "seed" (but for seeds), "task" (other data), "setting"."""
    if first == second:
        return "repeat"
    one, other = (_without_seeds(recipe.model_dump(mode="json")) for recipe in (first, second))
    if one == other:
        return "seed"
    return "setting" if one["data"] == other["data"] else "task"


def _without_seeds(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without_seeds(value) for key, value in tree.items() if key not in ("seed", "data_seed")}


def _changed(mask: LayerMask) -> Tensor:
    """Which entries `overlap` compares. Ties at the edge are left out, so that they are not settled by position."""
    if mask.top is None:
        return mask.m == 0
    far = (mask.m - (1.0 if mask.start is None else mask.start)).abs()
    keep = round(FAR * far.numel())
    return far > far.flatten().kthvalue(far.numel() - keep).values if keep else torch.zeros_like(far, dtype=torch.bool)
