"""Audit of a training run's first steps: is every mask learning, and is the start a sane one?

`MaskAudit` is a callback for any Transformers or TRL trainer over a model with mask adapters:

    SFTTrainer(model, ..., callbacks=[MaskAudit()])

It looks once before training, at the gradients of the first optimizer step, at the scores after it, and at the end.
Each finding names the modules and says what to change; findings are warnings, or with `strict=True` one `AuditError`
that stops the run. A healthy run has none.

Vanishing gradients, a start far from the pre-trained model and masks on shallow or deep layers alone are failures that
arXiv 2512.23073 reports; the thresholds are ours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from maskft.errors import AuditError, gathered
from maskft.linear import Mask
from maskft.targets import find_weights
from maskft.tuner import MaskConfig, MaskLayer
from maskft.tuner.base import whole_weight
from maskft.tuner.sharding import is_first_process, is_partitioned, mean_over_processes, whole

NEAR_START = 0.9
"""A soft gate that starts below this is far from the pre-trained model: ten layers in a row would scale by 0.35."""
SATURATED = 1e-4
"""A gate closer than this to the end of its range, in units of it, has next to no gradient left."""
COLLAPSED = 2.0
"""Nats by which the first loss may exceed the base's."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Something that will keep masks from learning.

    Attributes:
        kind: "no-gradient", "not-finite", "vanishing", "saturated", "unmoved", "far-start", "collapsed", "shallow" or
            "deep".
        message: what was found, where, and what to change.
    """

    kind: str
    message: str


def masked_layers(model: Any, adapter_name: str) -> dict[str, MaskLayer]:
    """The adapter's masked layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MaskLayer) and adapter_name in module.mask_layout
    }


def start_findings(model: Any, adapter_name: str, config: MaskConfig) -> Iterator[Finding]:
    """What can be told before the first step."""
    if config.gate == "soft" and config.init_gate < NEAR_START:
        yield Finding(
            "far-start",
            f"the soft gate starts at {config.init_gate}: every masked weight is scaled by it before the first step. "
            f"Set init_gate to {NEAR_START} or more, or use gate 'normalized', which starts at exactly 1.",
        )
    depth, masked = _language_layers(model, adapter_name)
    for kind, alone in (("shallow", max(masked) < depth / 3), ("deep", min(masked) >= 2 * depth / 3)) if masked else ():
        if alone and depth >= 3:
            yield Finding(
                kind,
                f"only layers {min(masked)} to {max(masked)} of the language model's {depth} are masked. Masking {kind}"
                " layers alone is reported to cost 3 to 5 points; set layers to 'all' or 'middle-third'.",
            )


@dataclass(frozen=True)
class Gradient:
    """What the audit keeps of one tensor's gradient.

    Attributes:
        any: whether an entry is not zero.
        finite: whether every entry is.
        median: of the sizes of at most about a million entries.
    """

    any: bool
    finite: bool
    median: float


def summary(gradient: Any) -> Gradient:
    """The summary of a gradient tensor."""
    size = whole(gradient).abs()
    some = size.flatten()[:: max(1, size.numel() // 1_000_000)].float()
    return Gradient(bool(size.any()), bool(torch.isfinite(size).all()), float(some.median()))


def gradient_findings(
    model: Any, adapter_name: str, epsilon: float | None, seen: Mapping[Tensor, Gradient] = MappingProxyType({})
) -> Iterator[Finding]:
    """What the gradients of one step tell; `epsilon` is Adam's, if it has one; `seen` sums up those already gone."""
    without, broken, small = [], [], []
    for name, layer in masked_layers(model, adapter_name).items():
        parts = layer.parameters_of(adapter_name)
        gradients = [seen[p] if p in seen else summary(p.grad) for p in parts if p in seen or p.grad is not None]
        if not any(g.any for g in gradients):
            without.append(name)
        elif not all(g.finite for g in gradients):
            broken.append(name)
        elif epsilon is not None and all(g.median < epsilon for g in gradients):
            small.append(name)
    if without:
        yield Finding(
            "no-gradient",
            f"{len(without)} masks got no gradient and will not learn. Their layers take no part in the forward pass "
            f"(take them out of target_modules), or gradients vanish (set init_gate further from 1):\n"
            f"{gathered(without)}",
        )
    if broken:
        yield Finding(
            "not-finite",
            f"{len(broken)} masks have gradients that are not finite. Lower the learning rate, or train in bf16 "
            f"instead of fp16:\n{gathered(broken)}",
        )
    if small:
        yield Finding(
            "vanishing",
            f"in {len(small)} masks most score gradients are below Adam's epsilon of {epsilon:g}, which damps their "
            f"steps. Set training.adam_epsilon to 1e-12, or init_gate further from 1:\n{gathered(small)}",
        )


def score_findings(model: Any, adapter_name: str) -> Iterator[Finding]:
    """What the scores themselves tell."""
    broken, saturated = [], []
    for name, layer in masked_layers(model, adapter_name).items():
        if not all(torch.isfinite(whole(parameter)).all() for parameter in layer.parameters_of(adapter_name)):
            broken.append(name)
        elif _saturated_share(layer, adapter_name) > 0.5:
            saturated.append(name)
    if broken:
        yield Finding(
            "not-finite",
            f"{len(broken)} masks have scores that are not finite. Lower the learning rate:\n{gathered(broken)}",
        )
    if saturated:
        yield Finding(
            "saturated",
            f"in {len(saturated)} masks more than half of the gates are at the end of their range, where gradients "
            f"vanish. Lower the learning rate or raise the temperature, so that lr / temperature is smaller:\n"
            f"{gathered(saturated)}",
        )


def collapse_finding(loss: float, base_loss: float, config: MaskConfig) -> Iterator[Finding]:
    """Whether the masked model's first loss is far above the base's, both in nats."""
    if loss - base_loss <= COLLAPSED and math.isfinite(loss):
        return
    advice = {
        "topk": f"keep_ratio is {config.keep_ratio}; keep more, or cut the smallest weights first (init_weights true)",
        "soft": f"init_gate is {config.init_gate}; set it nearer to 1, or use gate 'normalized'",
    }.get(config.gate, "set init_weights to true")
    yield Finding(
        "collapsed",
        f"the first loss is {loss:.2f}, the base's {base_loss:.2f}: the start breaks the model. Here {advice}.",
    )


def flipped_share(model: Any, adapter_name: str) -> float | None:
    """Share of a hard mask's entries that differ from a start at zero offsets; None for soft gates."""
    flipped = total = 0
    for layer in masked_layers(model, adapter_name).values():
        mask, weight = _whole_mask(layer, adapter_name)
        if not getattr(mask.gate, "hard", False):
            return None
        with torch.no_grad():
            offset = mask.offset(weight)
            change = mask.gate.value(offset, weight) != mask.gate.value(torch.zeros_like(offset), weight)
        flipped += int(change.sum())
        total += change.numel()
    return flipped / total if total else None


class MaskAudit(TrainerCallback):
    """Runs the audit as a trainer's callback; see the module's docstring.

    Args:
        strict: stop with `AuditError` instead of warning.

    Attributes:
        findings: everything found so far.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.findings: list[Finding] = []
        self._first = True
        self._compared = False
        self._before: dict[str, tuple[float, ...]] = {}
        self._seen: dict[Tensor, Gradient] = {}

    def see_gradient(self, parameter: Tensor) -> None:
        """Look at a gradient that will be gone when the first step ends."""
        if self._first and parameter.grad is not None:
            self._seen[parameter] = summary(parameter.grad)

    def report(self, findings: Iterable[Finding]) -> None:
        """Warn of findings, or raise."""
        new = list(findings)
        self.findings += new
        if self.strict and new:
            raise AuditError("\n".join(finding.message for finding in new))
        for finding in new if is_first_process() else ():
            logger.warning("audit: %s", finding.message)

    def wants_base_loss(self, model: Any) -> bool:
        """Whether the first batch has not been looked at yet and the start may be off the base's."""
        return self._first and not self._compared and any(not _at_base(model, name) for name, _ in _active(model))

    def first_batch(
        self, model: Any, inputs: Mapping[str, Any], loss: Callable[[Any, Mapping[str, Any]], Tensor]
    ) -> None:
        """Compare the masked model's loss on a batch with its base's; random numbers are left as they were.

        The model may be wrapped for several processes, each of which calls this with a batch of its own.
        """
        self._compared = True
        with torch.no_grad(), torch.random.fork_rng():
            losses = [loss(model, inputs).float()]
            with _unwrapped(model).disable_adapter():
                losses.append(loss(model, inputs).float())
            masked, base = mean_over_processes(torch.stack(losses)).tolist()
        for _, config in _active(model):
            self.report(collapse_finding(masked, base, config))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._first = state.global_step == 0
        for name, config in _active(model):
            if self._first:
                self._before[name] = _sums(model, name)
            self.report(start_findings(model, name, config))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not self._first:
            return
        epsilon = getattr(optimizer, "param_groups", [{}])[0].get("eps")
        for name, _ in _active(model):
            if _gradients_are_whole(model, name):
                self.report(gradient_findings(model, name, epsilon, self._seen))
        self._seen = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._first:
            return
        self._first = False
        for name, _ in _active(model):
            self.report(score_findings(model, name))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, config in _active(model):
            if self._before.get(name) == _sums(model, name):
                what = "no score has changed"
            elif config.init_weights is True and config.ranking == "matrix" and flipped_share(model, name) == 0:
                what = "scores have changed but no entry of the mask has flipped"
            else:
                continue
            advice = "Raise the learning rate (a score moves by about it per step), and check that the optimizer holds "
            self.report([Finding("unmoved", f"{what} in {state.global_step} steps. {advice}the scores.")])


def _language_layers(model: Any, adapter_name: str) -> tuple[int, set[int]]:
    """How many layers the language model has, and the numbers of those with a mask."""
    places = {w.name: w.layer for w in find_weights(model) if w.part == "language" and w.layer is not None}
    masked = {name.replace(".base_layer", "") for name in masked_layers(model, adapter_name)}
    found = {layer for name, layer in places.items() if name in masked or name.rpartition(".")[0] in masked}
    return max(places.values(), default=-1) + 1, found


def _unwrapped(model: Any) -> Any:
    """The PEFT model inside what trains it on many machines."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _at_base(model: Any, adapter_name: str) -> bool:
    """Whether every gate is exactly 1 now."""
    return all(
        layer.mask_gate[adapter_name].identity_at_start
        and not any(whole(p).any() for p in layer.parameters_of(adapter_name))
        for layer in masked_layers(model, adapter_name).values()
    )


def _active(model: Any) -> list[tuple[str, MaskConfig]]:
    """Active mask adapters of a model, however it is wrapped."""
    model = _unwrapped(model)
    configs = getattr(model, "peft_config", {})
    if not configs:  # Transformers models have the other attribute, which raises without adapters
        return []
    active = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active
    return [(name, configs[name]) for name in names if isinstance(configs.get(name), MaskConfig)]


def _sums(model: Any, adapter_name: str) -> tuple[float, ...]:
    """A number for each score tensor that changes when the tensor does."""
    parameters = (p for layer in masked_layers(model, adapter_name).values() for p in layer.parameters_of(adapter_name))
    return tuple(float(whole(p).double().square().sum()) for p in parameters)


def _gradients_are_whole(model: Any, adapter_name: str) -> bool:
    """Whether gradients lie where autograd puts them, and not in DeepSpeed's own buffers."""
    first = next(iter(masked_layers(model, adapter_name).values()), None)
    return first is not None and not is_partitioned(first.parameters_of(adapter_name)[0])


def _whole_mask(layer: MaskLayer, adapter_name: str) -> tuple[Mask, Tensor]:
    """The adapter's mask and the matrix under it, put together by all processes where they are in pieces."""
    mask = layer.mask(adapter_name)
    return replace(mask, parameters=tuple(whole(p) for p in mask.parameters)), layer.matrix(whole_weight(layer))


def _saturated_share(layer: MaskLayer, adapter_name: str) -> float:
    """Share of gates near an end of their range; 0 for hard gates, which are always there."""
    mask, weight = _whole_mask(layer, adapter_name)
    if getattr(mask.gate, "hard", False):
        return 0.0
    with torch.no_grad():
        offset = mask.offset(weight)
        value = mask.gate.value(offset, weight)
        top = float(mask.gate.value(torch.full((1, 1), math.inf), torch.ones(1, 1)))
        return float(((value < SATURATED * top) | (value > (1 - SATURATED) * top)).float().mean())
