"""A base by its shapes alone, whole or with fewer of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskft.targets import Weight, find_weights, resolve_parameters, resolve_targets
from maskft.tuner import MaskConfig, attach

LONGEST_PERIOD = 12
_NUMBERS = ("idx", "index", "layer_id")
"""In names of attributes that hold a layer's number."""
REPEATS = (3, 4)
"""Periods of layers in the two shortened models from which a deep one is extended."""


@dataclass(frozen=True)
class Repetition:
    """Layers that repeat: layer i is like layer i + period, for all from `start` on.

    Attributes:
        depth: number of layers.
        start: the first layer of the repetition.
        period: layers after which it repeats.
    """

    depth: int
    start: int
    period: int

    def lengths(self) -> tuple[int, int]:
        """Two numbers of layers, a period apart, that end within the period where the whole stack ends."""
        rest = (self.depth - self.start) % self.period
        short, longer = (self.start + rest + repeats * self.period for repeats in REPEATS)
        return short, longer

    def factor(self) -> int:
        """How many periods the whole stack has beyond the shorter of the two."""
        return (self.depth - self.lengths()[0]) // self.period


class Skeleton:
    """A base model on the meta device.

    Attributes:
        model: all of it.
        weights: what could be masked.
        stack: name of the list of the language model's layers; None if there is not exactly one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.weights = find_weights(model)
        stacks = {_stack(w) for w in self.weights if w.part == "language" and w.layer is not None}
        self.stack = stacks.pop() if len(stacks) == 1 else None

    def targets(self, config: MaskConfig) -> MaskConfig:
        """The configuration with every masked layer named, which holds for shortened models too.

        Raises:
            ModelError: it matches nothing.
        """
        if config.target_modules is None and config.target_parameters is None:
            config = copy.copy(config)
            config.resolve_layers()
            where: dict[str, Any] = {"scope": config.scope, "modules": config.modules, "layers": config.layers}
            modules, parameters = resolve_targets(self.model, **where), resolve_parameters(self.model, **where)
        else:
            masked: Any = attach(copy.deepcopy(self.model), copy.copy(config)).base_model
            modules, parameters = masked.targeted_module_names, masked.targeted_parameter_names
        named: dict[str, Any] = {"target_modules": set(modules), "target_parameters": list(parameters) or None}
        others: dict[str, Any] = {
            "layers": "all",
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
        }
        return replace(config, **named, **others)

    def quantised(self, depth: int | None) -> list[str]:
        """Names of the linear layers that a quantised base keeps packed: those in the first `depth` layers of the
        language model, or in all."""
        chosen = [
            w.name
            for w in self.weights
            if w.part == "language" and w.kind is not None and not w.bare and (depth is None or (w.layer or 0) < depth)
        ]
        return [name for name in chosen if isinstance(self.model.get_submodule(name), nn.Linear)]

    def vision(self) -> str | None:
        """Name of the outermost module that holds the vision encoder and nothing of another part that masks know."""
        inside = [w.name.split(".") for w in self.weights if w.part == "vision"]
        others = [w.name.split(".") for w in self.weights if w.part != "vision"]
        for length in range(1, min(map(len, inside), default=0)):
            roots = {tuple(path[:length]) for path in inside}
            if len(roots) == 1 and not any(tuple(path[:length]) in roots for path in others):
                return ".".join(inside[0][:length])
        return None

    def repetition(self, targets: Iterable[str]) -> Repetition | None:
        """How the language model's layers repeat, in themselves and in what of them is adapted.

        None where they do not, or where there are too few to leave any out.

        Args:
            targets: names of adapted layers and parameters.
        """
        if self.stack is None:
            return None
        layers: Any = self.model.get_submodule(self.stack)
        looks = [_look(layer, f"{self.stack}.{i}.", targets) for i, layer in enumerate(layers)]
        depth = len(looks)
        for period in range(1, min(LONGEST_PERIOD, depth - 1) + 1):
            start = depth - period
            while start and looks[start - 1] == looks[start - 1 + period]:
                start -= 1
            found = Repetition(depth, start, period)
            if start <= LONGEST_PERIOD and found.lengths()[1] < depth:
                return found
        return None

    def shortened(self, depth: int | None) -> Any:
        """A copy with the first `depth` of the language model's layers; None copies all."""
        if depth is None or self.stack is None:
            return copy.deepcopy(self.model)
        layers: Any = self.model.get_submodule(self.stack)
        self.model.set_submodule(self.stack, nn.ModuleList(list(layers)[:depth]))
        try:
            return copy.deepcopy(self.model)
        finally:
            self.model.set_submodule(self.stack, layers)


def imagine(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace every parameter and buffer by a fake one of the same shape and dtype; what was shared stays shared."""

    def imagined(tensor: Tensor) -> Tensor:
        with fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    replace_tensors(model, imagined)


def replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put what `make` gives in place of every parameter and buffer; what was shared stays shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                kept[name] = made[id(tensor)]


def _stack(weight: Weight) -> str:
    """Name of the list of layers that a weight lies in."""
    path = weight.name.split(".")
    return ".".join(path[: next(i for i, piece in enumerate(path) if piece.isdigit())])


def _look(layer: nn.Module, prefix: str, targets: Iterable[str]) -> Any:
    """Everything by which a layer could differ from another but its number."""
    modules = []
    for name, module in layer.named_modules():
        simple = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | bool) and not any(part in key for part in _NUMBERS)
        }
        shapes = [(own, p.shape, p.dtype) for own, p in module.named_parameters(recurse=False)]
        modules.append((name, type(module), simple, shapes))
    return modules, sorted(name.removeprefix(prefix) for name in targets if name.startswith(prefix))
