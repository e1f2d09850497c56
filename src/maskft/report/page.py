"""One self-contained HTML page about runs: it opens from disk, asks nothing of a network and holds no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from maskft import __version__
from maskft.errors import RunError
from maskft.report import figures
from maskft.report.charts import shortened
from maskft.report.gallery import KINDS, Example, examples
from maskft.report.gather import RunView, flat, gather, settings
from maskft.runs import write_atomically

_TEMPLATES = Environment(
    loader=PackageLoader("maskft.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(folders: Sequence[Path], out: Path) -> int:
    """Write the report of runs into a file, atomically; return its size in bytes.

    Raises:
        RunError: a folder is not a run, a file in it cannot be read, or `out` cannot be written.
        RecipeError: a recipe cannot be read.
    """
    page = render(gather(folders))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise RunError(f"the report cannot be written to {out}: {error.strerror}. Give another --output.") from error
    return len(page.encode())


def render(runs: Sequence[RunView]) -> str:
    """The page as text."""
    common, differing = settings(runs)
    overlap, remarks = figures.overlaps(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    each = 4 if len(runs) <= 5 else 2
    shown: str = _TEMPLATES.get_template("report.html").render(
        title=title,
        version=__version__,
        style=Markup(_TEMPLATES.get_template("style.css").render()),
        runs=[_run(run, each) for run in runs],
        result=figures.results(runs),
        by_type=figures.results_by_type(runs),
        learning=figures.learning(runs),
        drifts=[*figures.drifts(runs), *(_by_module(runs[0]) if len(runs) == 1 else [])],
        overlap=overlap,
        remarks=remarks,
        costs=_costs(runs),
        common={key: _text(value) for key, value in common.items()},
        differing=bool(differing),
        differing_rows=[[key, *map(_text, values)] for key, values in differing.items()],
    )
    return shown


def _run(run: RunView, each: int) -> dict[str, Any]:
    """What the template shows of one run."""
    return {
        "name": run.name,
        "folder": str(run.folder),
        "remark": run.remark,
        "split": run.split,
        "heat": figures.heat(run),
        "gates": figures.gates(run),
        "examples": _by_kind(examples(run.answers, run.recipe.evaluation.metric, each)),
        "environment": {key: _text(value) for key, value in flat(run.environment).items()},
        "recipe": run.recipe.to_yaml(),
    }


def _by_kind(found: Sequence[Example]) -> dict[str, list[Example]]:
    groups = {title: [one for one in found if one.kind == kind] for kind, title in KINDS.items()}
    return {title: group for title, group in groups.items() if group}


def _by_module(run: RunView) -> list[figures.Figure]:
    path = run.folder / "mask_stats.json"
    if not run.records:
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return figures.module_drift(run, content["modules"], content["gates"])


def _costs(runs: Sequence[RunView]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what training took: everything that metrics.json says of it."""
    trained = [run.metrics.get("train", {}) for run in runs]
    keys = [key for key in dict.fromkeys(k for t in trained for k in t) if any(t.get(key) is not None for t in trained)]
    if not keys:
        return [], []
    columns = ["run", *(key.replace("_", " ") for key in keys)]
    rows = [[run.name, *(_text(t.get(key)) for key in keys)] for run, t in zip(runs, trained, strict=True)]
    return columns, rows


def _text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | Mapping):
        return ", ".join(map(str, value)) or "-"
    return shortened(str(value), 400)
