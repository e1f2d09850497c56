"""Splitting data so that no image is in two parts."""

from __future__ import annotations

import hashlib
from typing import Any

from datasets import Dataset

from maskft.data.images import image_key
from maskft.data.schema import require_canonical
from maskft.errors import DataError


def split_by_image(dataset: Dataset, *, validation: float, test: float, seed: int) -> dict[str, Dataset]:
    """Split rows into "train", "validation" and "test"; rows which share an image content stay together.

    Fractions are of the rows, each in [0, 1) with a sum below 1. Rows with several images join the groups of all of
    them; a row without image is a group of its own. The order of groups depends on the contents and the seed only. A
    part takes a group only while it stays within its fraction. Rows keep their order.
    Raises DataError for bad fractions, unreadable images and a part that would be empty.
    """
    require_canonical(dataset)
    for name, value in (("validation", validation), ("test", test)):
        if not 0 <= value < 1:
            raise DataError(f"The {name} fraction is {value}, but must be at least 0 and below 1.")
    if validation + test >= 1:
        raise DataError(f"validation {validation} + test {test} leave nothing for training. Their sum must be below 1.")
    groups = sorted(_groups(dataset).items(), key=lambda item: hashlib.sha256(f"{seed}:{item[0]}".encode()).hexdigest())
    sizes = {"test": test, "validation": validation}
    room = {name: max(1, round(value * len(dataset))) if value else 0 for name, value in sizes.items()}
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for _, rows in groups:
        part = next((name for name, left in room.items() if len(rows) <= left), "train")
        parts[part].extend(rows)
        if part != "train":
            room[part] -= len(rows)
    for name, rows in parts.items():
        if not rows and (name == "train" or sizes[name]):
            raise DataError(
                f"The {name} part would be empty: {len(dataset)} rows form {len(groups)} group(s) of shared images. "
                "Give more different images or change the fractions."
            )
    return {name: dataset.select(sorted(rows)) for name, rows in parts.items()}


def leaked_images(a: Dataset, b: Dataset) -> int:
    """Return the number of distinct image contents that occur in both datasets."""
    return len(_all_keys(a) & _all_keys(b))


def _all_keys(dataset: Dataset) -> set[str]:
    known: dict[str, str] = {}
    return {key for row in dataset.select_columns(["images", "origin"]) for key in _row_keys(row, known)}


def _row_keys(row: dict[str, Any], known: dict[str, str]) -> list[str]:
    """Return the content hashes of a row's images; `known` maps paths already read to their hashes."""
    keys = []
    for image in row["images"]:
        path = image["path"]
        try:
            key = known.get(path) if path else None
            key = key or image_key(image)
        except DataError as error:
            raise DataError(f"{row['origin']}: {error}") from error
        if path:
            known[path] = key
        keys.append(key)
    return keys


def _groups(dataset: Dataset) -> dict[str, list[int]]:
    """Return row numbers by group; a group is named by its smallest image hash, or by its text row."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    known: dict[str, str] = {}
    first: list[str] = []
    for number, row in enumerate(dataset.select_columns(["id", "images", "origin"])):
        keys = _row_keys(row, known) or [f"text:{row['origin']}:{row['id']}:{number}"]
        for key in keys[1:]:
            low, high = sorted((find(keys[0]), find(key)))
            parent[high] = low  # the smaller hash names the group, whatever the order of rows
        first.append(keys[0])
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(first):
        groups.setdefault(find(key), []).append(number)
    return groups
