"""Pages about studies, made of their files and their committed results alone: docs/results/<study>.md and .svg.

python -m maskft.report.study_pages studies docs/results

A study `studies/x.yaml` has its results in `studies/x/results/*.json`, and what they say, in words, in
`studies/x/findings.md`. What was not run is said to be so.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from maskft.errors import StudyError
from maskft.recipe import MaskMethod, Recipe, method_settings
from maskft.report.charts import WIDTH, intervals, line_chart, line_style
from maskft.report.study_found import at_paper_scale, between_seeds, by_answer_type, found_in_runs
from maskft.report.study_rows import (
    NOT_RUN,
    Row,
    estimate,
    gap,
    judged,
    rows,
    shown,
    table,
    told_accuracy,
)
from maskft.report.study_summary import by_data
from maskft.runs import write_atomically
from maskft.studies.at_scale import PLAN
from maskft.studies.definition import Study, load_study
from maskft.studies.known import differing
from maskft.studies.results import Result, read_results, result_name


def page(
    name: str,
    study: Study,
    results: Sequence[Result],
    findings: str,
    across: Sequence[Mapping[str, Any]] = (),
    plan: Mapping[str, Any] | None = None,
) -> str:
    """The page as Markdown.

    Args:
        name: of the study's file.
        findings: in words.
        across: content of across.json.
        plan: content of plan.json.
    """
    lines = [f"# {study.title}", "", *_paragraphs(study.question)]
    found = rows(study, results)
    if findings.strip():
        lines += [findings.strip(), ""]
    if short := by_data(study, found):
        lines += [*short, "", "Mean accuracy over runs, in brackets its 95 % interval.", ""]
    lines += [*_table(study, found), ""]
    if picture(study, found):
        lines += [f"![{study.title}]({name}.svg)", ""]
    lines += by_answer_type(study, found)
    if across:
        lines += ["## Between seeds", "", *between_seeds(across), ""]
    lines += found_in_runs(study, found)
    lines += ["## How it was made", "", "```", f"maskft study studies/{name}.yaml", "```", ""]
    made = [result for result in results if result.stage == "run"]
    if made:
        lines += [*_record(made, [result for result in results if result.stage == "tune"]), ""]
    missing = sum(row.seeds - len(row.results) for row in found)
    if missing:
        lines += [f"Not run yet: {missing} of {sum(row.seeds for row in found)} runs.", ""]
    if study.paper_scale or plan:
        lines += ["## At the size of a paper", "", *_paragraphs(study.paper_scale)]
        lines += at_paper_scale(plan) if plan else []
    return "\n".join(lines).rstrip() + "\n"


def picture(study: Study, found: Sequence[Row]) -> str:
    """The study's plot as an SVG file's content; empty where there is nothing to draw."""
    kind, spans = study.plot, dict[str, list[tuple[float, float, float]]]()
    if kind is None:
        together = [row for data in study.data or [""] for row in found if row.cell.data == data]
        bars = [(row.name, *estimate(parts)) for row in together if (parts := judged(row))]
        return _standalone(intervals(study.title, bars, x="accuracy"), [])
    if kind == "step":
        logs = {row.name: [_points(result.log, "loss") for result in row.results] for row in found if row.results}
        series = {name: _mean_curve(curves) for name, curves in logs.items()}
        x, y = "step", "training loss"
    elif kind == "drift":
        kept = {row.name: [_points(_checkpoints(r), "correlation") for r in row.results] for row in found}
        series = {name: line for name, curves in kept.items() if curves and (line := _mean_curve(curves))}
        x, y = "step", "correlation with the last mask"
    elif kind == "gap":
        series = _gaps(found)
        x, y = "training loss", "accuracy in training minus in test"
    else:
        (x, points), y = _by_setting(kind, found), "accuracy"
        series = {name: [(at, mean) for at, mean, _, _ in own] for name, own in points.items()}
        spans = {name: [(at, low, high) for at, _, low, high in own] for name, own in points.items()}
    chart = line_chart(study.title, series, x=x, y=y, share=y.startswith("accuracy"), spans=spans)
    return _standalone(chart, list(series))


def _by_setting(kind: str, found: Sequence[Row]) -> tuple[str, dict[str, list[tuple[float, float, float, float]]]]:
    """The name of the x axis, and for each variant and data set accuracy with its interval against a setting or rho,
    on a logarithmic axis where it spans more than a decade."""
    seen: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in found:
        at = relative_step(row.results[0]) if kind == "rho" and row.results else row.cell.settings.get(kind)
        if isinstance(at, int | float) and (parts := judged(row)):
            seen.setdefault(" ".join(filter(None, row.cell.group)), []).append((float(at), *estimate(parts)))
    places = [point[0] for points in seen.values() for point in points]
    name, wide = ("relative step per update" if kind == "rho" else kind), places and 0 < 10 * min(places) < max(places)
    if wide:
        seen = {n: [(math.log10(p[0]), *p[1:]) for p in own] for n, own in seen.items()}
    return f"log10 of {name}" if wide else name, {n: sorted(points) for n, points in seen.items()}


def _gaps(found: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """What is lost from training to test questions against the final training loss, a line for each variant."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        losses = [r.training.final_loss for r in row.results if r.training.final_loss is not None]
        if losses and (lost := gap(row)) is not None:
            series.setdefault(" ".join(filter(None, row.cell.group)), []).append((statistics.mean(losses), lost))
    return {name: sorted(points) for name, points in series.items()}


def relative_step(result: Result) -> float | None:
    """By how much of itself a gate changes per step at the start; None for other methods and hard gates."""
    recipe = Recipe.model_validate(result.recipe)
    if not isinstance(recipe.method, MaskMethod):
        return None
    rate = {**method_settings(recipe), **recipe.training}["learning_rate"]
    try:
        return float(rate) / recipe.method.config().learning_rate(1.0)
    except ValueError:
        return None


def write_pages(studies: Path, out: Path) -> list[Path]:
    """Write the page of every study that has results; returns what was written."""
    written = []
    for file in sorted(studies.glob("*.yaml")):
        if (file.with_suffix("") / "results").is_dir():
            written += write_page(file, out)
    return written


def write_page(file: Path, out: Path) -> list[Path]:
    """Write a study's page and picture into a folder; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path, text in made(file, out).items():
        write_atomically(path, text)
        written.append(path)
    return written


def made(file: Path, out: Path) -> dict[Path, str]:
    """Content of a study's page and picture, by where they belong."""
    study, folder = load_study(file), file.with_suffix("")
    results = read_results(folder / "results")
    for number, result in enumerate(results):
        if difference := differing(result, results[:number]):
            raise StudyError(
                f"{folder / 'results'}: in {result_name(result)}.json {difference}; no page compares them."
            )
    findings = folder / "findings.md"
    said = findings.read_text(encoding="utf-8") if findings.is_file() else ""
    across, plan = (_read(folder / name) for name in ("across.json", PLAN))
    content = {out / f"{file.stem}.md": page(file.stem, study, results, said, across or [], plan)}
    if drawn := picture(study, rows(study, results)):
        content[out / f"{file.stem}.svg"] = drawn
    return content


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _table(study: Study, found: Sequence[Row]) -> list[str]:
    axes = list(study.vary)
    answered = [part for part in ("train", "validation", "test") if any(row.parts(part) for row in found)]
    head = ["variant", *(["data"] if study.data else []), *(key.rpartition(".")[2] for key in axes)]
    tuned = sorted({key for row in found for result in row.results for key in result.tuned})
    gaps = any(gap(row) is not None for row in found)
    peaks = any(result.best_epoch() is not None for row in found for result in row.results)
    measured = [
        *(key.rpartition(".")[2] for key in tuned),
        *answered,
        *(["train minus test"] if gaps else []),
        *(["lowest validation loss"] if peaks else []),
        "final loss",
        "trained",
        "step",
        "memory",
        "runs",
    ]
    lines = []
    for row in found:
        cell = row.cell
        own = [
            cell.variant,
            *([cell.data] if study.data else []),
            *(shown(cell.settings.get(key, "")) for key in axes),
        ]
        if row.results:
            told = [
                *(_tuned(row, key) for key in tuned),
                *(told_accuracy(row.parts(part)) for part in answered),
                *(["" if (lost := gap(row)) is None else f"{100 * lost:+.1f}"] if gaps else []),
                *([_peak(row)] if peaks else []),
                *_costs(row),
            ]
        else:
            told = [NOT_RUN] * (len(measured) - 1) + [f"0 of {row.seeds}"]
        lines.append([*own, *told])
    note = "Accuracy: mean over runs, in brackets its 95 % interval"
    return [
        *table([*head, *measured], lines),
        "",
        f"{note}, from resampling runs and questions; with one run, of its questions.",
    ]


def _costs(row: Row) -> list[str]:
    trained = [result.training for result in row.results]
    losses = [one.final_loss for one in trained if one.final_loss is not None]
    steps = [one.step_seconds for one in trained if one.step_seconds is not None]
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
    return [
        f"{statistics.mean(losses):.4f}{spread}" if losses else "",
        f"{trained[0].trainable_parameters:,}",
        f"{statistics.median(steps):.2f} s" if steps else "",
        f"{statistics.median(one.peak_memory for one in trained) / 1e9:.2f} GB",
        f"{len(row.results)} of {row.seeds}" if len(row.results) < row.seeds else str(row.seeds),
    ]


def _peak(row: Row) -> str:
    """After how much of an epoch the loss on the validation part was lowest, and of how much that was trained."""
    epochs = [epoch for result in row.results if (epoch := result.best_epoch()) is not None]
    if not epochs:
        return ""
    trained = statistics.mean(result.training.epochs for result in row.results)
    return f"{statistics.mean(epochs):.3f} of {trained:.3f} epochs"


def _tuned(row: Row, key: str) -> str:
    values = sorted({shown(result.tuned[key]) for result in row.results if key in result.tuned})
    return ", ".join(values)


def _record(made: Sequence[Result], tuning: Sequence[Result]) -> list[str]:
    """Who made the results with what, in words."""
    hours = sum(result.wall_seconds for result in [*made, *tuning]) / 3600
    packages = made[0].packages
    machines = sorted(
        {f"{m.get('processor')} with {m.get('cores')} cores" for m in (result.machine for result in made)}
    )
    commits = sorted({result.commit or "unknown" for result in made})
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "trl") if name in packages
    )
    tuned = f" and {len(tuning)} of tuning" if tuning else ""
    base = made[0].parts
    scores = [
        f"{name} {100 * part.base.accuracy:.1f} %, blind guess {100 * part.blind.accuracy:.1f} %"
        for name, part in base.items()
    ]
    where = f"on {', '.join(machines)}; commit {', '.join(commits)}; {versions}."
    lines = [f"{len(made)} runs{tuned}, {hours:.1f} hours in all, {where}"]
    if scores:
        data = f", {made[0].data}" if made[0].data else ""
        lines.append(f"The base without training: {'; '.join(scores)} (of the first run's data{data}).")
    return lines


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Values by step of the entries that have the key."""
    return {entry["step"]: entry[key] for entry in entries if entry.get(key) is not None and "step" in entry}


def _checkpoints(result: Result) -> list[dict[str, Any]]:
    """What the analysis drift says of each checkpoint."""
    found: list[dict[str, Any]] = result.after.get("drift", {}).get("checkpoints", [])
    return found


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> list[tuple[float, float]]:
    """The mean over runs at the steps that all of them have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return [(float(step), statistics.mean(curve[step] for curve in curves)) for step in steps]


_VIEW = re.compile(r'viewBox="0 0 (\d+) (\d+)"')
_STYLE = (
    "<style>text{font:11px system-ui,sans-serif;fill:#1b1f24}.grid{stroke:#d0d7de;stroke-width:1}</style>"
    '<rect width="100%" height="100%" fill="#ffffff"/>'
)


def _standalone(chart: Markup, names: Sequence[str]) -> str:
    """A chart as a file of its own: with its colours, and a legend beneath."""
    if not chart:
        return ""
    view = _VIEW.search(chart)
    assert view is not None
    height, extra = int(view[2]), (16 * len(names) + 8 if len(names) > 1 else 0)
    legend = ""
    for number, name in enumerate(names if extra else []):
        y = height + 12 + 16 * number
        legend += f'<line x1="66" x2="90" y1="{y}" y2="{y}" stroke-width="2" {line_style(number)}/>'
        legend += f'<text x="96" y="{y + 4}">{escape(name)}</text>'
    text = _VIEW.sub(f'viewBox="0 0 {WIDTH} {height + extra}"', str(chart), count=1)
    head, _, rest = text.partition(">")
    return f"{head}>{_STYLE}{rest.removesuffix('</svg>')}{legend}</svg>\n"


def _paragraphs(text: str) -> list[str]:
    return [text.strip(), ""] if text.strip() else []


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    studies, out = map(Path, arguments)
    for path in write_pages(studies, out):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
