"""maskft combine, maskft distance"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from maskft.cli.output import notes, print_json, quiet_libraries, result_console
from maskft.errors import UserError

FURTHEST = 8
"""Layers to show."""


def run(
    operation: str, folders: list[Path], out: Path, *, weights: str | None, gate: str | None, as_json: bool
) -> None:
    powers = _numbers(weights)
    quiet_libraries()
    from maskft.adapters import combine

    made = combine(operation, folders, out, weights=powers, gate=gate)
    if as_json:
        asked = {"operation": operation, "adapters": [str(folder) for folder in folders], "output": str(out)}
        print_json({**asked, **asdict(made)})
    if made.clipped:
        notes.print(
            f"{made.clipped:,} of {made.scores:,} gates ({100 * made.clipped / made.scores:.2f} %) lay outside the "
            f"range of the gate '{made.gate}' and were clipped to it"
        )
    if made.base_fingerprint is None:
        notes.print(
            "the result carries no fingerprint of its base: nothing will check that it is loaded on the right one"
        )
    result_console(as_json).print(
        f"{operation} of {len(folders)} adapters: gate {made.gate}, {made.layers} layers, {made.scores:,} scores\n"
        f"adapter  {out}"
    )


def run_distance(a: Path, b: Path, *, as_json: bool) -> None:
    quiet_libraries()
    from maskft.adapters import distance

    found = distance(a, b)
    if as_json:
        print_json({"a": str(a), "b": str(b), **asdict(found)})
        return
    table = Table(title=f"{a} and {b}, overall and the layers that differ most")
    names = {"mean_difference": "mean |m1 - m2|", "largest_difference": "largest", "cosine": "cosine of m - 1"}
    rest = {"jaccard_kept": "Jaccard, kept", "jaccard_cut": "Jaccard, cut"}
    names |= rest if found.hard else {"correlation": "correlation of scores"}
    table.add_column("layer", overflow="fold")
    for title in names.values():
        table.add_column(title, justify="right")
    furthest = sorted(found.layers.items(), key=lambda item: -item[1].mean_difference)[:FURTHEST]
    for layer, measures in (("all", found.overall), *furthest):
        values = [getattr(measures, name) for name in names]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        table.add_row(escape(layer.removeprefix("base_model.model.")), *cells, end_section=layer == "all")
    result_console(as_json).print(table)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"--weights is '{text}'; write numbers separated by commas, for example 0.5,0.5.") from error
