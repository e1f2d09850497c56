"""An optimizer's step made inside the backward pass: each parameter as soon as its gradient is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepInBackward:
    """Makes an optimizer's step parameter by parameter inside the backward pass, and frees each gradient at once.

    Gradients then never exist all together, which saves their memory. The price: they cannot be clipped by their
    common norm, so each tensor is clipped by its own; under Adam this differs only where clipping acts. The
    optimizer's own `step`, called later as always, finds no gradients and does nothing, so that training loops and
    schedules need no change. With accumulation `ready` says when a gradient is complete.

    Args:
        optimizer: any optimizer that treats its parameters one by one.
        max_norm: largest norm of one tensor's gradient; 0 does not clip.
        ready: whether the backward pass that runs is the last one of its step; default: always.
        watch: called with each parameter while it has its gradient.

    Attributes:
        squared_norms: of the gradients of the last step, before clipping, one per parameter.
        ended: called when the training loop's own call of `step` ends a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float = 0.0,
        ready: Callable[[], bool] = lambda: True,
        watch: Callable[[Tensor], None] = lambda parameter: None,
    ) -> None:
        self.optimizer, self.max_norm, self.ready, self.watch = optimizer, max_norm, ready, watch
        self.squared_norms: list[Tensor] = []
        self.ended: list[Callable[[], None]] = []
        self._inside = False
        self._step = type(optimizer).step
        self._groups = {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        self._hooks = [
            optimizer.register_step_post_hook(self._step_made),
            *(parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in self._groups),
        ]

    def norm(self) -> Tensor:
        """Norm of all gradients since the last call, before clipping."""
        total = torch.stack(self.squared_norms).sum().sqrt() if self.squared_norms else torch.zeros(())
        self.squared_norms = []
        return total

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or not self.ready():
            return
        self.watch(parameter)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self.squared_norms.append(_whole(norm).square())
        if self.max_norm > 0 and (norm.device.type != "cpu" or norm > self.max_norm):  # elsewhere a look would wait
            gradient.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradient.dtype))
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self.group(parameter), "params": [parameter]}]
        self._inside = True
        try:
            self._step(self.optimizer)
        finally:
            self.optimizer.param_groups, self._inside = groups, False
        parameter.grad = None

    def group(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's settings for a parameter."""
        found: dict[str, Any] = self.optimizer.param_groups[self._groups[parameter]]
        return found

    def _step_made(self, *_: Any) -> None:
        for action in () if self._inside else self.ended:
            action()


def _whole(scalar: Tensor) -> Tensor:
    full: Tensor = scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar
    return full
