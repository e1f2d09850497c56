"""Analyses of a finished run that a study can ask for by name, under `after`.

An analysis takes the run's folder and returns what JSON can hold; it ends up in the result's `after`. Those under
`across` take the folders of runs that differ in their seeds; what they find ends up in across.json. To add one, write
the function and give it a name in `ANALYSES` or `ACROSS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from maskft.analysis import by_place, checkpoints, drift, overlap, saved_masks, statistics
from maskft.analysis.attribution import OF_ONE
from maskft.errors import StudyError, did_you_mean
from maskft.studies.definition import Cell

Analysis = Callable[[Path], Any]
Comparison = Callable[[Sequence[Path]], dict[str, float | None]]
SAMPLE = 4096
"""Gates of each matrix that are looked at."""


def masks(run: Path) -> list[dict[str, Any]]:
    """Statistics of the mask by layer and module, from a sample of its gates."""
    places = by_place({mask.name: statistics(mask) for mask in saved_masks(run, sample=SAMPLE)})
    return [{**asdict(place), **asdict(found)} for place, found in places.items()]


def mask_drift(run: Path) -> list[dict[str, Any]]:
    """How far the mask was at each checkpoint that was kept, and at the end."""
    kept = checkpoints(run)
    last = max(kept, default=0) + 1
    return [asdict(step) for step in drift({**kept, last: run})] if kept else []


def gate_records(run: Path) -> list[dict[str, Any]]:
    """What training wrote about the gates at each logging step."""
    path = run / "mask_stats.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else []
    return found


def agreement(runs: Sequence[Path]) -> dict[str, float | None]:
    """Whether masks of two runs change the same weights: the mean over pairs of runs, and what chance would give."""
    masks = [list(saved_masks(run, sample=SAMPLE)) for run in runs]
    pairs = [overlap(first, second) for first, second in combinations(masks, 2)]
    shared = [pair.shared for pair in pairs if pair.shared is not None]
    return {
        "shared": math.fsum(shared) / len(shared) if shared else None,
        "by chance": math.fsum(pair.by_chance for pair in pairs) / len(pairs),
    }


ANALYSES: dict[str, Analysis] = {**OF_ONE, "masks": masks, "drift": mask_drift, "gates": gate_records}


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
        found.append({**entry, "found": {name: compare(runs) for name, compare in chosen.items()}})
    return found
