"""Labelled pictures from a folder become parts of which none shows what another shows.

Pictures are scaled down, put on white, and compared by content. Equal ones are kept once. Near-equal ones and those of
one series (a folder's files whose names start with the same word) stay in one part.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from maskft.data.images import image_size, open_image
from maskft.errors import DataError

MAX_DRAWING = 16_000_000
"""Pixels of the largest drawing that is decoded; beyond are mistakes, some of them of 600 million pixels."""
SERIES = 12
"""Pictures of one series that are kept."""
NEAR = 0.95
"""Pictures whose contents correlate more than this count as near-equal."""
_GRID = 16
_FAINT = 12
"""A pixel this much darker than white, of 255, belongs to the content."""
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Labelled:
    """A picture's file and what people said of it.

    Attributes:
        name: its path below the source, without suffix, such as "animals/birds/hen".
        file: to open.
        kind: what sort of thing it shows, such as "animals"; None where nobody said.
        title: what it shows, such as "brown hen"; None where nobody said it in a few words.
        phrase: the title as a question asks for it, such as "Is there a brown hen".
        words: all words that may be true of it.
    """

    name: str
    file: Path
    kind: str | None
    title: str | None
    phrase: str | None
    words: frozenset[str]

    @property
    def series(self) -> str:
        """Name of the series: the folder and the first word of the file's name."""
        folder, _, stem = self.name.rpartition("/")
        first = re.search(r"[a-z]+", stem.lower())
        return f"{folder}/{first[0] if first else stem}"


@dataclass(frozen=True)
class Picture:
    """A picture that is kept.

    Attributes:
        label: what is said of it.
        png: the image as PNG, RGB and scaled down.
        content: (256,) grey values of what is drawn, mean 0 and norm 1; zeros for an empty picture.
    """

    label: Labelled
    png: bytes
    content: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Pictures:
    """The parts, and what was left out.

    Attributes:
        parts: pictures by part, in the order of their names.
        left_out: how many, by reason.
        unreadable: names of the files that cannot be decoded.
        nearest: largest correlation between a picture that is trained on and one that is held out.
    """

    parts: dict[str, list[Picture]]
    left_out: dict[str, int]
    unreadable: list[str]
    nearest: float


def gather_pictures(
    labelled: Sequence[Labelled],
    *,
    validation: float,
    test: float,
    size: int = 224,
    seed: int = 0,
    progress: Callable[[Iterable[Labelled]], Iterable[Labelled]] = iter,
) -> Pictures:
    """Decode, compare and split pictures.

    Args:
        labelled: the pictures; those with neither kind nor title are left out.
        validation, test: shares of the pictures, by series and near-equal ones together.
        size: longest side of a kept picture, in pixels.
        seed: of the split, and of which pictures of a long series are kept.
        progress: wraps the pictures.

    Raises:
        DataError: shares that leave nothing for training, or a part that would be empty.
    """
    refuse_shares(validation, test)
    told = sorted((one for one in labelled if one.kind or one.title), key=lambda one: one.name)
    thinned = _thinned(told, seed)
    left_out = {"no label": len(labelled) - len(told), "long series": len(told) - len(thinned)}
    left_out |= dict.fromkeys(("too large", "unreadable", "equal"), 0)
    found: dict[bytes, list[Picture]] = defaultdict(list)
    unreadable = []
    for label in progress(thinned):
        try:
            entry = {"path": str(label.file), "bytes": None}
            width, height = image_size(entry)
            if width * height > MAX_DRAWING:
                left_out["too large"] += 1
                continue
            image = open_image(entry)
        except DataError as error:
            too_large = "more than" in str(error)
            left_out["too large" if too_large else "unreadable"] += 1
            unreadable += [] if too_large else [label.name]
            continue
        image.thumbnail((size, size))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found[buffer.getvalue()].append(Picture(label, buffer.getvalue(), _content(image)))
    pictures = []
    for same in found.values():
        left_out["equal"] += len(same) - 1
        pictures.append(_merged(same))
    parts = _split(pictures, {"test": test, "validation": validation}, seed)
    held_out = [*parts["validation"], *parts["test"]]
    return Pictures(parts, left_out, unreadable, _nearest(parts["train"], held_out))


def refuse_shares(validation: float, test: float) -> None:
    """Refuse shares of held-out parts that leave nothing for one of the three.

    Raises:
        DataError: they do, or one is not a number.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise DataError(
            f"validation is {validation} and test {test}; both must be above 0, and their sum below 1. "
            "Give for example 0.1 and 0.25."
        )


def _merged(same: Sequence[Picture]) -> Picture:
    """Equal pictures as one, which has a kind where all that have one agree."""
    labels = [one.label for one in same]
    kinds = {label.kind for label in labels if label.kind}
    told = next((label for label in labels if label.title), labels[0])
    words = frozenset().union(*(label.words for label in labels))
    return replace(same[0], label=replace(told, kind=kinds.pop() if len(kinds) == 1 else None, words=words))


def _order(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _thinned(labelled: Sequence[Labelled], seed: int) -> list[Labelled]:
    """At most SERIES pictures of each series, drawn by `seed`, in the order given."""
    series: dict[str, list[Labelled]] = defaultdict(list)
    for one in labelled:
        series[one.series].append(one)
    kept = {
        one.name
        for members in series.values()
        for one in sorted(members, key=lambda member: _order(member.name, seed))[:SERIES]
    }
    return [one for one in labelled if one.name in kept]


def _content(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    grey = image.convert("L")
    box = ImageChops.invert(grey).point(lambda value: 255 if value > _FAINT else 0).getbbox()
    small = grey.crop(box).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    values = np.asarray(small, dtype=np.float32).ravel()
    values = values - values.mean()
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1 else np.zeros_like(values)


def _near(pictures: Sequence[Picture]) -> Iterable[tuple[int, int]]:
    """Pairs of near-equal pictures, by position."""
    contents = np.stack([one.content for one in pictures])
    for start in range(0, len(contents), 512):
        rows, columns = np.nonzero(contents[start : start + 512] @ contents.T > NEAR)
        yield from ((int(i) + start, int(j)) for i, j in zip(rows, columns, strict=True) if i + start < j)


def _nearest(first: Sequence[Picture], second: Sequence[Picture]) -> float:
    a, b = (np.stack([one.content for one in pictures]) for pictures in (first, second))
    return max(float((a[start : start + 512] @ b.T).max()) for start in range(0, len(a), 512))


def _split(pictures: Sequence[Picture], shares: dict[str, float], seed: int) -> dict[str, list[Picture]]:
    """Parts by group, filled in an order drawn by `seed`; a part takes a group only while it stays within its share."""
    groups = _groups(pictures)
    room = {part: max(1, round(share * len(pictures))) for part, share in shares.items()}
    parts: dict[str, list[Picture]] = {part: [] for part in PARTS}
    for members in sorted(groups, key=lambda group: _order(group[0].label.name, seed)):
        part = next((part for part, left in room.items() if len(members) <= left), "train")
        parts[part] += members
        if part != "train":
            room[part] -= len(members)
    for part, members in parts.items():
        if not members:
            raise DataError(
                f"the {part} part would be empty: {len(pictures)} pictures form {len(groups)} group(s) of near-equal "
                "ones. Give a source with more pictures, or other shares."
            )
        members.sort(key=lambda one: one.label.name)
    return parts


def _groups(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Pictures that must stay together: of one series, or near-equal."""
    parent = list(range(len(pictures)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    in_series = ((first.setdefault(one.label.series, i), i) for i, one in enumerate(pictures))
    for i, j in chain(in_series, _near(pictures) if pictures else ()):
        low, high = sorted((find(i), find(j)))
        parent[high] = low
    groups: dict[int, list[Picture]] = defaultdict(list)
    for i, one in enumerate(pictures):
        groups[find(i)].append(one)
    return list(groups.values())
