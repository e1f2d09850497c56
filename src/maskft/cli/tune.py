"""maskft tune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from maskft.cli.output import notes, percent, print_json, quiet_libraries, result_console
from maskft.cli.study import bar

if TYPE_CHECKING:
    from maskft.studies.tune import Found


def run(
    recipe: Path,
    output: Path,
    work: Path,
    *,
    trials: int,
    share: float,
    force: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    quiet_libraries()
    from maskft.studies.tune import tune

    try:
        with bar() as told:
            found = tune(
                recipe, output, trials=trials, share=share, work=work, force=force, storage=storage, progress=told
            )
    except KeyboardInterrupt:
        notes.print("stopped; the same command goes on from there")
        return
    if as_json:
        tried = [result.model_dump(mode="json") for result in found.tried]
        print_json({"recipe": str(output), "key": found.key, "value": found.value, "trials": tried})
    console = result_console(as_json)
    console.print(_table(found))
    console.print(f"recipe   {output}\nnext     maskft train {output}", markup=False)


def _table(found: Found) -> Table:
    table = Table(title="on the validation part")
    for column in (found.key, "accuracy", "95 % interval", "final loss", "step", ""):
        table.add_column(column, justify="right")
    for result in found.tried:
        score, loss = result.parts["validation"].tuned, result.training.final_loss
        value = float(result.tuned[found.key])
        table.add_row(
            f"{value:.4g}",
            percent(score.accuracy),
            f"{percent(score.low)} to {percent(score.high)}",
            "" if loss is None else f"{loss:.4f}",
            f"{result.training.step_seconds or 0:.2f} s",
            "chosen" if value == found.value else "",
        )
    return table
