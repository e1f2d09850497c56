"""maskft inspect"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from maskft.cli.output import notes, percent, print_json, quiet_libraries, result_console

if TYPE_CHECKING:
    from maskft.adapters import Measures
    from maskft.analysis import Drift, LayerMask, Overlap, Statistics
    from maskft.measures import Place

BLOCKS = "▁▂▃▄▅▆▇█"
LONGEST_BAR = 24
"""Blocks; of more layers, neighbours are averaged."""
PIPED = 140
"""Columns where the output is no terminal."""
COLUMNS = {
    "mean": "mean",
    "spread": "spread",
    "distance": "distance",
    "moved": "moved",
    "saturated": "saturated",
    "kept": "kept",
    "change": "change",
    "share_rank": "rank",
}
_SHARES = ("moved", "saturated", "kept", "change", "share_rank")


@dataclass(frozen=True)
class _Seen:
    """An adapter, and what was found in it."""

    folder: Path
    gate: str
    layers: dict[str, Statistics]
    overall: Statistics
    sample: list[LayerMask]
    drift: list[Drift]


@dataclass(frozen=True)
class _Pair:
    """Two adapters compared."""

    a: str
    b: str
    relation: str | None
    overlap: Overlap
    measures: Measures | None


def run(folders: list[Path], *, weights: bool, rank: bool, with_drift: bool, as_json: bool) -> None:
    quiet_libraries()
    seen = [_look(folder, weights=weights, rank=rank, with_drift=with_drift) for folder in folders]
    pairs = [_compare(a, b) for a, b in combinations(seen, 2)]
    if as_json:
        print_json({"adapters": [_report(one) for one in seen], "overlaps": [asdict(pair) for pair in pairs]})
        return
    from maskft.analysis import by_place

    tables = []
    for one in seen:
        places = by_place(one.layers)
        tables += [_modules_table(one, places), _drift_table(one.drift)]
        tables += [_layers_table(places)] if len(seen) == 1 else []
    tables.append(_pairs_table(pairs))
    console = result_console(as_json)
    if not console.is_terminal:
        console.width = PIPED
    for table in tables:
        if table.row_count:
            console.print(table)


def _look(folder: Path, *, weights: bool, rank: bool, with_drift: bool) -> _Seen:
    from maskft.adapters.files import SavedAdapter
    from maskft.analysis import checkpoints, drift, sampled, saved_masks, statistics, together

    source = SavedAdapter(folder)
    unpacked = any(not source.packed(score) for score in source.scores)
    layers: dict[str, Statistics] = {}
    sample: list[LayerMask] = []

    def take(mask: LayerMask) -> None:
        layers[mask.name] = statistics(mask, rank=rank)
        sample.append(sampled(mask))

    if weights or (source.config.gate == "topk" and unpacked):
        from maskft.analysis import attached_masks
        from maskft.evaluation.candidates import find_candidate, wearing
        from maskft.vlm.load import load_model

        candidate = find_candidate(str(folder))
        notes.print(f"loading the base of {folder}")
        section = candidate.model
        base = load_model(
            section.base,
            dtype=section.dtype,
            trust_remote_code=section.trust_remote_code,
            quantization=section.quantization,
        )
        with wearing(base, candidate) as model:
            for mask in attached_masks(model):
                take(mask)
    else:
        for mask in saved_masks(folder):
            take(mask)
    steps = drift(checkpoints(folder)) if with_drift else []
    return _Seen(folder, source.config.gate, layers, together(layers.values()), sample, steps)


def _compare(a: _Seen, b: _Seen) -> _Pair:
    from maskft.adapters import distance
    from maskft.analysis import overlap, relation
    from maskft.errors import AdapterError
    from maskft.runs import RECIPE, run_recipe

    recipes = [run_recipe(one.folder) for one in (a, b) if (one.folder / RECIPE).is_file()]
    try:
        measures = distance(a.folder, b.folder).overall
    except AdapterError:
        if a.gate != "topk" and b.gate != "topk":
            raise
        measures = None  # scores whose mask depends on the base
    return _Pair(
        str(a.folder),
        str(b.folder),
        relation(*recipes) if len(recipes) == 2 else None,
        overlap(a.sample, b.sample),
        measures,
    )


def _report(one: _Seen) -> dict[str, Any]:
    layers = {name.removeprefix("base_model.model."): asdict(found) for name, found in one.layers.items()}
    told = {"adapter": str(one.folder), "gate": one.gate, "overall": asdict(one.overall), "layers": layers}
    return {**told, "drift": [asdict(step) for step in one.drift]} if one.drift else told


def sparkline(values: Sequence[float | None]) -> str:
    """A bar of eight heights for each value, from 0 to the largest; a blank where there is none."""
    group = math.ceil(len(values) / LONGEST_BAR)
    if group > 1:
        return sparkline([_mean(values[i : i + group]) for i in range(0, len(values), group)])
    top = max((value for value in values if value is not None), default=0.0)
    scale = (len(BLOCKS) - 1) / top if top > 0 else 0.0
    return "".join(" " if value is None else BLOCKS[round(max(value, 0.0) * scale)] for value in values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _measure(found: Statistics) -> float | None:
    """What is shown by layer: how far gates moved, or how many are kept where the start is not known."""
    return found.kept if found.distance is None else found.distance


def _modules_table(one: _Seen, places: Mapping[Place, Statistics]) -> Table:
    from maskft.analysis import together

    shown = [name for name in COLUMNS if getattr(one.overall, name) is not None]
    matrices = "matrix" if len(one.layers) == 1 else "matrices"
    title = f"{escape(str(one.folder))}: gate {one.gate}, {one.overall.gates:,} gates in {len(one.layers)} {matrices}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("module", overflow="fold")
    for name in shown:
        table.add_column(COLUMNS[name], justify="right")
    table.add_column("distance by layer" if one.overall.distance is not None else "kept by layer", no_wrap=True)
    table.add_row("all", *(_cell(name, one.overall) for name in shown), "", end_section=True)
    groups: dict[tuple[str, str], dict[int, Statistics]] = {}
    for where, found in places.items():
        groups.setdefault((where.part, where.module), {})[where.layer] = found
    for (part, module), layers in groups.items():
        found = together(layers.values())
        bars = [_measure(layers[i]) if i in layers else None for i in range(max(layers) + 1)] if max(layers) > 0 else []
        name = shown_name(module, [m for p, m in groups if p == part])
        name = name if part == "language" else f"{part}: {name}"
        table.add_row(escape(name), *(_cell(name, found) for name in shown), sparkline(bars))
    return table


def shown_name(module: str, others: Sequence[str]) -> str:
    """The last piece of a module's path, where that tells it from the others."""
    last = module.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in others].count(last) == 1 else module


def _cell(name: str, found: Statistics) -> str:
    value = getattr(found, name)
    if value is None:
        return ""
    return percent(value) if name in _SHARES else f"{value:.4f}"


def _layers_table(places: Mapping[Place, Statistics]) -> Table:
    """The measure of `_measure` by layer (rows) and module (columns) of the part with most layers."""
    parts = [where.part for where in places if where.layer >= 0]
    part = max(dict.fromkeys(parts), key=parts.count, default="")
    modules = list(dict.fromkeys(where.module for where in places if where.part == part and where.layer >= 0))
    titles = [shown_name(module, modules) for module in modules]
    cells = {(w.layer, w.module): _measure(found) for w, found in places.items() if w.part == part}
    known = any(found.distance is not None for found in places.values())
    table = Table(title=f"{part}: {'distance' if known else 'share kept'} by layer", box=SIMPLE_HEAD)
    for title in ("layer", *titles):
        table.add_column(escape(title), justify="right")
    for layer in sorted({layer for layer, _ in cells if layer >= 0}):
        values = (cells.get((layer, module)) for module in modules)
        table.add_row(str(layer), *("" if value is None else f"{value:.4f}" for value in values))
    return table


def _drift_table(steps: Sequence[Drift]) -> Table:
    table = Table(title="checkpoints", box=SIMPLE_HEAD)
    for title in ("step", "distance", "distance to the last", "correlation with the last"):
        table.add_column(title, justify="right")
    for one in steps:
        values = (one.from_start, one.to_last, one.correlation)
        table.add_row(str(one.step), *("" if value is None else f"{value:.4f}" for value in values))
    return table


def _pairs_table(pairs: Sequence[_Pair]) -> Table:
    table = Table(title="what masks have in common", box=SIMPLE_HEAD)
    titles = ("", "", "differ by", "shared", "by chance", "mean |m1 - m2|", "correlation of scores")
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 3 else "right", overflow="fold")
    for pair in pairs:
        found, apart = pair.overlap, pair.measures
        table.add_row(
            escape(pair.a),
            escape(pair.b),
            pair.relation or "",
            "" if found.shared is None else percent(found.shared),
            f"{percent(found.by_chance)} ± {100 * found.deviation:.2f}",
            "" if apart is None else f"{apart.mean_difference:.4f}",
            "" if apart is None or apart.correlation is None else f"{apart.correlation:.3f}",
        )
    return table
