"""The demo's data: questions about drawn shapes from the package easy-vqa 1.0.

64 x 64 pixel images of one shape each, three shapes in eight colours. The package's 4000 training and 1000 test
images all differ in content, so the rule that drops images found in a later part drops none.
"""

from __future__ import annotations

import functools
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from datasets import Dataset

from maskft.data.images import image_key
from maskft.data.schema import image_part, text_of, text_part, to_dataset, turn
from maskft.data.turns import together
from maskft.errors import DataError, MissingExtraError, did_you_mean

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
INSTRUCTION = "\nAnswer the question using a single word or phrase."
DESCRIBE = "Describe the image briefly."
_CAPTIONS_END, _VALIDATION_START = 2000, 3600
_WORD = re.compile(r"[a-z]+")
_NAME = re.compile("|".join(SHAPES + COLORS))

Part = Literal["vqa", "captions"]


class _Source(NamedTuple):
    """One of the package's two parts: image paths by id, and per image its (item, question, answer) triples."""

    name: str
    paths: Mapping[int, str]
    questions: Mapping[int, list[tuple[int, str, str]]]


class _Entry(NamedTuple):
    """A row to be: an image's id, and which of its questions the row asks; captions ask none of them."""

    image: int
    asked: tuple[int, ...]


def load_easy_vqa(
    part: Part, *, limits: Mapping[str, int] | None = None, seed: int = 0, turns: int = 1, balanced: bool = False
) -> dict[str, Dataset]:
    """Return canonical datasets "train", "validation" and "test".

    "captions" has one row per image with the answer "A {color} {shape}.", "vqa" one row per question. Training uses
    the package's training images 0-1999 for captions and 2000-3599 for vqa; validation uses 3600-3999 and test the
    package's test images for both. An image whose content is also in a later part (captions, vqa, validation, test)
    is dropped.

    `turns` questions about an image make one training conversation of vqa, as in LLaVA's data; the instruction stands
    in its first turn. Held-out rows have one question each. `limits` gives the most rows per split. Which rows these
    are, and the order of training rows, is a shuffle by `seed`; rows of the other splits keep the package's order.

    `balanced` keeps as many questions of vqa with the answer yes as with no, among those of one form ("Is there a
    {color} shape?"), drawn by `seed`: of all there are, one answer to a form is right for 57 to 90 %, and models learn
    that answer without looking. Questions of what there is are all kept.

    Raises MissingExtraError without the package, DataError for an unknown part or bad limits.
    """
    if part not in ("vqa", "captions"):
        raise DataError(f"part is {part!r}, but must be vqa or captions.{did_you_mean(part, ('vqa', 'captions'))}")
    _check_limits(limits or {})
    if turns < 1:
        raise DataError(f"turns is {turns}, but must be at least 1.")
    train, test = _sources()
    images = _split_images(train, test)
    splits = {
        "train": (train, images[part]),
        "validation": (train, images["validation"]),
        "test": (test, images["test"]),
    }
    result = {}
    for split, (source, ids) in splits.items():
        entries = _entries(part, source, ids)
        if balanced and part == "vqa":
            entries = _balanced(source, entries, f"{seed}:{split}:balanced")
        if split == "train" and turns > 1 and part == "vqa":
            entries = _conversations(entries, turns, seed)
        order = list(range(len(entries)))
        random.Random(f"{seed}:{split}").shuffle(order)
        chosen = order[: (limits or {}).get(split, len(entries))]
        kept = (entries[i] for i in (chosen if split == "train" else sorted(chosen)))
        result[split] = to_dataset(_row(source, entry) for entry in kept)
    return result


def _check_limits(limits: Mapping[str, int]) -> None:
    splits = ("train", "validation", "test")
    for split, limit in limits.items():
        if split not in splits:
            raise DataError(
                f"limits names {split!r}, but the splits are {', '.join(splits)}.{did_you_mean(split, splits)}"
            )
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise DataError(f"limits.{split} is {limit!r}, but must be a whole number of rows, at least 1.")


def _sources() -> tuple[_Source, _Source]:
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingExtraError("easy-vqa", "pip install --no-deps easy-vqa==1.0", "The demo data") from error
    return (
        _source("train", easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()),
        _source("test", easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()),
    )


def _source(name: str, paths: Mapping[int, str], triples: tuple[list[str], list[str], list[int]]) -> _Source:
    questions: dict[int, list[tuple[int, str, str]]] = {}
    for item, (question, answer, image) in enumerate(zip(*triples, strict=True)):
        questions.setdefault(image, []).append((item, question, answer))
    return _Source(name, paths, questions)


def _split_images(train: _Source, test: _Source) -> dict[str, list[int]]:
    """Return image ids by part, without those whose content is also in a later part."""
    ids = sorted(train.paths)
    parts = {
        "test": (test, sorted(test.paths)),
        "validation": (train, [i for i in ids if i >= _VALIDATION_START]),
        "vqa": (train, [i for i in ids if _CAPTIONS_END <= i < _VALIDATION_START]),
        "captions": (train, [i for i in ids if i < _CAPTIONS_END]),
    }
    later: set[str] = set()
    kept = {}
    for name, (source, members) in parts.items():
        keys = {image: _key(source.paths[image]) for image in members}
        kept[name] = [image for image in members if keys[image] not in later]
        later.update(keys.values())
    return kept


def questions_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each question of a row with its answer, without INSTRUCTION, which only a conversation's first turn has."""
    return [
        (text_of(said).removesuffix(INSTRUCTION), text_of(reply))
        for said, reply in pairwise(row["messages"])
        if (said["role"], reply["role"]) == ("user", "assistant")
    ]


@functools.cache
def _key(path: str) -> str:
    """`image_key` of one of the package's images, which stay as they are."""
    return image_key({"path": path, "bytes": None})


def _entries(part: Part, source: _Source, images: Sequence[int]) -> list[_Entry]:
    """What there is to ask about the images, in their order."""
    if part == "captions":
        return [_Entry(image, ()) for image in images if _caption(source, image) is not None]
    return [_Entry(image, (number,)) for image in images for number in range(len(source.questions.get(image, [])))]


def _balanced(source: _Source, entries: Sequence[_Entry], seed: str) -> list[_Entry]:
    """As many entries of each form of question with one answer, yes or no, as with the other, in their order."""
    answers: dict[str, dict[str, list[int]]] = defaultdict(lambda: {"yes": [], "no": []})
    kept = []
    for place, (image, asked) in enumerate(entries):
        _, question, answer = source.questions[image][asked[0]]
        if answer in ("yes", "no"):
            answers[_NAME.sub("", question)][answer].append(place)
        else:
            kept.append(place)
    draw = random.Random(seed)
    for form in answers.values():
        few = min(map(len, form.values()))
        for places in form.values():
            kept += draw.sample(places, few)
    return [entries[place] for place in sorted(kept)]


def _conversations(entries: Sequence[_Entry], turns: int, seed: int) -> list[_Entry]:
    """Join what asks about the same image, at most `turns` questions, in an order drawn by `seed`."""
    joined = ([entries[i] for i in places] for places in together([one.image for one in entries], turns, seed))
    return [_Entry(about[0].image, tuple(number for one in about for number in one.asked)) for about in joined]


def _row(source: _Source, entry: _Entry) -> dict[str, Any]:
    """The entry in canonical form."""
    image, asked = entry
    if asked:
        triples = [source.questions[image][number] for number in asked]
        pairs = [(question[0].upper() + question[1:], answer) for _, question, answer in triples]
        pairs[0] = (pairs[0][0] + INSTRUCTION, pairs[0][1])
        name, origin = f"{image}/{asked[0]}", f"questions.json item {triples[0][0]}"
    else:
        name, origin, pairs = str(image), f"image {image}", [(DESCRIBE, _caption(source, image) or "")]
    messages: list[dict[str, Any]] = []
    for question, answer in pairs:
        shown = [] if messages else [image_part()]
        messages += [turn("user", [*shown, text_part(question)]), turn("assistant", [text_part(answer)])]
    return {
        "id": f"easy-vqa/{source.name}/{name}",
        "images": [{"path": source.paths[image], "bytes": None}],
        "messages": messages,
        "origin": f"easy-vqa {source.name} {origin}",
    }


def _caption(source: _Source, image: int) -> str | None:
    """What the image shows, where its questions tell."""
    asked = [(question, answer) for _, question, answer in source.questions.get(image, [])]
    color, shape = described(asked, COLORS), described(asked, SHAPES)
    return f"A {color} {shape}." if color and shape else None


def described(asked: list[tuple[str, str]], names: tuple[str, ...]) -> str | None:
    """Return which of `names` (colours or shapes) the (question, answer) pairs of one image say it has.

    The answer to a "what" question and the words of one ("what is the color of the circle?") tell it at once, yes/no
    answers by naming it or by excluding all others. None if they leave it open or contradict each other.
    """
    present: set[str] = set()
    absent: set[str] = set()
    for question, answer in asked:
        words = set(_WORD.findall(question))
        named = words.intersection(names)
        if "what" in words:
            present |= named | {answer}.intersection(names)
        elif (answer == "yes") != bool(words & {"not", "no"}):
            present |= named
        else:
            absent |= named
    left = present or set(names) - absent
    return left.pop() if len(left) == 1 and not left & absent else None
