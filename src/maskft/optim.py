"""AdamW for scores, whose state takes little memory.

bf16 keeps eight bits, so a score of 1 cannot take a step of 0.003: rounding to nearest returns it to 1, each time.
`ScoreAdamW` rounds each new score up or down at random, in proportion to what rounding loses, so that scores move by
the right amount on average. It keeps its moments in fp32 or in 8 bits.

Moments in 8 bits. Each row has a scale, and an entry is kept as the root of its share of the row's largest, rounded at
random: m as sign and 127 steps, the root r of the second moment as 255. Entries of a row so span 1 to 1/16,000 and
1/65,000; near the largest the steps are 1.6 and 0.8 %. All of it is arithmetic on rows, which compilers turn into
vector code, where codes found by search, as those of arXiv 2110.02861 are, take ten times as long on a CPU.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskft.compiling import compiled

SMALL = 4096
"""Parameters with fewer values keep fp32 moments."""
NUMBERS = 6
"""How many scalars an update takes."""
_LOW_BITS = 16
_SIGNED, _UNSIGNED = 127.0, 255.0
Noise = tuple[Tensor, Tensor] | tuple[None, None]


@dataclass(frozen=True)
class Parts:
    """What the update of one parameter takes beside its values and their gradient.

    Attributes:
        moments: first and second, (rows, columns), in fp32; or each as codes and scales (rows).
        noise: for every row and column, where anything is rounded at random.
        numbers: scalars, see `_numbers`.
    """

    moments: tuple[Tensor, ...]
    noise: Noise
    numbers: tuple[Tensor, ...]


class ScoreAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with stochastic rounding of bf16 parameters.

    Parameters of other dtypes are updated as by `torch.optim.AdamW`, to rounding. The random numbers depend on the
    step and on the parameter's place alone: processes that hold copies of a parameter round it alike, and so does a
    resumed run.

    Args:
        params: as any optimizer's.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled; on offsets it pulls towards the pre-trained model.
        moments: "float32" (8 bytes per parameter) or "int8" (2 bytes, and 8 for each row; not for parameters that FSDP
            shards, whose moments stay in fp32).

    Attributes:
        pending: gradients of masked weights that wait for those of other batches; see `maskft.memory.FusedStep`.

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
        moments: str = "float32",
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr {lr}, eps {eps} and weight_decay {weight_decay} must be 0 or more, betas {betas} in [0, 1)."
            )
        if moments not in ("float32", "int8"):
            raise ValueError(f"moments is '{moments}'; allowed: float32, int8.")
        self.moments = moments
        self.pending: dict[Tensor, Tensor] = {}
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any optimizer's."""
        super().zero_grad(set_to_none)
        self.pending.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's."""
        super().add_param_group(param_group)
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, but every moment keeps the dtype it was saved in."""
        super().load_state_dict(state_dict)
        names = (name for group in state_dict["param_groups"] for name in group["params"])  # numbers, or FSDP's names
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for saved_as, parameter in zip(names, parameters, strict=True):
            for name, value in state_dict["state"].get(saved_as, {}).items():
                kept = copy.deepcopy(value)
                self.state[parameter][name] = kept if value.dim() == 0 else kept.to(parameter.device)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        parts = self.begin(parameter, group)
        values, gradient = as_rows(_local(parameter)), as_rows(_local(parameter.grad))  # type: ignore[arg-type]
        (adamw if len(parts.moments) == 2 else adamw_8bit)(
            values, gradient, *parts.moments, *parts.noise, *parts.numbers
        )

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> Parts:
        """Count a step of one parameter; whoever calls this makes it, by `adamw` or `adamw_8bit`."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state.update(zip(self._names(parameter), self._zeros(parameter), strict=True))
        state["step"] += 1
        step = int(state["step"])
        kept = {name: _local(state[name]) for name in self._names(parameter)}
        moments = tuple(value if name.endswith("scale") else as_rows(value) for name, value in kept.items())
        exact = parameter.dtype != torch.bfloat16 and len(moments) == 2
        noise = (None, None) if exact else _noise(_local(parameter), step, self._places[id(parameter)])
        return Parts(
            moments, noise, _numbers(step, float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
        )

    def _names(self, parameter: Tensor) -> tuple[str, ...]:
        if self.moments == "int8" and parameter.numel() >= SMALL and not hasattr(parameter, "to_local"):
            return "first", "first_scale", "second", "second_scale"
        return "first", "second"

    def _zeros(self, parameter: Tensor) -> tuple[Tensor, ...]:
        if len(self._names(parameter)) == 2:
            return tuple(torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
        codes = (torch.zeros_like(parameter, dtype=dtype) for dtype in (torch.int8, torch.uint8))
        return tuple(
            part for code in codes for part in (code, parameter.new_zeros(as_rows(code).shape[0], dtype=torch.float32))
        )


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """fp32 to bf16, up or down so that with noise drawn evenly from [0, 65536) the mean is the value.

    bf16 is the upper half of fp32's bits: noise of the lower half's size is added and the half cut off. Values that
    bf16 holds stay as they are.
    """
    bits = values.view(torch.int32)
    rounded = (bits + noise).bitwise_and(-(1 << _LOW_BITS)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


@functools.lru_cache(maxsize=16)
def _numbers(step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> tuple[Tensor, ...]:
    """Scalars of one step, as tensors so that their values are not compiled in: both betas, eps, the rate and the
    farthest change, all with the corrections of early steps, and the factor of weight decay."""
    correction = math.sqrt(1 - beta2**step)
    rate = lr * correction / (1 - beta1**step)
    numbers = (beta1, beta2, eps * correction, rate, rate * _farthest(beta1, beta2, step), 1 - lr * weight_decay)
    return tuple(torch.tensor(number, dtype=torch.float32) for number in numbers)


def _farthest(beta1: float, beta2: float, step: int) -> float:
    """The largest m / r that any gradients can lead to in so many steps, by the Cauchy-Schwarz inequality.

    Moments in 8 bits keep to it as well, where r of a small entry was rounded to 0.
    """
    ratio = beta1**2 / beta2 if beta2 else 0.0
    terms = step if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    return (1 - beta1) * math.sqrt(terms / (1 - beta2))


def _noise(values: Tensor, step: int, place: int) -> Noise:
    """Whole numbers in [0, 65536) for every row and every column of `values`, the same in every process.

    The sums of a row's and a column's number, modulo 65536, are even, and independent for any two entries.
    """
    generator = torch.Generator().manual_seed((step << 24) + place)
    rows, columns = (
        torch.randint(1 << _LOW_BITS, (size,), generator=generator, dtype=torch.int32) for size in as_rows(values).shape
    )
    return rows.to(values.device), columns.to(values.device)


def _stepped(
    values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """New values and moments, in fp32; `numbers` as `ScoreAdamW._update` has them."""
    beta1, beta2, eps, rate, farthest, keep = numbers
    gradient = gradient.float()
    first = first + (gradient - first) * (1 - beta1)
    second = second * beta2 + gradient * gradient * (1 - beta2)
    change = (rate * first / (second.sqrt() + eps)).clamp(-farthest, farthest)
    return values.float() * keep - change, first, second


@compiled
def adamw(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    *numbers: Tensor,
) -> None:
    """Update values and moments in place; all (rows, columns), or of one shape where there is no noise."""
    new, first_new, second_new = _stepped(values, gradient, first, second, numbers)
    first.copy_(first_new)
    second.copy_(second_new)
    values.copy_(_narrowed(new, values.dtype, _together(rows, columns)))


@compiled
def adamw_8bit(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    *numbers: Tensor,
) -> None:
    """As `adamw`, with moments as codes (rows, columns) and scales (rows)."""
    root = _decoded(second, second_scale)
    new, first_new, second_new = _stepped(values, gradient, _decoded(first, first_scale), root * root, numbers)
    noise = _together(rows, columns)
    assert noise is not None
    _encode(first_new, _SIGNED, noise, first, first_scale)
    _encode(second_new.sqrt(), _UNSIGNED, noise, second, second_scale)
    values.copy_(_narrowed(new, values.dtype, noise))


def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Rows of fp32 from codes (rows, columns) and scales (rows)."""
    steps = codes.float()
    return steps * steps.abs() * scale[:, None]


def _encode(rows: Tensor, top: float, noise: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Write rows as codes from -top (or 0) to top and scales; see the module's docstring."""
    size = rows.abs()
    largest = size.amax(-1)
    share = size * torch.where(largest > 0, 1 / largest, 0.0)[:, None]
    steps = torch.floor(share.sqrt() * top + noise / (1 << _LOW_BITS)).clamp(max=top)
    codes.copy_((steps * rows.sign()).to(codes.dtype))
    scale.copy_(largest / top**2)


def _together(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """The noise of every entry, in [0, 65536), if there is any."""
    if rows is None or columns is None:
        return None
    return (rows[:, None] + columns[None, :]).bitwise_and((1 << _LOW_BITS) - 1)


def _narrowed(new: Tensor, dtype: torch.dtype, noise: Tensor | None) -> Tensor:
    return round_stochastically(new, noise) if dtype == torch.bfloat16 and noise is not None else new


def as_rows(tensor: Tensor) -> Tensor:
    """View as (rows, columns)."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.view(1, -1)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that FSDP shards."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()
