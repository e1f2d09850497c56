"""Questions to show: where the tuned model is wrong, where it has gained, and where its answer has changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from maskft.data import open_image
from maskft.errors import DataError
from maskft.evaluation.evaluate import scored

EACH = 4
"""Examples of a kind."""
SIDE = 160
"""Longer side of a picture, in pixels."""
KINDS = {
    "lost": "Right before, wrong after",
    "wrong": "Wrong before and after",
    "gained": "Wrong before, right after",
    "changed": "Another answer, neither better nor worse",
}


@dataclass(frozen=True)
class Example:
    """A question with its answers.

    Attributes:
        kind: one of KINDS.
        question, before, after, truth: texts.
        picture: a data URI; None where there is no image or it cannot be read.
        missing: why there is no picture.
        before_score, after_score: in [0, 1].
    """

    kind: str
    question: str
    before: str
    after: str
    truth: str
    picture: str | None
    missing: str
    before_score: float
    after_score: float


def examples(records: Sequence[Mapping[str, Any]], metric: str, each: int = EACH) -> list[Example]:
    """A few records of each kind, spread over the test set, worst kinds first.

    Args:
        records: as `maskft.evaluation.evaluate_run` writes them.
        metric: name of the metric that scores an answer.
        each: at most so many of a kind.
    """
    before, after = (scored(metric, [str(r[side]) for r in records], records) for side in ("base", "tuned"))
    kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for number, record in enumerate(records):
        kind = _kind(before[number], after[number], record["base"] != record["tuned"])
        if kind:
            kinds[kind].append(number)
    return [
        _example(kind, records[number], before[number], after[number])
        for kind, numbers in kinds.items()
        for number in _spread(numbers, each)
    ]


def _kind(before: float, after: float, changed: bool) -> str | None:
    if after < before:
        return "lost"
    if after > before:
        return "gained"
    if after < 0.5:
        return "wrong"
    return "changed" if changed else None


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers at even distances."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[len(numbers) * i // count] for i in range(count)]


def _example(kind: str, record: Mapping[str, Any], before: float, after: float) -> Example:
    picture, missing = None, "no image"
    if record.get("image"):
        try:
            picture = data_uri(open_image({"path": str(record["image"]), "bytes": None}))
        except DataError as error:
            missing = f"image not shown: {error}"
    question, base, tuned, truth = (str(record[name]) for name in ("question", "base", "tuned", "truth"))
    return Example(kind, question, base, tuned, truth, picture, missing, before, after)


def data_uri(image: Image.Image, side: int = SIDE) -> str:
    """An RGB image as a JPEG no larger than `side` pixels, to be put into a page."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
