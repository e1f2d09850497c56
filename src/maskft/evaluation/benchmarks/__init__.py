"""The six benchmarks of the field, scored as their official scorers do. One file each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from maskft.errors import UserError, did_you_mean
from maskft.evaluation.benchmarks.common import Answer, Question, Score, read_answers

__all__ = ["BENCHMARKS", "Answer", "Benchmark", "Question", "Score", "benchmark", "read_answers"]

BENCHMARKS: tuple[str, ...] = ("gqa", "mmmu", "mme", "pope", "scienceqa", "textvqa")


class Benchmark(Protocol):
    """What each benchmark's module offers. `data` is the folder that holds gqa/, MME/, pope/ and so on."""

    MAX_NEW_TOKENS: int

    def read(self, data: Path) -> Any:
        """What scoring needs, as the module's own Annotations. Raises DataError."""

    def questions(self, data: Path) -> list[Question]:
        """What the model is asked, in the order of the question file. Raises DataError."""

    def score(self, annotations: Any, answers: Sequence[Answer]) -> Score:
        """The official score of the answers, whose order does not matter. Raises DataError."""


def benchmark(name: str) -> Benchmark:
    """The module of the benchmark of that name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in BENCHMARKS:
        hint = did_you_mean(name.lower(), BENCHMARKS)
        raise UserError(f"there is no benchmark '{name}'; there are {', '.join(BENCHMARKS)}.{hint}")
    return cast(Benchmark, import_module(f"maskft.evaluation.benchmarks.{name}"))
