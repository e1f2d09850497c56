"""The demo's data in other splits and with other answers, to tell what was composed from what was learnt by rote.

compositional   every colour and every shape is trained on, but one shape of each colour only in the test part
random          every answer is drawn at random among those of its sort: what is right can only be remembered
"""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from maskft.data.collate import answer
from maskft.data.easy_vqa import COLORS, INSTRUCTION, SHAPES, Part, described, load_easy_vqa
from maskft.data.llava_folder import llava_row, write_rows
from maskft.data.questions import Asked, share_guessed
from maskft.folders import refuse_existing, staged

Split = Literal["official", "compositional"]
Labels = Literal["true", "random"]
Pair = tuple[str, str]


def held_out_pairs(seed: int = 0) -> list[Pair]:
    """Eight (colour, shape) pairs: one shape of each colour, each shape with two or three colours."""
    draw = random.Random(f"{seed}:pairs")
    colors, shapes = list(COLORS), list(SHAPES)
    draw.shuffle(colors)
    draw.shuffle(shapes)
    return sorted((color, shapes[number % len(shapes)]) for number, color in enumerate(colors))


def write_easy_vqa(
    out: Path, *, part: Part = "vqa", split: Split = "official", labels: Labels = "true", seed: int = 0
) -> dict[str, Any]:
    """Write easy-vqa into a new folder in LLaVA's form; returns the summary.

    Args:
        out: the folder.
        part: questions, or captions to align a projector with.
        split: "official" has the parts of `data.kind: easy-vqa`. "compositional" takes images of `held_out_pairs` out
            of training and validation; the test part has these alone, the part test-seen the other pairs. Images
            whose pair their questions leave open are left out.
        labels: "random" draws each answer, the same one each time a question is asked about an image.
        seed: of the pairs, the answers and the order of training rows.

    Raises:
        MissingExtraError: the package easy-vqa is not installed.
        RunError: `out` is there already.
    """
    refuse_existing(out)
    parts = {name: [_plain(row) for row in rows] for name, rows in load_easy_vqa(part, seed=seed).items()}
    pairs = held_out_pairs(seed) if split == "compositional" else []
    left_open = 0
    if pairs:
        parts, left_open = _by_pair(parts, set(pairs))
    if labels == "random":
        parts = {name: [_redrawn(row, seed) for row in rows] for name, rows in parts.items()}
    asked = {
        name: [Asked(r["image"], "what", r["question"], r["answer"]) for r in rows] for name, rows in parts.items()
    }
    summary = {
        "collection": "easy-vqa 1.0",
        "part": part,
        "split": split,
        "labels": labels,
        "seed": seed,
        "held_out_pairs": [" ".join(pair) for pair in pairs],
        "images_of_unknown_pair": left_open,
        "pictures": {name: len({row["image"] for row in rows}) for name, rows in parts.items()},
        "questions": {name: len(rows) for name, rows in parts.items()},
        "guessed": {name: share_guessed(asked["train"], rows) for name, rows in asked.items() if name != "train"},
    }
    with staged(out) as folder:
        for image, path in sorted({row["image"]: row["path"] for rows in parts.values() for row in rows}.items()):
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / image)
        rows = {
            name: [llava_row(r["id"], r["image"], [(r["question"], r["answer"])]) for r in part_rows]
            for name, part_rows in parts.items()
        }
        write_rows(folder, rows, summary)
    return summary


def _plain(row: Mapping[str, Any]) -> dict[str, str]:
    """A canonical row of one question as texts; `image` is its path in the folder that is written."""
    _, where, number = row["id"].split("/")[:3]
    return {
        "id": row["id"],
        "path": row["images"][0]["path"],
        "image": f"images/{where}/{number}.png",
        "question": row["messages"][0]["content"][-1]["text"],
        "answer": answer(row),
    }


def _by_pair(
    parts: Mapping[str, list[dict[str, str]]], held_out: set[Pair]
) -> tuple[dict[str, list[dict[str, str]]], int]:
    """Parts by pair, and how many images have an unknown one."""
    pair_of = _pairs(row for rows in parts.values() for row in rows)
    unseen = {image for image, pair in pair_of.items() if pair in held_out}
    seen = {image for image, pair in pair_of.items() if pair is not None} - unseen

    def of(part: str, images: set[str]) -> list[dict[str, str]]:
        return [row for row in parts[part] if row["image"] in images]

    split = {name: of(name, seen) for name in ("train", "validation")}
    split |= {"test": of("test", unseen), "test-seen": of("test", seen)}
    return split, len(pair_of) - len(seen) - len(unseen)


def _pairs(rows: Iterable[Mapping[str, str]]) -> dict[str, Pair | None]:
    """Colour and shape of each image, by what is asked and answered about it; None where that leaves them open."""
    about: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        question = row["question"].removesuffix(INSTRUCTION).lower()
        words = row["answer"].lower().rstrip(".").split()
        if len(words) == 3:  # a caption, "A red circle."
            about[row["image"]] += [("what colour?", words[1]), ("what shape?", words[2])]
        else:
            about[row["image"]].append((question, row["answer"]))
    pairs: dict[str, Pair | None] = {}
    for image, asked in about.items():
        color, shape = described(asked, COLORS), described(asked, SHAPES)
        pairs[image] = (color, shape) if color and shape else None
    return pairs


def _redrawn(row: dict[str, str], seed: int) -> dict[str, str]:
    """The row with an answer drawn among those of the right one's sort."""
    draw = random.Random(f"{seed}:{row['image']}:{row['question']}")
    if len(words := row["answer"].rstrip(".").split()) == 3:
        return {**row, "answer": f"{words[0]} {draw.choice(COLORS)} {draw.choice(SHAPES)}."}
    sort = next(names for names in (COLORS, SHAPES, ("no", "yes")) if row["answer"] in names)
    return {**row, "answer": draw.choice(sort)}
