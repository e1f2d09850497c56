"""Figures of a report: a chart with the table of what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from markupsafe import Markup

from maskft.analysis import overlap
from maskft.errors import AdapterError
from maskft.measures import place
from maskft.report import charts
from maskft.report.gather import RunView, curve

Row = Sequence[Any]


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows in words, and its data.

    Attributes:
        title, caption: texts.
        chart: SVG.
        columns, rows: the data; the first cell of a row names it.
        legend: names of lines with their style, where there are several.
    """

    title: str
    caption: str
    chart: Markup
    columns: Sequence[str]
    rows: Sequence[Row]
    legend: Sequence[tuple[str, Markup]] = ()


def results(runs: Sequence[RunView]) -> Figure | None:
    """Scores on the held-out questions with their 95 % intervals."""
    return _scores(runs, [_found(run) for run in runs], "Score on the {} questions", "Mean score with 95 % intervals")


def results_by_type(runs: Sequence[RunView]) -> list[Figure]:
    """As `results`, for each type of answer; none where all answers are of one type."""
    by_type = [_found(run).get("by_answer_type", {}) for run in runs]
    kinds = sorted({kind for found in by_type for kind in found})
    title = "Score where the answer is {}, on the {{}} questions"
    words = {"yes/no": "yes or no", "number": "a number", "other": "anything else"}
    made = (
        _scores(runs, [f.get(kind, {}) for f in by_type], title.format(words[kind]), f"Mean score of {kind} answers")
        for kind in kinds
    )
    return [figure for figure in made if figure]


def _found(run: RunView) -> dict[str, Any]:
    """What the run's metrics say of its held-out questions."""
    found: dict[str, Any] = run.metrics if run.split == "test" else run.metrics.get(run.split, {})
    return found


def _scores(runs: Sequence[RunView], scores: Sequence[dict[str, Any]], title: str, chart: str) -> Figure | None:
    """Scores of each run's base, guess and model as a figure; `title` has a place for the split."""
    bars, rows = [], []
    seen: list[dict[str, Any]] = []  # runs of one base share its score
    for run, found in zip(runs, scores, strict=True):
        for side in ("base", "blind", "tuned"):
            if side not in found or (side != "tuned" and found[side] in seen):
                continue
            score = found[side]
            seen.append(score)
            name = {"base": "base", "blind": "guess without image", "tuned": "tuned"}[side]
            low, high = (score.get(f"by_image_{end}") for end in ("low", "high"))
            by_image = low is not None and high is not None
            low, high = (low, high) if by_image else (score["low"], score["high"])
            bars.append((f"{run.name}: {name}" if len(runs) > 1 else name, score["accuracy"], low, high))
            basis = "images" if by_image else "questions"
            full = f"{score['correct']} of {score['examples']}"
            rows.append((run.name, name, percent(score["accuracy"]), percent(low), percent(high), basis, full))
    if not bars:
        return None
    split = "/".join(sorted({run.split for run in runs if run.metrics}))
    columns = ("run", "answers of", "mean score", "low", "high", "interval over", "fully right")
    return Figure(
        title.format(split),
        "Mean score with its 95 % interval. The guess answers each question as it was answered most often in training.",
        charts.intervals(chart, bars, x="mean score"),
        columns,
        rows,
    )


def learning(runs: Sequence[RunView]) -> list[Figure]:
    """Training loss, validation loss, and every accuracy that was logged."""
    keys = ["loss", "eval_loss"]
    keys += sorted({k for run in runs for entry in run.log for k in entry if "accuracy" in k})
    titles = {"loss": "Training loss", "eval_loss": "Validation loss"}
    figures = []
    for key in keys:
        series = {run.name: line for run in runs if (line := curve(run.log, key))}
        title = titles.get(key, key.replace("_", " "))
        name = "nats" if "loss" in key else "share"
        figures += _lines(title, "", series, y=name, zero="loss" not in key)
    return figures


def drifts(runs: Sequence[RunView]) -> list[Figure]:
    """How far the gates were from their start, and how many had moved, over the training."""
    told = {
        "distance": (
            "How far gates are from their start",
            "Mean |m - start| of a sample of each matrix's gates.",
            "mean |m - start|",
        ),
        "moved": ("Gates that have moved", "Share of gates farther than 0.001 from their start.", "share moved"),
        "kept": ("Weights that stay", "Share of the masked weights that the mask keeps.", "share kept"),
    }
    figures = []
    for key, (title, caption, y) in told.items():
        series = {
            run.name: line
            for run in runs
            if (line := [(r["step"], r["overall"][key]) for r in run.records if key in r["overall"]])
        }
        figures += _lines(title, caption, series, y=y, zero=key != "kept", share=key != "distance")
    return figures


def module_drift(run: RunView, path: Sequence[str], gates: Sequence[int]) -> list[Figure]:
    """Distance from the start by kind of module, over the training of one run."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(path):
        where = place(name)
        groups.setdefault(where.module if where.part == "language" else f"{where.part}: {where.module}", []).append(
            number
        )
    series = {}
    for module, members in groups.items():
        size = sum(gates[i] for i in members)
        series[module] = [
            (r["step"], sum(gates[i] * r["modules"]["distance"][i] for i in members) / size)
            for r in run.records
            if "distance" in r["modules"]
        ]
    title = "How far gates are from their start, by module"
    return _lines(title, "", {name: line for name, line in series.items() if line}, y="mean |m - start|", zero=True)


def heat(run: RunView) -> Figure | None:
    """Mean |m - start| (or what is kept, where the start is not known) by layer and module."""
    if not run.places:
        return None
    known = all(found.distance is not None for found in run.places.values())
    values = {where: (found.distance if known else found.kept) or 0.0 for where, found in run.places.items()}
    rows = list(dict.fromkeys((where.part, where.module) for where in values))
    depth = max(where.layer for where in values) + 1
    columns = [str(n) for n in range(max(depth, 1))]
    cells = {(rows.index((where.part, where.module)), max(where.layer, 0)): v for where, v in values.items()}
    names = [module.rpartition(".")[2] if part == "language" else f"{part}: {module}" for part, module in rows]
    if len(set(names)) < len(names):
        names = [f"{part}: {module}" for part, module in rows]
    title = "Where the mask moved" if known else "What the mask keeps"
    caption = ("Mean |m - start|" if known else "Share of weights kept") + " by layer and module; brighter is more."
    table = [
        [name, *(_cell(cells.get((row, column))) for column in range(len(columns)))] for row, name in enumerate(names)
    ]
    chart = charts.heat_map(
        f"{title}: {run.name}", names, columns, cells, top=max(cells.values()) if known else 1.0, x="layer"
    )
    return Figure(title, caption, chart, ("module", *(f"layer {c}" for c in columns)), table)


def gates(run: RunView) -> Figure | None:
    """Histogram of the gates."""
    counts, top = run.bins
    if not any(counts):
        return None
    start = run.start
    wide = top / len(counts)
    rows = [(f"{wide * i:.3g} to {wide * (i + 1):.3g}", f"{count:,}") for i, count in enumerate(counts) if count]
    caption = f"A sample of {sum(counts):,} gates, on a logarithmic axis."
    caption += "" if start is None else f" The dashed line is where they started, {start:.3g}."
    chart = charts.histogram(f"Gates of {run.name}", counts, top, x="gate m", start=start)
    return Figure("Values of the gates", caption, chart, ("gate", "count"), rows)


def overlaps(runs: Sequence[RunView]) -> tuple[Figure | None, list[str]]:
    """Which weights the masks of several runs change alike, and why some could not be compared."""
    masked = [run for run in runs if run.masks]
    values, chances, remarks = {}, {}, []
    for (i, one), (j, other) in product(enumerate(masked), repeat=2):
        try:
            found = overlap(one.masks, other.masks)
        except AdapterError as error:
            if i < j:
                remarks.append(f"{one.name} and {other.name}: {error}")
            continue
        if found.shared is not None:
            values[i, j], chances[i, j] = found.shared, found.by_chance
    if len(masked) < 2 or not values:
        return None, remarks
    names = [f"{n}. {run.name}" for n, run in enumerate(masked, 1)]
    average = sum(chances.values()) / len(chances)
    caption = (
        "Of the entries that the run of the row changed most (a tenth of each matrix; of hard masks, what is cut), the "
        "share that the run of the column changed most as well. Masks that know nothing of each other share "
        f"{percent(average)}."
    )
    rows = [[name, *(_share(values.get((i, j))) for j in range(len(names)))] for i, name in enumerate(names)]
    chart = charts.matrix("Overlap of masks, per cent", names, values)
    return Figure("What the masks have in common", caption, chart, ("run", *names), rows), remarks


def _lines(
    title: str, caption: str, series: dict[str, Any], *, y: str, zero: bool, share: bool = False
) -> list[Figure]:
    if not series:
        return []
    chart = charts.line_chart(title, series, x="step", y=y, zero=zero, share=share)
    steps = sorted({step for line in series.values() for step, _ in line})
    lookup = {name: dict(line) for name, line in series.items()}
    shown = steps[:: max(1, len(steps) // 60)]
    rows = [[str(step), *(_cell(lookup[name].get(step)) for name in series)] for step in shown]
    legend = [(name, charts.line_style(n)) for n, name in enumerate(series)] if len(series) > 1 else []
    return [Figure(title, caption, chart, ("step", *series), rows, legend)]


def percent(share: float) -> str:
    """0.8125 -> "81.2 %"."""
    return f"{100 * share:.1f} %"


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
