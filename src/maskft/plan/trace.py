"""What one forward and backward pass keeps in memory, operation by operation, found by running it without data.

Floating-point tensors are fake: they have a shape, a dtype and a storage of that size, but no values. Autograd,
autocast and the choice of attention kernels work on them as on real ones, so what is saved for backward is what a real
pass saves. Integers and booleans are real, since models look at them to decide what to do (where are the images, which
rows are padded). Every new storage is noted with the tick at which it appears and the one at which it is freed.

The same recorder works on real tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from maskft.compiling import around

Curves: TypeAlias = npt.NDArray[np.int64]
"""Bytes (role, tick)."""
ROLES = ("gradients", "activations", "logits", "temporary")
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
LARGEST_REAL = 1 << 24
"""Real tensors have at most so many entries; larger ones of any dtype are fake."""


@dataclass(slots=True)
class Allocation:
    """One storage.

    Attributes:
        size: in bytes.
        born, died: ticks; `died` is None while it lives.
        recomputed: made by a module while the backward pass runs, as gradient checkpointing does.
        logits: has a vocabulary of numbers for each position.
        accumulated: the tick at which it became a parameter's gradient.
    """

    size: int
    born: int
    died: int | None = None
    recomputed: bool = False
    logits: bool = False
    accumulated: int | None = None


@dataclass
class Timeline:
    """What happened in one step.

    Attributes:
        allocations: all storages that the step made.
        turn: the tick at which the forward pass ended.
        end: the tick at which the backward pass ended.
    """

    allocations: list[Allocation] = field(default_factory=list)
    turn: int = 0
    end: int = 0

    def curves(self, *, gradients: str = "freed") -> Curves:
        """Bytes (role, tick), roles as in `ROLES`, int64.

        Args:
            gradients: "freed" as soon as each has been used, "kept" until the end, or "elsewhere": kept from an earlier
                pass, so that each is gone once it has been added.
        """
        change = np.zeros((len(ROLES), self.end + 2), dtype=np.int64)
        for made in self.allocations:
            died = self.end + 1 if made.died is None else min(made.died, self.end + 1)
            if made.accumulated is not None:
                died = self.end + 1 if gradients == "kept" else min(died, made.accumulated + 1)
            role = ROLES.index(self._role(made))
            change[role, min(made.born, self.end)] += made.size
            change[role, died] -= made.size
        return change.cumsum(axis=1)[:, : self.end + 1]

    def _role(self, made: Allocation) -> str:
        if made.accumulated is not None:
            return "gradients"
        if made.logits:
            return "logits"
        kept = made.born <= self.turn and (made.died is None or made.died > self.turn)
        return "activations" if kept or made.recomputed else "temporary"


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storages that operations make while it is active. Each new one is a tick.

    Args:
        fake: the mode that fake tensors belong to; None records real tensors alone.
        widths: sizes of the last dimension by which logits are known.
    """

    def __init__(self, fake: FakeTensorMode | None = None, widths: Sequence[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.widths = fake, widths
        self.timeline = Timeline()
        self._known: dict[int, Allocation | None] = {}
        self._tick = 0
        self._depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Take storages for granted, such as those of parameters."""
        for tensor in tensors:
            self._follow(tensor.untyped_storage(), None)

    def accumulated(self, parameter: Tensor) -> None:
        """A hook for parameters whose gradient has arrived, if any has been written down."""
        if parameter.grad is None:
            return
        made = self._known.get(id(parameter.grad.untyped_storage()))
        if made is not None and made.accumulated is None:
            made.accumulated = self._tick

    @contextmanager
    def module_depth(self) -> Iterator[None]:
        """Inside, it is known whether a module's forward pass is running."""

        def enter(*_: Any) -> None:
            self._depth += 1

        def leave(*_: Any) -> None:
            self._depth -= 1

        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enter).remove)
            stack.callback(register_module_forward_hook(leave, always_call=True).remove)
            yield

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """What is made and freed inside is left out, as if one operation did all."""
        before = len(self.timeline.allocations)
        yield
        made = self.timeline.allocations
        made[before:] = [one for one in made[before:] if one.died is None]

    def turn(self) -> None:
        """The forward pass has ended."""
        self._tick += 1
        self.timeline.turn = self._tick

    def finish(self) -> Timeline:
        """The backward pass has ended."""
        self._tick += 1
        self.timeline.end = self._tick
        return self.timeline

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._tick += 1
        recomputed = self.timeline.turn > 0 and self._depth > 0
        logits = tensor.dim() > 1 and tensor.shape[-1] in self.widths
        made = Allocation(storage.nbytes(), self._tick, recomputed=recomputed, logits=logits)
        self.timeline.allocations.append(made)
        self._follow(storage, made)

    def _follow(self, storage: Any, made: Allocation | None) -> None:
        key = id(storage)
        self._known[key] = made
        weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        made = self._known.pop(key, None)
        if made is not None:
            made.died = self._tick + 1

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self.fake is None:
            return func(*args, **kwargs)
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*self._with_places(func, args), **kwargs)
        tried = self._imagined(func, args, kwargs)
        made = [leaf for leaf in tree_leaves(tried) if isinstance(leaf, Tensor)]
        if any(tensor.numel() > LARGEST_REAL or (not given and tensor.is_floating_point()) for tensor in made):
            return tried
        return func(*args, **kwargs)

    def _imagined(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result as fake tensors; None where it depends on values."""
        assert self.fake is not None
        args, kwargs = tree_map_only(Tensor, self.fake.from_tensor, (args, kwargs))
        try:
            with self.fake:
                return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            return None

    def _with_places(self, func: Any, args: Any) -> Any:
        """Real boolean indices as places, whose number says the shape of what they pick."""
        if func not in _INDEXED:
            return args
        places: list[Tensor | None] = []
        for index in args[1]:
            real = isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool
            places += index.nonzero(as_tuple=True) if real else [index]
        return (args[0], places, *args[2:])


def record(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    fake: FakeTensorMode | None = None,
    widths: Sequence[int] = (),
    inputs: Iterable[Tensor] = (),
) -> Timeline:
    """The timeline of `loss()` and its backward pass.

    Args:
        model: its parameters and buffers are not part of the timeline; those that are trained get a gradient.
        loss: runs the forward pass; it must have built nothing before.
        fake: see `Recorder`.
        widths: see `Recorder`.
        inputs: tensors that `loss` holds, counted as activations.
    """
    recorder = Recorder(fake, widths)
    recorder.know([*model.parameters(), *model.buffers()])
    for tensor in inputs:
        recorder._note(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arrived = recorder.accumulated
    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in trained]  # type: ignore[no-untyped-call]
    token = around.set(recorder.as_one)
    try:
        with recorder, recorder.module_depth():
            value = loss()
            recorder.turn()
            value.backward()  # type: ignore[no-untyped-call]
        return recorder.finish()
    finally:
        around.reset(token)
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
