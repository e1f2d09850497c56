"""Several saved adapters on one base, read layer by layer as offsets and gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskft.adapters.files import SavedAdapter
from maskft.errors import AdapterError, gathered
from maskft.tuner.config import BIT_GATES


class Operands:
    """Adapters on one base, layer by layer.

    Attributes:
        adapters: as they are saved.
        layers: names of all layers that any of them masks.
        layout: the layout that their gates are combined in: their own where all have the same one of row, column or
            block, else dense.
        same_layers: whether all mask the same layers.
        fingerprint: of their base; None where they mask different layers or don't know it.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """Open the adapters.

        Raises:
            AdapterError: one is damaged, or they do not belong together; all that differs is named.
        """
        self.adapters = [SavedAdapter(folder) for folder in folders]
        self._scores = [_by_layer(adapter) for adapter in self.adapters]
        self.layers = sorted(set().union(*self._scores))
        self.same_layers = all(len(scores) == len(self.layers) for scores in self._scores)
        kinds = {(a.config.score_layout, a.config.block_size) for a in self.adapters}
        kind = next(iter(kinds))[0]
        self.layout = kind if len(kinds) == 1 and kind in ("row", "column", "block") else "dense"
        found = {print_ for a in self.adapters if (print_ := a.config.base_fingerprint) is not None}
        self.fingerprint = next(iter(found)) if self.same_layers and len(found) == 1 else None
        self._shapes: dict[str, torch.Size] = {}
        problems = [*self._differences(found), *self._misfits()]
        if problems:
            raise AdapterError(f"these adapters cannot be taken together:\n{gathered(problems)}")

    def shape(self, layer: str) -> torch.Size:
        """Shape of the gates of a layer."""
        return self._shapes[layer]

    def offset(self, index: int, layer: str) -> Tensor | None:
        """Offsets D of one adapter's layer in fp64; a boolean mask where that was saved; None where it has none."""
        adapter, scores = self.adapters[index], self._scores[index].get(layer)
        if scores is None:
            return None
        found = tuple(_read(adapter, score) for score in scores)
        if found[0].dtype == torch.bool:
            return found[0]
        wide = tuple(scores.double() for scores in found)
        return wide[0] if self.layout != "dense" else adapter.config.make_layout().offset(wide, self.shape(layer))

    def gates(self, index: int, layer: str, offset: Tensor | None) -> Tensor:
        """m of one adapter's layer in fp64, from what `offset` returned."""
        if offset is None:
            return torch.ones(self.shape(layer), dtype=torch.float64)
        if offset.dtype == torch.bool:
            return offset.double()
        gate = self.adapters[index].config.make_gate()
        return gate.value(offset, offset)

    def hard(self, index: int) -> bool:
        """Whether an adapter's gates are 0 and 1 alone."""
        return self.adapters[index].config.gate in BIT_GATES

    def _differences(self, fingerprints: set[str]) -> list[str]:
        """Why the adapters are not of one base, or cannot be read without it."""
        problems = []
        if self.same_layers and len(fingerprints) > 1:
            bases = ", ".join(f"{a.folder}: {(a.config.base_fingerprint or 'unknown')[:12]}" for a in self.adapters)
            problems.append(f"they were trained on different bases ({bases})")
        names = {a.config.base_model_name_or_path for a in self.adapters}
        if not self.same_layers and len(names) > 1:
            listed = ", ".join(f"{a.folder}: {a.config.base_model_name_or_path}" for a in self.adapters)
            problems.append(f"they mask different layers, and name different bases ({listed})")
        if not self.same_layers and any(a.config.target_parameters for a in self.adapters):
            problems.append("they mask different layers, and one of them has target_parameters")
        for adapter in self.adapters:
            if adapter.others:
                problems.append(f"{adapter.folder} holds tensors that are no scores, such as {adapter.others[0]}")
            unpacked = any(not adapter.packed(score) for score in adapter.scores)
            if adapter.config.gate == "topk" and unpacked:
                dense = adapter.config.score_layout == "dense"
                remedy = (
                    f"write it as bits first: maskft pack {adapter.folder} OUT --storage bits" if dense else "merge it"
                )
                problems.append(f"the mask of {adapter.folder} depends on the base's weights; {remedy}")
        return problems

    def _misfits(self) -> list[str]:
        """Work out every layer's shape, and say which scores do not fit it."""
        problems = []
        for layer in self.layers:
            shapes = []
            for adapter, scores in zip(self.adapters, self._scores, strict=True):
                try:
                    parts = [adapter.shape(score) for score in scores.get(layer, ())]
                except AdapterError as error:
                    problems.append(f"{layer} of {adapter.folder} {error}")
                    continue
                if parts:
                    shapes.append((adapter, parts))
            known = [full for adapter, parts in shapes if (full := self._full_shape(adapter, parts)) is not None]
            if not known:
                problems.append(
                    f"{layer}: nothing tells its shape; adapters of one layout can be combined, or a dense one"
                )
                continue
            self._shapes[layer] = known[0]
            for adapter, parts in shapes:
                if not self._fits(adapter, parts, known[0]):
                    problems.append(
                        f"{layer} of {adapter.folder} has scores of shape {tuple(parts[0])}, not {tuple(known[0])}"
                    )
        return problems

    def _full_shape(self, adapter: SavedAdapter, parts: list[torch.Size]) -> torch.Size | None:
        """The shape of the gates, where an adapter's scores tell it."""
        layout = adapter.config.score_layout
        if layout == "low-rank":
            return torch.Size([*parts[0][:-1], parts[-1][-1]])
        return parts[0] if layout in ("dense", self.layout) else None

    def _fits(self, adapter: SavedAdapter, parts: list[torch.Size], shape: torch.Size) -> bool:
        if self.layout != "dense":
            return parts == [shape]
        return len(shape) > 1 and parts == [
            p.shape for p in adapter.config.make_layout().create(shape, 0.0, device="meta")
        ]


def _by_layer(adapter: SavedAdapter) -> dict[str, list[str]]:
    """Names of scores by layer, in the order of the layout."""
    wanted = [f"mask_{name}" for name in adapter.config.make_layout().names]
    layers: dict[str, list[str]] = {}
    problems = []
    for score in adapter.scores:
        layers.setdefault(score.rpartition(".")[0], []).append(score)
    for layer, scores in layers.items():
        if sorted(scores) != sorted(f"{layer}.{name}" for name in wanted):
            problems.append(f"{layer} has {', '.join(scores)}, where {', '.join(wanted)} are needed")
        layers[layer] = [f"{layer}.{name}" for name in wanted]
    if not layers:
        problems.append("there are no scores")
    if problems:
        raise AdapterError(f"{adapter.weights} has flaws:\n{gathered(problems)}")
    return layers


def _read(adapter: SavedAdapter, score: str) -> Tensor:
    try:
        return adapter.read(score)
    except AdapterError as error:
        raise AdapterError(f"{adapter.weights}: {score} {error}") from error
