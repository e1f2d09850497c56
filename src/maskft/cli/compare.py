"""maskft compare"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from maskft.cli.output import percent, print_json, result_console
from maskft.errors import UserError

if TYPE_CHECKING:
    from maskft.evaluation.compare import Comparison, Side

ONE_RUN = "one run a side: the interval holds questions, not training seeds; another seed moves the result too"


def run(a: str, b: str | None, *, base: bool, split: str, as_json: bool) -> None:
    if split not in ("test", "validation") and not split.startswith("data-"):
        raise UserError(
            f"--split is '{split}'; it must be test or validation, or data-<folder>-<file> for data of your own."
        )
    if base == (b is not None):
        raise UserError("give two runs, or one with --base to compare what it learnt with its base.")
    from maskft.evaluation.compare import compare_runs, compare_with_base

    found = compare_with_base(_runs(a), split=split) if b is None else compare_runs(_runs(a), _runs(b), split=split)
    if as_json:
        print_json(asdict(found))
    console = result_console(as_json)
    console.print(_sides(found))
    if found.table is not None:
        console.print(_table(found.table))
    console.print(found.verdict)
    if len(found.a.runs) == len(found.b.runs) == 1:
        console.print(ONE_RUN)


def _runs(given: str) -> list[Path]:
    """Folders separated by commas; a folder whose name holds a comma is one."""
    if Path(given).exists():
        return [Path(given)]
    runs = [Path(part.strip()) for part in given.split(",") if part.strip()]
    if not runs:
        raise UserError(f"'{given}' names no run. Give a run's folder, or several separated by commas.")
    return runs


def _sides(found: Comparison) -> Table:
    from maskft.evaluation.metrics import METRIC_TITLES

    table = Table(
        title=f"{METRIC_TITLES[found.metric]} on {found.questions} {found.split} questions, {found.images} images"
    )
    for column in ("", "answers of", "mean", "95 % interval by image"):
        table.add_column(column, justify="left" if column in ("", "answers of") else "right", overflow="fold")
    for name, side in (("A", found.a), ("B", found.b)):
        table.add_row(name, _name(side), percent(side.mean), f"{percent(side.low)} to {percent(side.high)}")
    low, high = f"{100 * found.low:+.1f}", f"{100 * found.high:+.1f}"
    table.add_row("B - A", "", f"{100 * found.difference:+.1f}", f"{low} to {high}")
    return table


def _name(side: Side) -> str:
    return "\n".join(escape(run) if side.model == "tuned" else f"base of {escape(run)}" for run in side.runs)


def _table(counts: dict[str, int]) -> Table:
    table = Table(title="questions")
    for column in ("", "B right", "B wrong"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("A right", str(counts["both"]), str(counts["only_a"]))
    table.add_row("A wrong", str(counts["only_b"]), str(counts["neither"]))
    return table
