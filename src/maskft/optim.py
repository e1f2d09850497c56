"""AdamW for scores in bf16: it rounds each new score up or down at random, in proportion to what rounding loses.

bf16 keeps eight bits, so a score of 1 cannot take a step of 0.003: rounding to nearest returns it to 1, each time.
Rounded at random, scores move by the right amount on average. Moments stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_LOW_BITS = 16


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with stochastic rounding of bf16 parameters.

    Parameters of other dtypes are updated as by `torch.optim.AdamW`, to rounding.

    Args:
        params: as any optimizer's.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled; on offsets it pulls towards the pre-trained model.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr {lr}, eps {eps} and weight_decay {weight_decay} must be 0 or more, betas {betas} in [0, 1)."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["first"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["second"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], float(state["step"])
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        first, second = state["first"], state["second"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        new = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**step))
        parameter.copy_(round_stochastically(new) if parameter.dtype == torch.bfloat16 else new)


def round_stochastically(values: Tensor) -> Tensor:
    """fp32 to bf16, up or down at random so that the mean is the value; values that bf16 holds stay as they are.

    bf16 is the upper half of fp32's bits: a random number of the lower half's size is added and the half cut off.
    """
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << _LOW_BITS)
    rounded = (bits + noise).bitwise_and_(-(1 << _LOW_BITS)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
