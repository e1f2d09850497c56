"""Peak memory of one training step, by part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskft.errors import ModelError, UserError
from maskft.memory import keep_inputs_frozen
from maskft.plan.skeleton import Skeleton, imagine
from maskft.plan.step import CHUNK_WORDS, Load, batch, image_tokens, make_loss
from maskft.plan.trace import ROLES, Curves, Timeline, record
from maskft.plan.ways import Way, moment_bytes, pack
from maskft.tuner import MaskLayer

PARTS = ("base", "trained", "moments", *ROLES, "gathered")


@dataclass(frozen=True)
class Peak:
    """Bytes in use at the moment of a step when most are.

    Attributes:
        base: frozen weights and buffers.
        trained: scores, adapters, or with full fine-tuning the weights.
        moments: of Adam.
        gradients: of what is trained.
        activations: kept for the backward pass, inputs included.
        logits: of the loss.
        temporary: all else that operations need.
        gathered: layers that are put together from the pieces of several processes.
        moment: "forward" or "backward", when the peak is reached.
        seen: whether an image went through the vision encoder.
    """

    base: int
    trained: int
    moments: int
    gradients: int
    activations: int
    logits: int
    temporary: int
    gathered: int
    moment: str
    seen: bool

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)

    def as_dict(self) -> dict[str, Any]:
        """All fields and the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Sizes:
    """Bytes of what stands through a whole step.

    Attributes:
        base, trained, moments: as in `Peak`.
        gradients: of all that is trained, together.
        layer: the largest layer of the language model, with what is trained in it and its gradients.
        rest: what lies neither in these layers nor in the vision encoder.
        masked: masked weights, in the dtype they are computed in.
    """

    base: int
    trained: int
    moments: int
    gradients: int
    layer: int
    rest: int
    masked: int


@dataclass(frozen=True)
class _Pass:
    """A forward and a backward pass of a model of some depth, and the model, which has no values."""

    timeline: Timeline
    model: nn.Module
    seen: bool


class Predictor:
    """Predictions for one base; passes that several of them need are made once."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._passes: dict[Any, _Pass] = {}

    def predict(self, way: Way, load: Load, *, ranks: int = 1) -> Peak:
        """The peak of one step of one of `ranks` processes, which hold base and training state in pieces.

        Raises:
            ModelError: the model cannot be run without values.
        """
        way = way if ranks == 1 else way.in_pieces()
        caches = ranks == 1 and load.accumulation > 1 and way.caches
        early = way.mode.step_in_backward and load.autocast != torch.float16  # whose gradients are scaled
        early = early and (load.accumulation == 1 or way.adds_up)
        way = replace(way, mode=replace(way.mode, step_in_backward=early))
        gradients = "elsewhere" if load.accumulation > 1 else "freed" if early else "kept"
        targets = [*(way.config.target_modules or ()), *(way.config.target_parameters or ())]
        repetition = self.skeleton.repetition(targets)
        depths: tuple[int | None, ...] = (None,) if repetition is None else repetition.lengths()
        factor = 0 if repetition is None else repetition.factor()
        passes = [self._pass(way, load, depth) for depth in depths]
        halves = [(p.timeline.curves(gradients=gradients), p.timeline.turn) for p in passes]
        found = halves[0] if len(halves) == 1 else _extended(*halves[0], *halves[1], factor)
        if found is None:
            passes, factor = [self._pass(way, load, None)], 0
            found = passes[0].timeline.curves(gradients=gradients), passes[0].timeline.turn
        curves, turn = found
        short, longer = (asdict(self._sizes(p.model, way)) for p in (passes[0], passes[-1]))
        sizes = Sizes(**{name: value + factor * (longer[name] - value) for name, value in short.items()})
        standing = 0
        if gradients == "elsewhere":
            standing = sizes.masked if early else sizes.gradients
        peak = _peak(curves, turn, sizes, standing, passes[0].seen)
        if caches:
            peak = replace(peak, temporary=peak.temporary + sizes.masked)
        return peak if ranks == 1 else _in_pieces(peak, sizes, ranks)

    def _pass(self, way: Way, load: Load, depth: int | None) -> _Pass:
        key = (way.key(), replace(load, accumulation=1), depth)
        if key not in self._passes:
            self._passes[key] = _run(self.skeleton, way, load, depth)
        return self._passes[key]

    def _sizes(self, model: Any, way: Way) -> Sizes:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        trained = [p for p in model.parameters() if p.requires_grad]
        layers = list(base.get_submodule(self.skeleton.stack).children()) if self.skeleton.stack else []
        vision = self.skeleton.vision()
        apart = [*layers, *([base.get_submodule(vision)] if vision else [])]
        together = _bytes([*model.parameters(), *model.buffers()])
        return Sizes(
            base=together - _bytes(trained),
            trained=_bytes(trained),
            moments=sum(moment_bytes(way.mode, p) for p in trained),
            gradients=_bytes(trained),
            layer=max((_with_gradients(layer) for layer in layers), default=0),
            rest=together - _bytes(p for module in apart for p in (*module.parameters(), *module.buffers())),
            masked=sum(_masked_bytes(m, model.dtype) for m in model.modules() if isinstance(m, MaskLayer)),
        )


def _run(skeleton: Skeleton, way: Way, load: Load, depth: int | None) -> _Pass:
    """Run one forward and backward pass without values."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = way.attached(skeleton, depth)
    config = model.config
    try:
        imagine(model, fake)
        if way.quantization != "none":
            pack(model, skeleton.quantised(depth), way.quantization)
        model.train()
        if load.checkpointing:
            keep_inputs_frozen(model)
            kept = {"use_reentrant": False, "preserve_rng_state": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
        image = image_tokens(model, fake) if load.images else None
        inputs = batch(load, config, image)
        vocabulary = config.get_text_config().vocab_size
        timeline = record(
            model,
            make_loss(model, inputs, load),
            fake=fake,
            widths=(vocabulary, CHUNK_WORDS) if load.device == "gpu" else (vocabulary,),
            inputs=inputs.values(),
        )
    except UserError:
        raise
    except Exception as error:  # whatever a model does that needs values
        raise ModelError(
            f"{type(skeleton.model).__name__} cannot be run without values, so its memory cannot be planned: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _Pass(timeline, model, image is not None)


def _extended(short: Curves, turn: int, longer: Curves, longer_turn: int, factor: int) -> tuple[Curves, int] | None:
    """Curves of a deep model, and the tick of its turn, from those of two models a period of layers apart.

    Before and after the turn each layer goes through the same ticks, so that two models match tick by tick, up to
    somewhere among the layers from the beginning, and from there on counted from the end. With each period more, the
    bytes at a tick change by the same number. The layers left out in between lie between the pieces in bytes too.

    None where the two don't match, so that nothing can be said from them.
    """
    first = short[:, : turn + 1], longer[:, : longer_turn + 1]
    second = short[:, turn + 1 :], longer[:, longer_turn + 1 :]
    pieces = []
    for a, b in (first, second):
        cut = _meeting(a, b)
        if cut is None:
            return None
        head, tail = cut, a.shape[1] - cut
        pieces += [a[:, :head] + factor * (b[:, :head] - a[:, :head])]
        pieces += [a[:, cut:] + factor * (b[:, -tail:] - a[:, cut:])]
    return np.concatenate(pieces, axis=1), turn


def _meeting(a: Curves, b: Curves) -> int | None:
    """A tick of `a` up to which it changes as `b` does from the beginning, and from which it does to the end.

    As near to the middle as there is one; never the first or last tick.
    """
    n = a.shape[1]
    changes, longer = np.diff(a.sum(axis=0)), np.diff(b.sum(axis=0))
    ahead = _agreement(changes, longer[: n - 1]) + 1
    behind = _agreement(changes[::-1], longer[::-1][: n - 1]) + 1
    lowest, highest = max(1, n - behind), min(ahead, n - 1)
    return min(max(n // 2, lowest), highest) if lowest <= highest else None


def _agreement(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> int:
    """How many entries are equal from the first one on."""
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)


def _peak(curves: Curves, turn: int, sizes: Sizes, standing: int, seen: bool) -> Peak:
    tick = int(curves.sum(axis=0).argmax())
    moving = dict(zip(ROLES, map(int, curves[:, tick]), strict=True))
    moving["gradients"] += standing  # of earlier passes of the step
    return Peak(
        base=sizes.base,
        trained=sizes.trained,
        moments=sizes.moments,
        **moving,
        gathered=0,
        moment="forward" if tick <= turn else "backward",
        seen=seen,
    )


def _in_pieces(peak: Peak, sizes: Sizes, ranks: int) -> Peak:
    """What one of several processes holds: its share, two layers in full, one used and one on its way, and what lies
    outside layers."""
    return replace(
        peak,
        base=-(-peak.base // ranks),
        trained=-(-peak.trained // ranks),
        moments=-(-peak.moments // ranks),
        gradients=-(-peak.gradients // ranks),
        gathered=2 * sizes.layer + sizes.rest,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Size of tensors, each storage once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def _masked_bytes(layer: MaskLayer, dtype: torch.dtype) -> int:
    packed = layer.frozen_parameter().dim() == 1
    return (layer.out_features * layer.in_features if packed else math.prod(layer.matrix_shape())) * dtype.itemsize


def _with_gradients(module: nn.Module) -> int:
    own = list(module.parameters())
    return _bytes([*own, *module.buffers()]) + _bytes(p for p in own if p.requires_grad)
