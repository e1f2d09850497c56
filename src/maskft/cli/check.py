"""maskft check"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from maskft.cli.output import notes, print_json, progress, quiet_libraries, result_console
from maskft.errors import printable
from maskft.recipe import load_recipe


def run(
    recipe_path: Path,
    overrides: list[str],
    *,
    images: int | None,
    workers: int,
    fix: Path | None,
    as_json: bool,
) -> None:
    recipe = load_recipe(recipe_path, overrides)
    quiet_libraries()
    from maskft.inspection import DROPPED, inspect
    from maskft.training import training_arguments

    max_length = training_arguments(recipe, Path("unused")).max_length
    found = inspect(recipe, max_length=max_length, images=images, workers=workers, fix=fix, progress=progress)
    if as_json:
        shared = [{"parts": list(pair), "images": count} for pair, count in found.shared.items()]
        parts = {name: part.to_dict() for name, part in found.parts.items()}
        print_json({"max_length": max_length, "parts": parts, "shared_images": shared, "use": list(found.overrides)})
    console = result_console(as_json)
    for name, part in found.parts.items():
        console.print(_table(name, part.to_dict(), max_length))
    for name, part in found.parts.items() if not as_json else ():
        for flaw in part.flaws:
            console.print(printable(f"{name} {flaw.place}: {flaw.text}"), markup=False)
    for (first, second), count in found.shared.items():
        console.print(
            f"{count} images of the {first} part appear in the {second} part too; held-out parts must hold other "
            "images. Remove them, or let data.split hold out parts of the training file by image."
        )
    if fix is not None:
        flawed = sum(part.flawed for part in found.parts.values())
        console.print(
            f"{flawed} row(s) left out, listed in {fix / DROPPED}. Train on the rest with:\n"
            f"{shlex.join(['maskft', 'train', str(recipe_path), *found.overrides])}",
            markup=False,
        )
    if found.shared or (found.flaws and fix is None):
        notes.print(
            f"maskft: the data has {found.flaws} flaw(s). maskft check ... --fix DIR writes a copy without them."
        )
        raise SystemExit(2)


def _table(name: str, part: dict[str, Any], max_length: int | None) -> Table:
    table = Table(title=f"{escape(name)} data")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("rows", f"{part['rows']:,}")
    table.add_row("rows with a flaw", f"{part['flawed_rows']:,}", end_section=True)
    table.add_row("images", f"{part['images']:,}")
    table.add_row("different ones", f"{part['distinct_images']:,}")
    table.add_row("of those decoded", f"{part['decoded_images']:,}")
    table.add_row("rows without image", f"{part['text_only']:,}")
    for side in ("width", "height"):
        table.add_row(f"{side}, pixels", _spread(part[side]))
    table.add_section()
    table.add_row("tokens of a row", _spread(part["tokens"]))
    if max_length is not None:
        table.add_row(f"rows over max_length {max_length:,}", f"{part['rows_over_max_length']:,}")
        table.add_row("tokens it would cut", f"{part['tokens_over_max_length']:,}", end_section=True)
    table.add_row("time", _time(part["seconds"]))
    if part["seconds_for_665000_rows"] is not None:
        table.add_row("time for 665,000 rows at this rate", _time(part["seconds_for_665000_rows"]))
    return table


def _spread(values: dict[str, int] | None) -> str:
    if values is None:
        return "-"
    return f"{values['min']:,} to {values['max']:,}, median {values['median']:,}, 99 % up to {values['p99']:,}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
