"""All data of a recipe looked at: every flaw of every part, images that parts share, and a copy without the flaws."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft.data import load_easy_vqa, scan
from maskft.data.checks import RowChecks
from maskft.data.formats import Record, image_folder
from maskft.data.rewrite import as_json, rewritten
from maskft.data.survey import Survey, survey
from maskft.errors import DataError, UserError
from maskft.folders import refuse_existing, staged
from maskft.recipe import EasyVqaData, Recipe
from maskft.vlm.load import load_processor

DROPPED = "dropped.jsonl"
"""In the folder of a clean copy: what was left out, a row a line."""

Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        parts: a survey of each part's file: "train", and "validation" and "test" where they have files of their own.
        shared: decoded images that two parts share, by their names, such as ("train", "test").
        overrides: of the recipe, to train on the clean copy; empty where none was written.
    """

    parts: dict[str, Survey]
    shared: dict[tuple[str, str], int]
    overrides: tuple[str, ...] = ()

    @property
    def flaws(self) -> int:
        """How many there are."""
        return sum(len(part.flaws) for part in self.parts.values())


def inspect(
    recipe: Recipe,
    *,
    max_length: int | None,
    images: int | None = None,
    workers: int = 1,
    fix: Path | None = None,
    progress: Progress = lambda label: lambda items: items,
) -> Inspection:
    """Look at every row of every part, as before training, and past the first flaws.

    Args:
        recipe: whose data and base's processor are used.
        max_length: tokens that a row may have; None for any number.
        images: decode so many distinct images of a part at most; of the others the headers are read.
        workers: processes.
        fix: a new folder for copies of the files without the rows that have flaws, and a list of those rows.
        progress: gives a wrapper for the iteration over the rows of a part.

    Raises:
        DataError: a file cannot be read, or has no row without flaws to write a copy of.
        UserError: the data is the demo's, of which no copies are written.
        RunError: `fix` exists and is not empty.
    """
    if fix is not None:
        refuse_existing(fix)
        if isinstance(recipe.data, EasyVqaData):
            raise UserError("--fix writes copies of data files, and the data of this recipe is the demo's.")
    base, trusted = recipe.model.base, recipe.model.trust_remote_code
    make_checks = functools.partial(_make_checks, base, trusted, max_length)
    options: dict[str, Any] = {"images": images, "workers": workers}
    files = _files(recipe)
    found: dict[str, Survey] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(staged(fix)) if fix is not None else None
        dropped = stack.enter_context((folder / DROPPED).open("w", encoding="utf-8")) if folder else None
        for name, records in _parts(recipe, files).items():
            with contextlib.ExitStack() as part:
                if folder is not None:
                    options["keep"] = part.enter_context(rewritten(files[name], folder / _copy(name, files[name])))
                found[name] = survey(records, make_checks, progress=progress(f"checking {name}"), **options)
            if not found[name].rows:
                raise DataError(f"{files[name]} holds no rows. Give a file with at least one example.")
            if dropped is not None:
                for flaw in found[name].flaws:
                    print(as_json({"part": name, "file": str(files[name]), **flaw._asdict()}), file=dropped)
                if found[name].flawed == found[name].rows:
                    raise DataError(f"every row of {files[name]} has a flaw, so nothing was written. Mend the file.")
    overrides = _overrides(recipe, files, fix) if fix is not None else ()
    return Inspection(found, _shared(found), overrides)


def _make_checks(base: str, trust_remote_code: bool, max_length: int | None) -> RowChecks:
    return RowChecks(load_processor(base, trust_remote_code=trust_remote_code), max_length)


def _files(recipe: Recipe) -> dict[str, Path]:
    """The data files by part; none of the demo's data."""
    data = recipe.data
    if isinstance(data, EasyVqaData):
        return {}
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: path for name, path in named.items() if path is not None}


def _parts(recipe: Recipe, files: dict[str, Path]) -> dict[str, Iterator[Record]]:
    data = recipe.data
    if isinstance(data, EasyVqaData):
        demo = load_easy_vqa(data.part, limits=data.limits, seed=data.seed, turns=data.turns, balanced=data.balanced)
        return {name: (Record(row["origin"], None, row) for row in rows) for name, rows in demo.items()}
    for path in files.values():
        image_folder(path, data.image_root)  # so that a missing file shows before another is read for hours
    return {name: scan(path, format=data.format, image_root=data.image_root) for name, path in files.items()}


def _copy(name: str, source: Path) -> str:
    return name if source.is_dir() else f"{name}{source.suffix.lower()}"


def _overrides(recipe: Recipe, files: dict[str, Path], fix: Path) -> tuple[str, ...]:
    """The recipe's keys that make it use the copies; image paths stay relative to where they were."""
    data: Any = recipe.data
    roots = {str(image_folder(path, data.image_root)) for path in files.values()}
    named = tuple(f"data.{name}={fix.absolute() / _copy(name, path)}" for name, path in files.items())
    return (*named, f"data.image_root={roots.pop()}") if len(roots) == 1 else named


def _shared(parts: dict[str, Survey]) -> dict[tuple[str, str], int]:
    pairs = itertools.combinations(parts, 2)
    counts = {(a, b): len(parts[a].contents & parts[b].contents) for a, b in pairs}
    return {pair: count for pair, count in counts.items() if count}
