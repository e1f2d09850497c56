"""Handwritten digits with questions: 1,797 scans of 8 x 8 pixels by 13 people, the test part of UCI's "Optical
Recognition of Handwritten Digits", which scikit-learn ships.

    which       Which digit is this?                 one of ten
    is          Is this a 7?                         yes / no
    greater     Is this digit greater than 4?        yes / no
    plus        What is this digit plus 3?           a number up to 18

`is` and `greater` are right as often as not. `plus` asks for what is seen and for arithmetic.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskft.data.easy_vqa import INSTRUCTION
from maskft.data.llava_folder import llava_row, write_rows
from maskft.data.pictures import refuse_shares
from maskft.data.questions import Asked, share_guessed
from maskft.errors import DataError, MissingExtraError
from maskft.folders import refuse_existing, staged

INSTALL = "pip install --no-deps scikit-learn"
_SIDE, _MOST = 8, 16
"""Pixels of a scan's side, and the value of full ink."""


def write_digits(
    out: Path, *, validation: float = 0.05, test: float = 0.3, size: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Write the data set into a new folder in LLaVA's form; returns its summary.

    Args:
        out: the folder.
        validation, test: shares of the scans, drawn by `seed`.
        size: side of a written picture, in pixels.
        seed: of everything that is drawn.

    Raises:
        MissingExtraError: the package scikit-learn is not installed.
        DataError: shares that leave a part empty.
        RunError: `out` is there already.
    """
    refuse_existing(out)
    refuse_shares(validation, test)
    scans, digits = _scans()
    order = list(range(len(digits)))
    random.Random(f"{seed}:scans").shuffle(order)
    of_test = min(max(1, round(test * len(order))), len(order) - 2)
    held = min(of_test + max(1, round(validation * len(order))), len(order) - 1)
    parts = {"train": order[held:], "validation": order[of_test:held], "test": order[:of_test]}
    asked = {name: _asked(chosen, digits, random.Random(f"{seed}:{name}")) for name, chosen in parts.items()}
    summary = {
        "collection": "digits",
        "seed": seed,
        "pictures": {name: len(chosen) for name, chosen in parts.items()},
        "questions": {name: len(questions) for name, questions in asked.items()},
        "guessed": {name: share_guessed(asked["train"], asked[name]) for name in ("validation", "test")},
    }
    with staged(out) as folder:
        (folder / "images").mkdir()
        for number, scan in enumerate(scans):
            (folder / _file(str(number))).write_bytes(_picture(scan, size))
        rows = {
            name: [
                llava_row(f"digits/{one.picture}/{one.type}", _file(one.picture), [(one.question, one.answer)])
                for one in questions
            ]
            for name, questions in asked.items()
        }
        write_rows(folder, rows, summary)
    return summary


def _scans() -> tuple[np.ndarray[Any, Any], list[int]]:
    """Ink of each scan (n, 8, 8), 0 to 16, and the digits."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("scikit-learn", INSTALL, "Its digits")
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DataError(f"this scikit-learn has no {file.name} in its datasets/data. Install another: {INSTALL}")
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    return table[:, :-1].reshape(-1, _SIDE, _SIDE), [int(digit) for digit in table[:, -1]]


def _picture(scan: np.ndarray[Any, Any], size: int) -> bytes:
    """Dark ink on a white ground, as PNG."""
    grey = Image.fromarray((255 * (1 - scan / _MOST)).round().astype(np.uint8))
    written = io.BytesIO()
    grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(written, "PNG")
    return written.getvalue()


def _asked(chosen: list[int], digits: list[int], draw: random.Random) -> list[Asked]:
    """Four questions about each scan, shuffled."""
    asked = [one for place, scan in enumerate(chosen) for one in _about(scan, digits[scan], place, draw)]
    draw.shuffle(asked)
    return asked


def _about(scan: int, digit: int, place: int, draw: random.Random) -> Iterator[Asked]:
    """`place` counts the scans, every second of which is asked about another digit."""
    other = draw.choice([number for number in range(10) if number != digit])
    named, yes = (digit, "yes") if place % 2 else (other, "no")
    addend = draw.randint(1, 9)
    for type_, question, answer in (
        ("which", "Which digit is this?", str(digit)),
        ("is", f"Is this a {named}?", yes),
        ("greater", "Is this digit greater than 4?", "yes" if digit > 4 else "no"),
        ("plus", f"What is this digit plus {addend}?", str(digit + addend)),
    ):
        yield Asked(str(scan), type_, f"{question}{INSTRUCTION}", answer)


def _file(scan: str) -> str:
    return f"images/{scan}.png"
