"""maskft study"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from maskft.cli.output import notes, percent, print_json, quiet_libraries, result_console
from maskft.errors import StudyError

if TYPE_CHECKING:
    from maskft.studies.results import Result


def run(
    file: Path,
    output: Path | None,
    *,
    storage: str | None,
    toy: bool,
    trials: int | None,
    known: Path | None,
    page: Path | None,
    heartbeat: int,
    as_json: bool,
) -> None:
    quiet_libraries()
    if page is not None:
        from maskft.report.study_pages import write_page

        written = [str(path) for path in write_page(file, page)]
        if as_json:
            print_json({"study": str(file), "written": written})
        result_console(as_json).print("\n".join(written), markup=False)
        return
    from maskft.studies.work import run_study

    folder = output or Path("runs/studies") / (file.stem + ("-toy" if toy else ""))
    try:
        with bar() as told:
            outcome = run_study(
                file,
                folder,
                storage=storage,
                toy=toy,
                trials=trials,
                heartbeat=heartbeat,
                known=known,
                progress=told,
            )
    except KeyboardInterrupt:
        notes.print("stopped; the same command goes on from there")
        return
    for name, error in outcome.failures.items():
        notes.print(f"failed   {name}: {error}", markup=False)
    if as_json:
        print_json(
            {
                "study": str(file),
                "output": str(folder),
                "runs": [result.model_dump(mode="json") for result in outcome.results],
                "failures": outcome.failures,
            }
        )
    console = result_console(as_json)
    console.print(results_table(outcome.results))
    console.print(f"results  {folder / 'results'}", markup=False)
    if outcome.failures:
        raise StudyError(
            f"{len(outcome.failures)} of {len(outcome.failures) + len(outcome.results)} runs failed. The same command "
            "tries them again."
        )


@contextmanager
def bar() -> Iterator[Any]:
    """A progress bar with the time left; yields what is told the stage, the finished trials and all trials."""
    count = TextColumn("{task.completed}/{task.total}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as shown:
        tasks: dict[str, Any] = {}

        def told(stage: str, done: int, of: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=of)
            shown.update(tasks[stage], completed=done, total=of)

        yield told


def results_table(results: list[Result]) -> Table:
    """A row for each variant, data set and axis values, over its seeds; columns that would be empty are left out."""
    rows: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        settings = {**result.settings, **result.tuned}
        told = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
        rows.setdefault(("tuning" if result.stage == "tune" else "", result.variant, result.data, told), []).append(
            result
        )
    head = ("", "variant", "data", "settings", "runs", "validation", "test", "final loss", "step")
    lines = [[*key, str(len(same)), *_measured(same)] for key, same in rows.items()]
    shown = [number for number in range(len(head)) if any(line[number] for line in lines)]
    table = Table(title="means (smallest to largest)")
    for number in shown:
        table.add_column(head[number])
    for line in lines:
        table.add_row(*(line[number] for number in shown))
    return table


def _measured(same: list[Result]) -> list[str]:
    """Accuracy on validation and test, final loss and time per step of runs that differ in their seeds."""
    parts = [[r.parts[part].tuned.accuracy for r in same if part in r.parts] for part in ("validation", "test")]
    losses = [r.training.final_loss for r in same if r.training.final_loss is not None]
    steps = [r.training.step_seconds for r in same if r.training.step_seconds is not None]
    return [
        *map(_spread, parts),
        f"{statistics.mean(losses):.4f}" if losses else "",
        f"{statistics.median(steps):.2f} s" if steps else "",
    ]


def _spread(shares: list[float]) -> str:
    if not shares:
        return ""
    mean = percent(statistics.mean(shares))
    return mean if len(shares) == 1 else f"{mean} ({percent(min(shares))} to {percent(max(shares))})"
