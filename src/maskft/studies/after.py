"""Analyses of a finished run that a study can ask for by name, under `after`.

An analysis takes the run's folder and returns what JSON can hold; it ends up in the result's `after`. To add one,
write the function and give it a name in `ANALYSES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskft.analysis import by_place, checkpoints, drift, saved_masks, statistics
from maskft.analysis.attribution import OF_ONE
from maskft.errors import StudyError, did_you_mean

Analysis = Callable[[Path], Any]
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


ANALYSES: dict[str, Analysis] = {**OF_ONE, "masks": masks, "drift": mask_drift, "gates": gate_records}


def analyses(names: Iterable[str]) -> dict[str, Analysis]:
    """Analyses by name.

    Raises:
        StudyError: there is none of a name.
    """
    for name in names:
        if name not in ANALYSES:
            raise StudyError(
                f"there is no analysis '{name}'.{did_you_mean(name, ANALYSES)} Allowed: {', '.join(ANALYSES)}."
            )
    return {name: ANALYSES[name] for name in names}
