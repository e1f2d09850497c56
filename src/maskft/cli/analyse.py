"""maskft analyse"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from maskft.cli.inspect import PIPED, sparkline
from maskft.cli.output import notes, print_json, quiet_libraries, result_console
from maskft.errors import UserError, did_you_mean


def run(name: str, runs: list[Path], output: Path | None, *, as_json: bool) -> None:
    quiet_libraries()
    from maskft.analysis.attribution import ANALYSES
    from maskft.runs import write_json

    if name not in ANALYSES:
        raise UserError(
            f"there is no analysis '{name}'; there are {', '.join(ANALYSES)}.{did_you_mean(name, ANALYSES)}"
        )
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output is {output}, but its folder does not exist. Make it first.")
    notes.print(f"{name} of {', '.join(map(str, runs))}", markup=False)
    found = ANALYSES[name](runs)
    if output is not None:
        write_json(output, found)
    if as_json:
        print_json(found)
        return
    console = result_console(as_json)
    if not console.is_terminal:
        console.width = PIPED
    for key, value in found.items():
        if isinstance(value, list):
            for one in value:
                console.print(_table(f"{name}: {one.get('run') or ' and '.join((one['a'], one['b']))}", one))
        else:
            console.print(f"{key}  {_shown(value)}", markup=False)


def _table(title: str, found: dict[str, Any]) -> Table:
    table = Table(title=escape(title), box=SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for key, value in _flat(found):
        table.add_row(escape(key.replace("_", " ")), escape(_shown(value)))
    return table


def _flat(found: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Values with their path in words; entries of a list of objects are named by their first value."""
    rows: list[tuple[str, Any]] = []
    for key, value in found.items():
        if key in ("run", "a", "b"):
            continue
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}, ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one in value:
                (first, *_), rest = one.values(), dict(list(one.items())[1:])
                rows += _flat(rest, f"{prefix}{first}: ")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _shown(value: Any) -> str:
    """A number in four digits; a list of them as bars from 0 to the largest, with its ends."""
    if isinstance(value, list):
        known = [number for number in value if number is not None]
        return f"{sparkline(value)}  {min(known):.3g} to {max(known):.3g}" if known else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
