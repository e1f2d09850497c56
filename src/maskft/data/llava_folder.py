"""Data sets written as a folder in LLaVA's form, which `data.kind: files` reads.

train.json, validation.json, test.json, ...     rows
images/                                         what they name
summary.json                                    what was made of what
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskft.data.labels import read_clipart, read_stamps
from maskft.data.pictures import Labelled, gather_pictures
from maskft.data.questions import ALL_TYPES, TYPES, ask, report
from maskft.errors import DataError, did_you_mean
from maskft.folders import staged

COLLECTIONS: dict[str, Callable[[Path], list[Labelled]]] = {"stamps": read_stamps, "clipart": read_clipart}
SUMMARY = "summary.json"


def llava_row(name: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A row of questions and answers about one image, which stands before the first question."""
    said = []
    for number, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": said}


def write_rows(folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]], summary: Mapping[str, Any]) -> None:
    """Write the rows of each part and the summary into a folder that exists."""
    for part, rows in parts.items():
        (folder / f"{part}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_collection(
    kind: str,
    source: Path,
    out: Path,
    *,
    validation: float = 0.1,
    test: float = 0.25,
    size: int = 224,
    types: Sequence[str] = TYPES,
    seed: int = 0,
    progress: Callable[[Iterable[Labelled]], Iterable[Labelled]] = iter,
) -> dict[str, Any]:
    """Make a data set of one of COLLECTIONS in a new folder; returns its summary.

    Args:
        kind: "stamps" or "clipart".
        source: / or a folder that the Debian packages were unpacked into.
        validation, test: shares of the pictures.
        size: longest side of a written picture, in pixels.
        types: of the questions, some of `maskft.data.questions.ALL_TYPES`.
        seed: of everything that is drawn.

    Raises:
        DataError: no such collection or type of questions, or the collection's files are not there.
        RunError: `out` is there already.
    """
    if kind not in COLLECTIONS:
        raise DataError(
            f"'{kind}' is no collection; it must be {' or '.join(COLLECTIONS)}.{did_you_mean(kind, COLLECTIONS)}"
        )
    if unknown := [name for name in types if name not in ALL_TYPES]:
        meant = did_you_mean(unknown[0], ALL_TYPES)
        raise DataError(f"there are no questions '{unknown[0]}'; there are {', '.join(ALL_TYPES)}.{meant}")
    labelled = COLLECTIONS[kind](source)
    with staged(out) as folder:
        pictures = gather_pictures(labelled, validation=validation, test=test, size=size, seed=seed, progress=progress)
        asked = {
            part: ask([one.label for one in shown], types=types, seed=seed) for part, shown in pictures.parts.items()
        }
        files = {}
        for one in (one for shown in pictures.parts.values() for one in shown):
            files[one.label.name] = f"images/{one.label.name}.png"
            file = folder / files[one.label.name]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(one.png)
        summary = {
            "collection": kind,
            "source": str(source),
            "seed": seed,
            "pictures_found": len(labelled),
            "left_out": pictures.left_out,
            "unreadable": pictures.unreadable,
            "pictures": {part: len(shown) for part, shown in pictures.parts.items()},
            "nearest_in_training": round(pictures.nearest, 4),
            "questions": report(asked),
        }
        rows = {
            part: [
                llava_row(f"{kind}/{one.picture}/{one.type}/{number}", files[one.picture], [(one.question, one.answer)])
                for number, one in enumerate(questions)
            ]
            for part, questions in asked.items()
        }
        write_rows(folder, rows, summary)
    return summary
