"""How much memory training takes beside the frozen weights: one choice of three.

    mode      scores      moments   gradients               bytes per score
    fast      fp32  (4)   fp32 (8)  freed as they are used  12
    balanced  bf16  (2)   int8 (2)  bf16, all kept (2)      6.03
    tight     bf16  (2)   int8 (2)  freed as they are used  4.03

Beside that stands the gradient of one layer and, while a layer is computed, what its gate and masked weight take.
Where gradients must be kept (accumulation, copies of the model in several processes) `fast` takes 16 and `tight` 6.03
bytes. bf16 scores are rounded stochastically, see `maskft.optim`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from maskft.compiling import compiled
from maskft.errors import UserError, did_you_mean
from maskft.gates import Gate, TopK
from maskft.linear import Mask, WeightCache, masked_and_gradient, masked_matrix
from maskft.optim import NUMBERS, ScoreAdamW, adamw, adamw_8bit
from maskft.scores import Dense
from maskft.stepping import StepInBackward
from maskft.tuner import MaskLayer

_ALONE = "alone"
"""In the optimizer's state: the layer runs once per step. A resumed run knows it from its first step on."""


@dataclass(frozen=True)
class Mode:
    """A bundle of settings.

    Attributes:
        score_dtype: dtype of the scores, and so of their gradients.
        moments: "float32" or "int8", of Adam.
        step_in_backward: update scores inside the backward pass, wherever that is possible.
    """

    score_dtype: str
    moments: str
    step_in_backward: bool

    def bytes_per_score(self, *, gradients_kept: bool = False) -> float:
        """Scores, moments and, where they are kept, gradients; bytes for each score of a dense mask."""
        size = 4 if self.score_dtype == "float32" else 2
        moments = 8 if self.moments == "float32" else 2 + 8 / 256
        return size + moments + (size if gradients_kept or not self.step_in_backward else 0)


MODES = {
    "fast": Mode("float32", "float32", step_in_backward=True),
    "balanced": Mode("bfloat16", "int8", step_in_backward=False),
    "tight": Mode("bfloat16", "int8", step_in_backward=True),
}


def memory_mode(name: str) -> Mode:
    """The mode of a name.

    Raises:
        UserError: there is no such mode.
    """
    if name not in MODES:
        raise UserError(f"memory is '{name}'; allowed: {', '.join(MODES)}.{did_you_mean(name, MODES)}")
    return MODES[name]


def use_kernels(model: Any) -> None:
    """Compute the model's masks by compiled code."""
    for layer in _masked_layers(model):
        layer.compiled = True


def cache_weights(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Keep each masked weight until the optimizer changes its scores, which takes 2 bytes per weight in bf16.

    It pays where several forward passes are made for one step.
    """
    for layer in _masked_layers(model):
        layer.weight_cache = WeightCache()

    def changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # fused optimizers don't say so themselves
        increment_version([p for group in optimizer.param_groups for p in group["params"]])

    optimizer.register_step_post_hook(changed)


@contextlib.contextmanager
def cached_weights(model: Any) -> Iterator[None]:
    """Compute each masked weight once for the duration of the block, in which no scores may change.

    It takes as much memory as the weights, which is less than training takes. Quantised weights are left as they are,
    since their masked form is not.
    """
    layers = [layer for layer in _masked_layers(model) if isinstance(layer.weight_source(), Tensor)]
    before = [layer.weight_cache for layer in layers]
    for layer in layers:
        layer.weight_cache = WeightCache()
    try:
        yield
    finally:
        for layer, cache in zip(layers, before, strict=True):
            layer.weight_cache = cache


def fuse_steps(model: Any, stepper: StepInBackward) -> None:
    """Let layers with dense scores make the step of these without writing down their gradient, one pass in all.

    That is done for layers whose first step showed that they run once per step, and where nothing is clipped, the
    optimizer is a `ScoreAdamW` and the gate looks at each entry alone, as one that ranks does when it has its cut; all
    others go on as they are.
    """
    optimizer = stepper.optimizer
    if not isinstance(optimizer, ScoreAdamW) or stepper.max_norm > 0:
        return
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for layer in _masked_layers(model):
        for name, layout in layer.mask_layout.items():
            scores = layer.parameters_of(name)[0]
            gate = layer.mask_gate[name]
            alone = getattr(gate, "elementwise", False) or isinstance(gate, TopK)
            if alone and isinstance(layout, Dense) and scores in trained and scores.is_contiguous():
                step = layer.score_steps[name] = FusedStep(stepper, scores)
                stepper.ended.append(step.end)


class FusedStep:
    """The step of one layer's dense scores, made by one pass over weight, gradient, scores and moments.

    With accumulation gradients of the masked weight are added up, whose scores don't change meanwhile, and the gate's
    derivative is applied to their sum.
    """

    def __init__(self, stepper: StepInBackward, scores: Tensor) -> None:
        self._stepper, self._scores = stepper, scores
        self._calls = 0
        self._once = False

    def takes(self) -> bool:
        """Whether to take the gradient of this backward pass: after a first step in whose last pass the layer ran once.

        Raises:
            RuntimeError: the layer has made its step already.
        """
        self._calls += self._stepper.ready()
        self._once = self._once or _ALONE in self._stepper.optimizer.state.get(self._scores, {})  # of a resumed run
        if self._once and self._calls > 1:
            raise RuntimeError(
                "a second backward pass came before the optimizer's step(), but scores have been updated in the first. "
                "Call step() after each, say by `ready` which one is the last, or use memory 'balanced'."
            )
        return self._once

    def end(self) -> None:
        """A training step has ended."""
        self._once, self._calls = self._calls == 1 or (self._once and self._calls == 0), 0
        if self._once and self._scores in self._stepper.optimizer.state:
            self._stepper.optimizer.state[self._scores][_ALONE] = torch.ones(())

    @torch.no_grad()
    def __call__(self, mask: Mask, weight: Tensor, dmasked: Tensor) -> Tensor:
        """See `maskft.linear.ScoreStep`."""
        optimizer = self._stepper.optimizer
        assert isinstance(optimizer, ScoreAdamW)
        if self._scores in optimizer.pending:
            dmasked = optimizer.pending.pop(self._scores).add_(dmasked)
        if not self._stepper.ready():
            optimizer.pending[self._scores] = dmasked
            return masked_matrix(mask, weight, dmasked.dtype)
        parts = optimizer.begin(self._scores, self._stepper.group(self._scores))
        moments = parts.moments
        tensors = [dmasked, weight, mask.parameters[0]]
        if parts.noise[0] is None and all(t.is_contiguous() for t in tensors):  # one compilation for all shapes
            tensors, moments = [t.view(-1) for t in tensors], tuple(m.view(-1) for m in moments)
        masked, squared_norm = _fused_step(mask.gate, *tensors, *parts.noise, *moments, *parts.numbers)
        self._stepper.squared_norms.append(squared_norm)
        increment_version([self._scores])
        return masked.view(weight.shape)


@compiled
def _fused_step(
    gate: Gate,
    dmasked: Tensor,
    weight: Tensor,
    scores: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    *rest: Tensor,
) -> tuple[Tensor, Tensor]:
    """W' and the squared norm of the gradient; `rest` are moments and numbers as `maskft.optim.adamw` takes them."""
    masked, gradient = masked_and_gradient(dmasked, weight, scores, gate)
    update: Any = adamw if len(rest) == 2 + NUMBERS else adamw_8bit
    update(scores, gradient, *rest[:-NUMBERS], rows, columns, *rest[-NUMBERS:])
    return masked, gradient.square().sum()


def _masked_layers(model: Any) -> list[MaskLayer]:
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def score_optimizer(
    model: Any,
    memory: str = "fast",
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    ready: Callable[[], bool] = lambda: True,
    watch: Callable[[Tensor], None] = lambda parameter: None,
) -> ScoreAdamW:
    """The optimizer of a memory mode over a model's trainable parameters, for a training loop or a trainer.

    The model's masks must have been made with the mode's `score_dtype`. Masks are computed by compiled code from then
    on.

    Args:
        model: a PEFT model with masks.
        memory: "fast", "balanced" or "tight".
        lr, betas, eps, weight_decay: of AdamW. Score gradients are tiny, so eps is.
        max_norm: in modes that step inside the backward pass, the largest norm of one tensor's gradient; 0 does not
            clip, and is faster. Elsewhere the training loop clips.
        ready: with accumulation, whether this backward pass completes the gradients.
        watch: called with each parameter whose gradient is about to be used and freed.

    Raises:
        UserError: no such mode, or scores of another dtype.
    """
    mode = memory_mode(memory)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = getattr(torch, mode.score_dtype)
    scores = [p for layer in _masked_layers(model) for p in layer.scores() if p.requires_grad]
    if any(score.dtype != wanted for score in scores):
        raise UserError(
            f"memory '{memory}' is for scores in {mode.score_dtype}: MaskConfig(score_dtype='{mode.score_dtype}')."
        )
    use_kernels(model)
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer = ScoreAdamW(trained, moments=mode.moments, **settings)
    if mode.step_in_backward:
        fuse_steps(model, StepInBackward(optimizer, max_norm, ready, watch))
    return optimizer


def keep_inputs_frozen(model: Any) -> None:
    """Let gradients end before what is frozen, under gradient checkpointing that is not reentrant.

    Transformers and TRL mark the outputs of every input embedding as in need of gradients, which only reentrant
    checkpointing has a use for. The vision encoder's are among them: frozen, it would be computed twice and take part
    in the backward pass for nothing.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.enable_input_require_grads = _leave_as_it_is


def _leave_as_it_is() -> None:
    pass


def keep_freed_memory(most: int = 1 << 30) -> None:
    """Let glibc keep freed memory. By default it hands every large tensor back to the kernel, and the page faults of
    the next one cost a fifth of a training step on a CPU. Without effect elsewhere.

    Args:
        most: bytes to keep at the end of the heap; -1 keeps all.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
        for option, size in ((mmap_threshold, 1 << 30), (trim_threshold, most), (top_pad, 1 << 26)):
            libc.mallopt(option, size)


def return_freed_memory() -> None:
    """Let glibc hand every tensor of 64 KiB or more back to the kernel once it is freed. Layers that are put together
    from pieces and freed again would otherwise leave gaps that add up to more than the model. Without effect elsewhere.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold = -3  # <malloc.h>
        libc.mallopt(mmap_threshold, 1 << 16)
