"""maskft plan"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from maskft.cli.output import print_json, quiet_libraries, result_console
from maskft.recipe import load_recipe

if TYPE_CHECKING:
    from maskft.plan import Plan


def run(
    recipe_path: Path,
    overrides: list[str],
    *,
    gpu: str | None,
    cpu: bool,
    ranks: int,
    tokens: int | None,
    images: int | None,
    as_json: bool,
) -> None:
    from maskft.plan.sizes import parse_size

    budget = None if gpu is None else parse_size(gpu)
    recipe = load_recipe(recipe_path, overrides)
    quiet_libraries()
    from maskft.plan import plan

    found = plan(
        recipe,
        budget=budget,
        ranks=ranks,
        tokens=tokens,
        images=images,
        device="cpu" if cpu else "gpu" if gpu else None,
    )
    if as_json:
        print_json(found.as_dict())
    console = result_console(as_json)
    console.print(_table(found))
    for line in _changes(found):
        console.print(line, markup=False)
    for remark in found.remarks:
        console.print(f"note: {remark}", markup=False)


def _table(found: Plan) -> Table:
    from maskft.plan.predict import PARTS
    from maskft.plan.sizes import readable

    load = found.load
    rows = f"{load.batch} rows of {load.tokens} tokens" + (f" with {load.images} image(s)" if load.images else "")
    where = f", each of {found.ranks} processes" if found.ranks > 1 else ""
    table = Table(title=f"Peak memory of one step on a {load.device.upper()}{where}: {rows}")
    parts = [part for part in PARTS if any(getattr(row.peak, part) for row in found.rows)]
    table.add_column("")
    for part in (*parts, "peak", *(["fits"] if found.budget is not None else [])):
        table.add_column(part, justify="right")
    for row in found.rows:
        cells = [readable(getattr(row.peak, part)) for part in parts]
        fits = [] if row.fits is None else ["yes" if row.fits else "no"]
        table.add_row(row.name, *cells, readable(row.peak.total), *fits)
    return table


def _changes(found: Plan) -> list[str]:
    """What to change first, in words."""
    from maskft.plan.sizes import readable

    own = found.rows[0].peak.total
    lines = []
    if found.budget is not None:
        verdict = "fits" if found.rows[0].fits else "does not fit"
        lines.append(f"The recipe {verdict}: {readable(own)} of {readable(found.budget)}.")
    if found.changes:
        lines.append("To change first, each by itself:")
    for change in found.changes:
        fits = ", which fits" if change.fits else ""
        lines.append(f"  {' '.join(change.settings)}  ->  {readable(change.total)}{fits}")
    if found.enough is not None and len(found.enough.settings) > 1 and not any(c.fits for c in found.changes):
        lines.append(f"Together enough: {' '.join(found.enough.settings)}  ->  {readable(found.enough.total)}")
    if found.rows[0].fits is False and found.enough is None:
        lines.append("None of these is enough, nor are all together. Take a smaller base or more memory.")
    return lines
