"""maskft score"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from maskft.cli.output import print_json, result_console
from maskft.evaluation.benchmarks import benchmark, read_answers

TITLES = {
    "gqa": "GQA accuracy, %",
    "mmmu": "MMMU accuracy, %",
    "mme": "MME perception, points",
    "pope": "POPE mean F1, %",
    "scienceqa": "ScienceQA-IMG accuracy, %",
    "textvqa": "TextVQA accuracy, %",
}


def run(name: str, answers_file: Path, *, data: Path, as_json: bool) -> None:
    bench = benchmark(name)
    answers = read_answers(answers_file)
    result = bench.score(bench.read(data), answers)
    if as_json:
        scored = {"answers": str(answers_file), "questions": len(answers)}
        print_json({"benchmark": name, **result.to_dict(), **scored})
    else:
        console = result_console(as_json)
        console.print(_table(TITLES[name], result.score, result.details))
        console.print(f"{len(answers)} answers of {answers_file}", markup=False)


def _table(title: str, score: float, details: Mapping[str, Any]) -> Table:
    table = Table(title="scored as the official scorer does")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_row(title, _shown(score), style="bold", end_section=True)
    for name, value in _flat(details):
        table.add_row(escape(name), escape(_shown(value)))
    return table


def _flat(details: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every entry of nested details, named by its path: {"random": {"yes_ratio": 50.0}} is "random, yes ratio"."""
    for key, value in details.items():
        here = (*path, key.replace("_", " "))
        if isinstance(value, Mapping):
            yield from _flat(value, here)
        else:
            yield ", ".join(here), value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
