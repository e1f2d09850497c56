"""What masks have learnt: statistics by layer and module, drift over training, overlap between adapters."""

from maskft.analysis.compare import Drift, Overlap, checkpoints, drift, overlap, relation
from maskft.analysis.masks import (
    LayerMask,
    Statistics,
    attached_masks,
    by_place,
    histogram,
    rank_share,
    sampled,
    saved_masks,
    statistics,
    together,
)

__all__ = [
    "Drift",
    "LayerMask",
    "Overlap",
    "Statistics",
    "attached_masks",
    "by_place",
    "checkpoints",
    "drift",
    "histogram",
    "overlap",
    "rank_share",
    "relation",
    "sampled",
    "saved_masks",
    "statistics",
    "together",
]
