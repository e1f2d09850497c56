"""The gap between training and held-out loss, where runs have the same training loss: who learns more by rote?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft.errors import RunError
from maskft.runs import read_metrics

SMOOTHED = 5
"""Log entries whose mean is a training loss."""
LOG = "log.json"

Curve = Mapping[int, float]
"""A loss by step."""


@dataclass(frozen=True)
class Point:
    """Where a run first reaches a training loss.

    Attributes:
        step: of its log.
        training: its training loss there, smoothed.
        held_out: loss on the validation part there, between the nearest evaluations; None without any.
    """

    step: int
    training: float
    held_out: float | None

    @property
    def gap(self) -> float | None:
        """Held-out less training loss."""
        return None if self.held_out is None else self.held_out - self.training


def read_curves(run: Path) -> tuple[dict[int, float], dict[int, float]]:
    """A run's training and validation losses by step.

    Raises:
        RunError: it has no log, or one without losses.
    """
    path = run / LOG
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        curves = tuple({int(e["step"]): float(e[key]) for e in entries if key in e} for key in ("loss", "eval_loss"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} cannot be read as a training log: {error}. Train the run again.") from error
    if not curves[0]:
        raise RunError(f"{path} has no training loss. Set training.logging_steps below the number of steps.")
    return curves[0], curves[1]


def smoothed(curve: Curve, count: int = SMOOTHED) -> dict[int, float]:
    """Mean of each value and those before it, `count` at most."""
    steps = sorted(curve)
    return {step: _mean([curve[s] for s in steps[max(0, i - count + 1) : i + 1]]) for i, step in enumerate(steps)}


def common_level(curves: Sequence[Curve]) -> float:
    """The lowest smoothed training loss that every run reaches."""
    return max(min(smoothed(curve).values()) for curve in curves)


def at_level(training: Curve, held_out: Curve, level: float) -> Point | None:
    """Where the smoothed training loss is first at most `level`; None where it never is."""
    for step, loss in smoothed(training).items():
        if loss <= level:
            return Point(step, loss, _between(held_out, step))
    return None


def gaps(runs: Sequence[Path]) -> dict[str, Any]:
    """Runs at the lowest training loss that all reach, and at their ends.

    Returns:
        {"level", "runs": [{"run", "step", "training", "held_out", "gap", "last", "accuracy_gap"}]}. "last" is the gap
        at the last step; "accuracy_gap" the accuracy on training less test questions, where both were evaluated.

    Raises:
        RunError: a run has no log.
    """
    curves = [read_curves(run) for run in runs]
    level = common_level([training for training, _ in curves])
    found = []
    for run, (training, held_out) in zip(runs, curves, strict=True):
        point = at_level(training, held_out, level)
        assert point is not None  # every run reaches the level
        last = max(training)
        end = Point(last, smoothed(training)[last], _between(held_out, last))
        place = {"run": str(run), "step": point.step, "training": point.training, "held_out": point.held_out}
        found.append({**place, "gap": point.gap, "last": end.gap, "accuracy_gap": _accuracy_gap(run)})
    return {"level": level, "runs": found}


def _accuracy_gap(run: Path) -> float | None:
    metrics = read_metrics(run)
    try:
        return float(metrics["answers-train"]["tuned"]["accuracy"]) - float(metrics["tuned"]["accuracy"])
    except (KeyError, TypeError):
        return None


def _between(curve: Curve, step: int) -> float | None:
    """The curve's value at a step, on a straight line between its neighbours; beyond its ends the nearest one."""
    if not curve:
        return None
    before = max((s for s in curve if s <= step), default=min(curve))
    after = min((s for s in curve if s >= step), default=max(curve))
    if after <= before:
        return curve[before]
    share = (step - before) / (after - before)
    return curve[before] + share * (curve[after] - curve[before])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
