"""Ranking scores over all masked matrices together, for hard masks with `ranking="global"`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from maskft.errors import ModelError
from maskft.gates import AtLeast, TopK, TopKGlobal, global_cut
from maskft.linear import score_sizes
from maskft.tuner.sharding import is_partitioned, is_sharded

if TYPE_CHECKING:
    from maskft.tuner.layer import MaskLayer


class GlobalRanking:
    """Gates of one adapter's layers that share a cut, found anew whenever a score may have changed.

    Finding it reads every score and sorts none, for each forward pass of training.

    Args:
        adapter_name: whose scores are ranked.
        gate: what ranks each matrix by itself; its share, start and derivative are those of all.
    """

    def __init__(self, adapter_name: str, gate: TopK) -> None:
        self.adapter_name = adapter_name
        self.alone = gate
        self.layers: list[MaskLayer] = []
        self._gates: dict[int, TopKGlobal] = {}
        self._seen: list[tuple[int, int, int]] = []  # of all scores: parameter, storage, version
        self._served: set[int] = set()  # layers that have asked since the cut was found
        self._trained = False  # whether the cut was found for a pass that gradients are taken of

    def add(self, layers: Iterable[MaskLayer]) -> None:
        """Layers to rank, in the order in which ties are settled."""
        self.layers = list(layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gate(self, layer: MaskLayer) -> TopKGlobal:
        """The layer's gate at the present scores.

        PyTorch counts changes of a tensor, except those by fused optimizers and by writing to `scores.data`. So the
        cut is found anew when the count differs, when a layer asks again for a pass that gradients are taken of, and
        for the first pass without gradients after such a one.

        Raises:
            ModelError: scores are in pieces on several processes.
        """
        scores = [p for one in self.layers for p in one.parameters_of(self.adapter_name)]
        if any(is_sharded(p) or is_partitioned(p) for p in scores):
            raise ModelError(
                "ranking is 'global', which needs all scores at once, but FSDP or DeepSpeed ZeRO-3 keeps them in "
                "pieces. Use ranking 'matrix', or train without sharding (DDP)."
            )
        seen = [(id(p), p.data_ptr(), p._version) for p in scores]
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in scores)
        if seen != self._seen or (id(layer) in self._served if trains else self._trained):
            self._refresh()
            self._seen, self._trained, self._served = seen, trains, set()
        self._served.add(id(layer))
        return self._gates[id(layer)]

    def _refresh(self) -> None:
        sizes, alone = [], self.alone
        with torch.no_grad():
            for layer in self.layers:
                weight = layer.pretrained_matrix()
                gate = AtLeast.from_start(weight, alone)
                sizes.append(score_sizes(layer.mask(self.adapter_name, gate), weight))
            cut, ties = global_cut(sizes, alone.keep_ratio)
        gates = (TopKGlobal(cut, n, alone.magnitude_start, alone.straight_through) for n in ties)
        self._gates = dict(zip(map(id, self.layers), gates, strict=True))
