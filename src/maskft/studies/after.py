"""Analyses of a finished run that a study can ask for by name, under `after`, with settings of their own.

An analysis takes the run's folder, and numbers by name as its settings; it returns what JSON can hold, which ends up in
the result's `after`. A study's page shows the numbers of an object. Those under `across` take the folders of runs that
differ in their seeds; what they find ends up in across.json. To add one, write the function and give it a name in
`ANALYSES` or `ACROSS`.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from maskft.analysis import by_place, saved_masks, statistics
from maskft.analysis.attribution import OF_ONE, agreement
from maskft.errors import StudyError, UserError, did_you_mean
from maskft.guard import CHECKPOINTS
from maskft.studies.definition import Cell
from maskft.studies.sections import Settings

Comparison = Callable[[Sequence[Path]], dict[str, Any]]
SAMPLE = 4096
"""Gates of each matrix that are looked at."""
NOT_DONE = "not_done"
"""The key under which it is said why an analysis could not be made."""


def masks(run: Path) -> list[dict[str, Any]]:
    """Statistics of the mask by layer and module, from a sample of its gates."""
    places = by_place({mask.name: statistics(mask) for mask in saved_masks(run, sample=SAMPLE)})
    return [{**asdict(place), **asdict(found)} for place, found in places.items()]


def gate_records(run: Path) -> list[dict[str, Any]]:
    """What training wrote about all gates together at each logging step; of single modules the run's folder tells."""
    path = run / "mask_stats.json"
    found = json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else []
    return [{"step": record["step"], "overall": record["overall"]} for record in found]


ANALYSES: dict[str, Callable[..., Any]] = {**OF_ONE, "masks": masks, "gates": gate_records}


ACROSS: dict[str, Comparison] = {"agreement": agreement}
Found = TypeVar("Found")


def named(names: Iterable[str], known: Mapping[str, Found]) -> dict[str, Found]:
    """Entries of `ANALYSES` or `ACROSS` by name.

    Raises:
        StudyError: there is none of a name.
    """
    for name in names:
        if name not in known:
            raise StudyError(f"there is no analysis '{name}'.{did_you_mean(name, known)} Allowed: {', '.join(known)}.")
    return {name: known[name] for name in names}


def check_after(after: Mapping[str, Settings]) -> None:
    """Raise StudyError where there is no analysis of a name, or a setting is none of its own or no positive number."""
    for name, analyse in named(after, ANALYSES).items():
        given = inspect.signature(analyse).parameters.values()
        known = {one.name: type(one.default) for one in given if one.kind is inspect.Parameter.KEYWORD_ONLY}
        for key, value in after[name].items():
            if key not in known:
                allowed = f"Allowed: {', '.join(known)}." if known else "It has none."
                raise StudyError(f"the analysis {name} has no setting '{key}'.{did_you_mean(key, known)} {allowed}")
            kinds = int if known[key] is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                what = "whole number" if kinds is int else "number"
                raise StudyError(f"after.{name}.{key} is {value!r}; it must be a {what} above 0.")


def analysed(run: Path, after: Mapping[str, Settings], say: Callable[[str], None]) -> dict[str, Any]:
    """What the analyses find in a run; {"not_done": why} of one that cannot be made, which is also said."""
    found: dict[str, Any] = {}
    for name, analyse in named(after, ANALYSES).items():
        try:
            found[name] = analyse(run, **after[name])
        except UserError as error:
            say(f"{name} was not done: {error}")
            found[name] = {NOT_DONE: str(error).replace(str(run), "the run")}
    return found


def compare_seeds(
    cells: Iterable[Cell], folder_of: Callable[[Cell], Path], names: Iterable[str]
) -> list[dict[str, Any]]:
    """What the analyses find for each variant, data set and axis values of which all runs are on this machine.

    Args:
        cells: runs of the study.
        folder_of: gives a cell's run folder.
        names: of analyses in `ACROSS`.
    """
    chosen, rows, found = named(names, ACROSS), dict[str, list[Cell]](), []
    for cell in cells:
        rows.setdefault(json.dumps([cell.group, cell.settings]), []).append(cell)
    for same in rows.values():
        runs = [folder_of(cell) for cell in same]
        if len(runs) < 2 or not all((run / "metrics.json").is_file() for run in runs):
            continue
        entry = {"variant": same[0].variant, "data": same[0].data, "settings": same[0].settings}
        found.append({**entry, "found": {name: _compared(compare, runs) for name, compare in chosen.items()}})
    return found


def _compared(compare: Comparison, runs: Sequence[Path]) -> dict[str, Any]:
    try:
        return compare(runs)
    except UserError as error:
        said = str(error)
        for run in runs:
            said = said.replace(str(run), "a run")
        return {NOT_DONE: said}


def remove_weights(run: Path, *, keep: bool | Literal["final"]) -> None:
    """Remove what is not to be kept of a run's weights and checkpoints; its record stays."""
    if keep is not True:
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    for file in run.rglob("*.safetensors") if not keep else ():
        file.unlink()
