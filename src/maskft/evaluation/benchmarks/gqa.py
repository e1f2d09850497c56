"""GQA, balanced test-dev part: 12578 questions with one answer each.

The rule is that of LLaVA's convert_gqa_for_eval.py followed by GQA's own eval.py:

- The model's text loses all full stops at its end, is put in lower case, and is right if it equals the answer. Nothing
  else is changed: white space counts.
- Only questions that are marked as balanced count. In test-dev's balanced file all are.
- Accuracy is right / questions * 100, over all questions and over these groups of them:
  - open (structural type "query") and binary (the other types: choose, compare, logical, verify);
  - structural type; semantic type (attr, cat, global, obj, rel);
  - reasoning steps: the operations of the question's program, but for those whose "operation: argument" contains
    "exist", "query: name" or "choose name";
  - words of the question, split at white space.
- Distribution (lower is better) compares the answers given with those annotated: within each global group of
  questions, chi-square = sum over annotated answers of (times given - times annotated)^2 / times annotated; then the
  mean over groups weighted by their questions, / 100. Questions without a group are left out. 0 if none has one.

Left out: validity and plausibility need a choices file and grounding needs scene graphs, neither of which is published
for test-dev. Consistency needs answers to the entailed questions, which are in the full test-dev file, not the
balanced one.

A question needs its answer and its structural type. Where a file leaves out the rest, it counts as balanced, without
group, steps or words, and of the semantic type "".

Reads gqa/data/testdev_balanced_questions.json (or gqa/testdev_balanced_questions.json) and
gqa/llava_gqa_testdev_balanced.jsonl; pictures are in gqa/images/ or gqa/data/images/.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft.errors import DataError, gathered
from maskft.evaluation.benchmarks.common import (
    Answer,
    Question,
    Score,
    existing,
    paths_inside,
    read_json,
    read_json_lines,
    require_fields,
    require_one_answer_each,
)

MAX_NEW_TOKENS = 128
_OPTIONAL: dict[str, Any] = {"question": "", "isBalanced": True, "groups": {}, "semantic": []}
_FINAL_STEPS = ("exist", "query: name", "choose name")


@dataclass(frozen=True)
class Annotation:
    """One question.

    Attributes:
        id: as in the answers file.
        answer: the right one.
        structural, semantic: its types.
        steps: operations to reason through, without the final one that only names or checks.
        words: of the question.
        group: the global group for the distribution; None for none.
    """

    id: str
    answer: str
    structural: str
    semantic: str
    steps: int
    words: int
    group: str | None


@dataclass(frozen=True)
class Annotations:
    """What scoring needs: the balanced questions in the file's order, each id once."""

    questions: tuple[Annotation, ...]


def read(data: Path) -> Annotations:
    """The annotations under `data`/gqa.

    Raises:
        DataError: the file is missing or not as expected; names file and rows.
    """
    name = "testdev_balanced_questions.json"
    path = existing(data / "gqa" / "data" / name, data / "gqa" / name)
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not the file that was expected: it must map question ids to questions.")
    content = {id: {**_OPTIONAL, **row} if isinstance(row, dict) else row for id, row in content.items()}
    rows = list(content.values())
    fields = {"question": str, "answer": str, "isBalanced": bool, "types": dict, "groups": dict, "semantic": list}
    require_fields(path, rows, fields)
    require_fields(path, ({"semantic": "", **row["types"]} for row in rows), {"structural": str, "semantic": str})
    require_fields(path, ({"global": None, **row["groups"]} for row in rows), {"global": (str, type(None))})
    problems = [
        f"row {number}: 'semantic' must be a list of operations with 'operation' and 'argument'"
        for number, row in enumerate(rows, start=1)
        if not all(isinstance(step, dict) and "operation" in step and "argument" in step for step in row["semantic"])
    ]
    if problems:
        raise DataError(f"{path} is not the file that was expected:\n{gathered(problems)}")
    balanced = tuple(_annotation(id, row) for id, row in content.items() if row["isBalanced"])
    if not balanced:
        raise DataError(f"{path} holds no balanced questions.")
    return Annotations(balanced)


def _annotation(id: str, row: dict[str, Any]) -> Annotation:
    """The part of a checked row that scoring needs."""
    steps = [f"{step['operation']}: {step['argument']}" for step in row["semantic"]]
    return Annotation(
        id=id,
        answer=row["answer"],
        structural=row["types"]["structural"],
        semantic=row["types"].get("semantic", ""),
        steps=sum(not any(final in step for final in _FINAL_STEPS) for step in steps),
        words=len(row["question"].split()),
        group=row["groups"].get("global"),
    )


def questions(data: Path) -> list[Question]:
    """The 12578 questions as LLaVA asks them, in the question file's order.

    Raises:
        DataError: the file is missing, empty or not as expected, or a picture would lie outside the folder of images.
    """
    folder = data / "gqa"
    path = existing(folder / "llava_gqa_testdev_balanced.jsonl")
    rows = read_json_lines(path)
    if not rows:
        raise DataError(f"{path} holds no questions.")
    require_fields(path, rows, {"question_id": str, "image": str, "text": str})
    places = [folder / "images", folder / "data" / "images"]
    place = next((place for place in places if place.exists()), places[0])
    images = paths_inside(place, [row["image"] for row in rows], source=path)
    return [Question(row["question_id"], row["text"], image) for row, image in zip(rows, images, strict=True)]


def normalise(text: str) -> str:
    """The model's text as it is compared with the answer."""
    return text.rstrip(".").lower()


def score(annotations: Annotations, answers: Sequence[Answer]) -> Score:
    """Accuracy in percent; details hold it by group with the number of questions, and the distribution.

    Raises:
        DataError: answers are missing, doubled or unknown; names up to ten ids of each.
    """
    asked = annotations.questions
    given = [str(answer.question_id) for answer in answers]
    require_one_answer_each((question.id for question in asked), given, bench="GQA")
    said = {id: normalise(answer.text) for id, answer in zip(given, answers, strict=True)}
    right = [said[question.id] == question.answer for question in asked]

    forms = ["open" if question.structural == "query" else "binary" for question in asked]
    binary, open_ = ([ok for ok, of in zip(right, forms, strict=True) if of == form] for form in ("binary", "open"))
    accuracy = _accuracy(right)
    details: dict[str, Any] = {
        "accuracy": accuracy,
        "binary": _accuracy(binary),
        "open": _accuracy(open_),
        "distribution": _distribution(asked, [said[question.id] for question in asked]),
        "questions": {"all": len(right), "binary": len(binary), "open": len(open_)},
        "structural": _by_group((question.structural for question in asked), right),
        "semantic": _by_group((question.semantic for question in asked), right),
        "steps": _by_group((question.steps for question in asked), right),
        "words": _by_group((question.words for question in asked), right),
    }
    return Score(accuracy, details)


def _accuracy(right: Sequence[bool]) -> float:
    """Share of True in percent, divided before multiplied as the official scorer does; 0 for none at all."""
    return sum(right) / len(right) * 100 if right else 0.0


def _by_group(groups: Iterable[str] | Iterable[int], right: Sequence[bool]) -> dict[str, dict[str, float | int]]:
    """Accuracy and number of questions of each group, in the groups' order."""
    members: dict[Any, list[bool]] = defaultdict(list)
    for group, ok in zip(groups, right, strict=True):
        members[group].append(ok)
    return {str(group): {"accuracy": _accuracy(oks), "questions": len(oks)} for group, oks in sorted(members.items())}


def _distribution(asked: Sequence[Annotation], said: Sequence[str]) -> float:
    """The module's chi-square / 100, summed in the annotations' order; `said` has one text a question."""
    annotated: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for question, text in zip(asked, said, strict=True):
        if question.group is not None:
            annotated[question.group][question.answer] += 1
            given[question.group][text] += 1
    weighted, overall = 0.0, 0
    for group, counts in annotated.items():
        chi_square = 0.0
        for answer, n in counts.items():  # not by sum(), which rounds otherwise from Python 3.12 on
            chi_square += float(given[group][answer] - n) ** 2 / n
        weighted += chi_square * counts.total()
        overall += counts.total()
    return weighted / overall / 100 if overall else 0.0
