"""Watching a mask learn: a callback that keeps statistics of a sample of gates, for next to no time.

    {"sampled": 1024, "modules": [name, ...], "gates": [how many, ...], "hard": false,
     "records": [{"step": 0, "overall": {measure: value}, "modules": {measure: [value, ...]}}, ...]}

The measures are those of `maskft.measures`. Of each matrix the same random entries are looked at each time. A published
hard mask (topk) is ranked within its sample, so its statistics are estimates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from maskft.audit import masked_layers
from maskft.gates import TopK
from maskft.measures import heat_image, measure, place, top_of
from maskft.tuner import MaskConfig, MaskLayer
from maskft.tuner.base import whole_weight
from maskft.tuner.sharding import is_first_process, whole

SAMPLED = 1024
"""Entries of each matrix that are looked at."""
RECORDS = 64
"""About how many records a run gets at most."""
Record = dict[str, Any]


class Sample:
    """Fixed entries of every matrix that an adapter masks.

    Every process must make and ask it, where weights or scores are in pieces.

    Attributes:
        layers: the masked layers by name.
        sizes: how many gates each has.
    """

    def __init__(self, model: Any, adapter_name: str, config: MaskConfig, count: int = SAMPLED) -> None:
        self.layers: dict[str, MaskLayer] = masked_layers(model, adapter_name)
        self.adapter_name = adapter_name
        self.shapes = {name: layer.matrix_shape() for name, layer in self.layers.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self._places = {name: self._draw(layer, count) for name, layer in self.layers.items()}
        weights = [self._take(n, layer.matrix(whole_weight(layer))) for n, layer in self.layers.items()]
        self._weights = torch.stack([w.to(weights[0].device) for w in weights]).float()
        gate = next(iter(self.layers.values())).mask_gate[adapter_name]
        self._gate = replace(gate, slices=()) if isinstance(gate, TopK) else gate
        self._pooled = config.ranking == "global"
        self.top = top_of(self._gate)
        with torch.no_grad():
            known = config.init_weights is True
            self._start = self._gates(torch.zeros_like(self._weights)) if known else None

    def measures(self) -> dict[str, list[float]]:
        """Each measure for all matrices, in order."""
        with torch.no_grad():
            found = measure(self._gates(self._offsets()), self._start, self.top, self._weights)
            table = torch.stack([values.float() for values in found.values()])
        return dict(zip(found, table.tolist(), strict=True))

    def _draw(self, layer: MaskLayer, count: int) -> tuple[Tensor, ...]:
        shape = layer.matrix_shape()
        drawn = torch.randint(shape.numel(), (count,), generator=torch.Generator().manual_seed(shape.numel()))
        device = layer.parameters_of(self.adapter_name)[0].device
        return tuple(index.to(device) for index in torch.unravel_index(drawn, shape))

    def _take(self, name: str, matrix: Tensor) -> Tensor:
        places = self._places[name]
        return matrix[tuple(index.to(matrix.device) for index in places)]

    def _offsets(self) -> Tensor:
        """D at the places, (matrices, count) in fp32."""
        taken = []
        for name, layer in self.layers.items():
            scores = tuple(whole(p) for p in layer.parameters_of(self.adapter_name))
            offset = layer.mask_layout[self.adapter_name].offset(scores, self.shapes[name])
            taken.append(self._take(name, offset).to(self._weights.device))
        return torch.stack(taken).float()

    def _gates(self, offset: Tensor) -> Tensor:
        """m (matrices, count); each row is a matrix of its own, but for a ranking over all."""
        if self._pooled and isinstance(self._gate, TopK):
            size = self._gate.score(offset[:, None], self._weights[:, None])[:, 0].abs()
            share = torch.tensor(self.sizes, device=size.device).double()[:, None].expand_as(size).flatten()
            order = size.flatten().argsort(descending=True)
            above = share[order].cumsum(0) <= self._gate.keep_ratio * share.sum()
            return torch.zeros_like(size).flatten().scatter_(0, order, above.to(size)).view_as(size)
        return self._gate.value(offset[:, None], self._weights[:, None])[:, 0]


class MaskStatistics(TrainerCallback):
    """Keeps a record of the active adapter's gates at the start, at logging steps, and at the end of a training.

    Where Trainer reports to TensorBoard, the overall measures and a picture of the distances go there as well.

    Args:
        path: the file, written when a checkpoint is saved and at the end; a resumed run goes on with it.
        write: writes JSON content to a path.

    Attributes:
        trackers: Trainer's handler of callbacks, among which TensorBoard's is looked for.
    """

    def __init__(self, path: Path, write: Callable[[Path, Any], None]) -> None:
        self.path = path
        self.write = write
        self.trackers: Any = None
        self.sample: Sample | None = None
        self.records: list[Record] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = _unwrapped(model)
        active = _active(model)
        if active is None:
            return
        self.sample = Sample(model, *active)
        self.records = [record for record in self._earlier() if record["step"] <= state.global_step]
        if not self.records or self.records[-1]["step"] < state.global_step:
            self._record(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interval = max(int(state.logging_steps or 1), math.ceil(state.max_steps / RECORDS), 1)
        if self.sample is not None and (state.global_step % interval == 0 or state.global_step >= state.max_steps):
            self._record(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _record(self, state: Any) -> None:
        assert self.sample is not None
        found = self.sample.measures()
        sizes, gates = self.sample.sizes, sum(self.sample.sizes)
        overall = {
            name: _short(math.fsum(n * v for n, v in zip(sizes, values, strict=True)) / gates)
            for name, values in found.items()
        }
        modules = {name: [_short(value) for value in values] for name, values in found.items()}
        self.records.append({"step": state.global_step, "overall": overall, "modules": modules})
        if state.is_world_process_zero:
            self._show(state.global_step)

    def _show(self, step: int) -> None:
        """Send the last record to TensorBoard's writer, where Trainer has one."""
        assert self.sample is not None
        callbacks = getattr(self.trackers, "callbacks", [])
        writers = (getattr(callback, "tb_writer", None) for callback in callbacks)
        for writer in (writer for writer in writers if writer is not None):
            for name, value in self.records[-1]["overall"].items():
                writer.add_scalar(f"mask/{name}", value, step)
            if far := self.records[-1]["modules"].get("distance"):
                places = {place(name): value for name, value in zip(self.sample.layers, far, strict=True)}
                writer.add_image("mask/distance from the start", heat_image(places), step)

    def _write(self) -> None:
        if self.sample is None or not is_first_process():
            return
        names = [name.removeprefix("base_model.model.") for name in self.sample.layers]
        head = {"sampled": SAMPLED, "modules": names, "gates": self.sample.sizes, "hard": self.sample.top is None}
        self.write(self.path, {**head, "records": self.records})

    def _earlier(self) -> list[Record]:
        """Records of the run that is resumed; none where the file is missing or cannot be read."""
        try:
            records: list[Record] = json.loads(self.path.read_text(encoding="utf-8"))["records"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return records


def _unwrapped(model: Any) -> Any:
    """The PEFT model inside what trains it on many machines."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _active(model: Any) -> tuple[str, MaskConfig] | None:
    """The first active mask adapter of a model, and its configuration."""
    configs = getattr(model, "peft_config", {})
    if not configs:
        return None
    active = model.active_adapters
    names = active() if callable(active) else active
    found = [(name, configs[name]) for name in names if isinstance(configs.get(name), MaskConfig)]
    return found[0] if found else None


def _short(value: float) -> float:
    """Five digits are enough."""
    return float(f"{value:.5g}")
