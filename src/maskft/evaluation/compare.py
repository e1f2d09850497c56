"""Paired comparison: two runs, or a base and what was tuned, on the same questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskft.errors import RunError, gathered
from maskft.evaluation.evaluate import image_groups, scored
from maskft.evaluation.metrics import METRIC_TITLES
from maskft.evaluation.resampling import bootstrap_interval, difference_interval, mcnemar
from maskft.runs import run_recipe

SIGNIFICANT = 0.05
ENOUGH_IMAGES = 20
"""With fewer, an interval by resampling is too narrow to go by."""
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": (str, int),
    "question": str,
    "truth": str,
    "base": str,
    "tuned": str,
}
Key = tuple[Any, str, int]


@dataclass(frozen=True)
class Side:
    """One side: its run folders, whose answers count ("base" or "tuned"), the mean score and its 95 % interval."""

    runs: list[str]
    model: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What two sides make of the same questions.

    Attributes:
        metric, split: what was scored.
        questions, images: how many; a question without image counts as an image of its own.
        a, b: the sides. Their intervals hold images, or images and runs where there are several.
        difference: mean of b minus mean of a.
        low, high: its 95 % interval, paired bootstrap by image (and by run where there are several).
        table: questions that both, only a, only b and neither have right; None unless every score is 0 or 1.
        p: exact McNemar test of `table`, two-sided; None where there is none.
        better: "a", "b", or None where the two are not told apart.
        verdict: that in a sentence.
    """

    metric: str
    split: str
    questions: int
    images: int
    a: Side
    b: Side
    difference: float
    low: float
    high: float
    table: dict[str, int] | None
    p: float | None
    better: str | None
    verdict: str


def compare_runs(a: Sequence[Path], b: Sequence[Path], *, split: str = "test") -> Comparison:
    """Compare the tuned models of two sides; the runs of a side are one recipe with several seeds.

    Raises:
        RunError: a folder is no run, has no answers to the split, was scored by another metric, or answered other
            questions; names up to ten ids.
    """
    return _compare([(run, "tuned") for run in a], [(run, "tuned") for run in b], split)


def compare_with_base(runs: Sequence[Path], *, split: str = "test") -> Comparison:
    """Compare the base (side a) with the tuned models (side b) of the same runs.

    Raises:
        RunError: as `compare_runs`.
    """
    return _compare([(run, "base") for run in runs], [(run, "tuned") for run in runs], split)


def read_records(run: Path, split: str) -> list[dict[str, Any]]:
    """The records of `answers-<split>.jsonl`.

    Raises:
        RunError: the run has not been evaluated on that split, or the file is damaged.
    """
    path = run / f"answers-{split}.jsonl"
    if not path.is_file():
        option = "" if split == "test" else " --data FILE" if split.startswith("data-") else f" --split {split}"
        raise RunError(f"{run} has no {path.name}. Write it with: maskft evaluate {run}{option}")
    records, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: not valid JSON: {error}")
            continue
        if not isinstance(record, dict):
            problems.append(f"line {number}: not an object")
        elif wrong := [name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)]:
            problems.append(f"line {number}: {', '.join(wrong)} missing or of the wrong kind")
        else:
            records.append(record)
    if problems or not records:
        what = f"is damaged:\n{gathered(problems)}\n" if problems else "is empty. "
        raise RunError(f"{path} {what}Evaluate the run again.")
    return records


def _compare(a: Sequence[tuple[Path, str]], b: Sequence[tuple[Path, str]], split: str) -> Comparison:
    for side in (a, b):
        if twice := next((run for run, times in Counter(run for run, _ in side).items() if times > 1), None):
            raise RunError(f"{twice} is given twice on one side. Name each run once.")
    metric = _common_metric([run for run, _ in (*a, *b)])
    read = {run: read_records(run, split) for run, _ in (*a, *b)}
    first = a[0][0]
    keyed = {run: _keyed(records) for run, records in read.items()}
    for run in read:
        _require_same_questions(first, keyed[first], run, keyed[run])
    keys = list(keyed[first])

    def scores(side: Sequence[tuple[Path, str]]) -> list[list[float]]:
        in_order = [([keyed[run][key] for key in keys], model) for run, model in side]
        return [scored(metric, [record[model] for record in records], records) for records, model in in_order]

    groups = image_groups([keyed[first][key] for key in keys])
    images = len(set(groups))
    scores_a, scores_b = scores(a), scores(b)
    means = [float(np.mean(side)) for side in (scores_a, scores_b)]
    low, high = difference_interval(scores_a, scores_b, groups)
    table = _table(scores_a, scores_b)
    p = mcnemar(table["only_a"], table["only_b"]) if table else None
    better = _better(low, high, p, images)
    return Comparison(
        metric=metric,
        split=split,
        questions=len(keys),
        images=images,
        a=_side(a, scores_a, means[0], groups),
        b=_side(b, scores_b, means[1], groups),
        difference=means[1] - means[0],
        low=low,
        high=high,
        table=table,
        p=p,
        better=better,
        verdict=_verdict(better, metric, means[1] - means[0], (low, high), p, images),
    )


def _common_metric(runs: Sequence[Path]) -> str:
    metrics = {run: run_recipe(run).evaluation.metric for run in runs}
    if len(set(metrics.values())) > 1:
        lines = gathered([f"{run}: {metric}" for run, metric in metrics.items()])
        raise RunError(f"the runs are scored by different metrics, evaluation.metric of their recipes:\n{lines}")
    return metrics[runs[0]]


def _keyed(records: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Records by id, question and, where data repeats both, a count."""
    seen: Counter[tuple[Any, str]] = Counter()
    keyed: dict[Key, Mapping[str, Any]] = {}
    for record in records:
        pair = (record["id"], record["question"])
        keyed[(*pair, seen[pair])] = record
        seen[pair] += 1
    return keyed


def _require_same_questions(
    first: Path, expected: Mapping[Key, Mapping[str, Any]], run: Path, given: Mapping[Key, Mapping[str, Any]]
) -> None:
    """Every question of one in the other, with the same right answers."""

    def truth(record: Mapping[str, Any]) -> Any:
        return record["truth"], record.get("answers")

    kinds = {
        f"only in {first}": [key for key in expected if key not in given],
        f"only in {run}": [key for key in given if key not in expected],
        "with different right answers": [k for k in expected if k in given and truth(expected[k]) != truth(given[k])],
    }
    problems = [
        f"{len(keys)} question(s) {kind}, ids:\n{gathered([str(key[0]) for key in keys])}"
        for kind, keys in kinds.items()
        if keys
    ]
    if problems:
        raise RunError(
            f"{first} and {run} were not asked the same questions, so they can't be compared:\n"
            + "\n".join(problems)
            + "\nEvaluate both on the same data."
        )


def _table(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> dict[str, int] | None:
    """The 2 x 2 table of two single runs; None where there are several, or a score is neither 0 nor 1."""
    if len(a) > 1 or len(b) > 1 or not {*a[0], *b[0]} <= {0.0, 1.0}:
        return None
    counts = Counter(zip(a[0], b[0], strict=True))
    return {"both": counts[1, 1], "only_a": counts[1, 0], "only_b": counts[0, 1], "neither": counts[0, 0]}


def _side(
    side: Sequence[tuple[Path, str]], scores: Sequence[Sequence[float]], mean: float, groups: Sequence[str]
) -> Side:
    return Side([str(run) for run, _ in side], side[0][1], mean, *bootstrap_interval(scores, groups))


def _better(low: float, high: float, p: float | None, images: int) -> str | None:
    """Told apart only if the interval leaves zero out, stands on enough images, and the test, if any, agrees."""
    if low <= 0 <= high or images < ENOUGH_IMAGES or (p is not None and p >= SIGNIFICANT):
        return None
    return "b" if low > 0 else "a"


def _verdict(
    better: str | None, metric: str, difference: float, interval: tuple[float, float], p: float | None, images: int
) -> str:
    sign = -1 if better == "a" else 1
    low, high = sorted(100 * sign * end for end in interval)
    tested = "" if p is None else f", {show_p(p)}"
    few = f", but only {images} image(s)" if images < ENOUGH_IMAGES else ""
    by = f"{100 * sign * difference:+.1f} points of {METRIC_TITLES[metric]}"
    numbers = f"{by} (95 % interval {low:+.1f} to {high:+.1f}){tested}{few}"
    return f"not told apart: B is at {numbers}" if better is None else f"{better.upper()} is better: {numbers}"


def show_p(p: float) -> str:
    """ "p = 0.034", or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
