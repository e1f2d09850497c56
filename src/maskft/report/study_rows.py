"""Lines of a study's tables: one variant on one data set with one set of axis values, over its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maskft.evaluation.resampling import bootstrap_interval
from maskft.studies.definition import Cell, Study, cells
from maskft.studies.results import Part, Result

NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """A line of a table: one variant on one data set with one set of axis values, over its seeds.

    Attributes:
        cell: the first of its cells.
        seeds: how many the study asks for.
        results: those that are there.
    """

    cell: Cell
    seeds: int
    results: list[Result]

    @property
    def name(self) -> str:
        """Short, without the seed."""
        settings = " ".join(shown(value) for value in self.cell.settings.values())
        return " ".join(filter(None, (self.cell.variant, self.cell.data, settings)))

    def parts(self, name: str) -> list[Part]:
        """A part's answers, of the runs that answered it."""
        return [result.parts[name] for result in self.results if name in result.parts]


def rows(study: Study, results: Sequence[Result]) -> list[Row]:
    """Every line that the study asks for, with its results."""
    found: dict[str, Row] = {}
    for cell in cells(study, {}):
        own = [r for r in results if r.stage == "run" and r.seed in study.seeds and _same_line(r, cell)]
        found.setdefault(json.dumps([cell.group, cell.settings]), Row(cell, len(study.seeds), own))
    return list(found.values())


def judged(row: Row) -> list[Part]:
    """Answers to the test part, or to validation where no run answered that."""
    return row.parts("test") or row.parts("validation")


def mean_accuracy(parts: Sequence[Part]) -> float:
    """Over the runs."""
    return statistics.mean(part.tuned.accuracy for part in parts)


def gap(row: Row) -> float | None:
    """Mean accuracy in training minus in test; None where one of them was not answered."""
    train, test = row.parts("train"), row.parts("test")
    return mean_accuracy(train) - mean_accuracy(test) if train and test else None


def estimate(parts: Sequence[Part]) -> tuple[float, float, float]:
    """Mean accuracy over runs with its 95 % interval."""
    if len(parts) == 1:
        score = parts[0].tuned
        return score.accuracy, score.low, score.high
    scores = [part.scores() for part in parts]
    low, high = bootstrap_interval(scores, [f"{number:09d}" for number in range(len(scores[0]))])
    return mean_accuracy(parts), low, high


def told_accuracy(parts: Sequence[Part]) -> str:
    """Mean accuracy and its interval in words."""
    if not parts:
        return NOT_RUN
    mean, low, high = estimate(parts)
    return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    return [_line(head), "|" + "---|" * len(head), *map(_line, lines)]


def shown(value: Any) -> str:
    """A setting's value in a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _same_line(result: Result, cell: Cell) -> bool:
    return (result.variant, result.data, result.settings) == (cell.variant, cell.data, cell.settings)
