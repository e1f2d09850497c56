"""Finished runs that a folder of results tells of, so that a study goes on without the database that it was begun with,
or gathers what was run in several places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from maskft.errors import StudyError
from maskft.recipe import Recipe
from maskft.studies.definition import Cell
from maskft.studies.results import Result, read_results, result_name
from maskft.studies.trial import portable


def read_known(folder: Path | None) -> list[Result]:
    """The results in a folder; none without one.

    Raises:
        StudyError: there is no such folder, it has no results, or one of them cannot be read.
    """
    found = [] if folder is None else read_results(folder)
    if folder is not None and not found:
        raise StudyError(f"{folder} has no results. Give --known a folder of a study's *.json results.")
    return found


def result_of(cell: Cell, recipe: Mapping[str, Any], parts: Iterable[str], known: Iterable[Result]) -> Result | None:
    """The known result of a cell, made by the same recipe and with these parts answered; None where there is none.

    Args:
        recipe: the cell's, as results hold theirs.
    """
    wanted = (cell.stage, cell.variant, cell.data, cell.seed, dict(cell.environment))
    for result in known:
        made = (result.stage, result.variant, result.data, result.seed, result.environment)
        if made == wanted and set(parts) <= set(result.parts) and _complete(result.recipe) == recipe:
            return result
    return None


def _complete(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A result's recipe with the values of settings that it was made without; as it is where it is none of today's."""
    try:
        found: dict[str, Any] = portable(Recipe.model_validate(recipe).model_dump(mode="json"))
    except ValueError:
        return dict(recipe)
    return found


def differing(result: Result, others: Iterable[Result]) -> str | None:
    """What a run did not have in common with another one of the same base or data; None where it did.

    Of a path outside the current folder results keep the last piece, which other bases may share: those are compared
    in runs that differ in their seeds alone.
    """
    kept_whole = "/" in result.recipe.get("model", {}).get("base", "")
    for other in (other for other in others if other.data == result.data):
        alike = kept_whole or (other.variant, other.settings) == (result.variant, result.settings)
        same = {part for part in ("model", "data") if other.recipe.get(part) == result.recipe.get(part)}
        if "model" in same and alike and other.base_fingerprint != result.base_fingerprint:
            return f"the base has other weights than in the run {result_name(other)}"
        if "data" in same and other.data_fingerprint != result.data_fingerprint:
            return f"the data have other rows than in the run {result_name(other)}"
    return None
