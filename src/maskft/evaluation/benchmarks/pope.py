"""POPE: is an object in the picture? Scored as LLaVA's eval_pope.py does.

Reading an answer: the text up to the first full stop, its commas deleted, is split at single spaces. If one of the
pieces is exactly "No", "no" or "not" the answer is no, in every other case yes. So "NO", "no\\nway", "No!" and the
empty answer are yes.

Score: for each category, with yes as the positive class, accuracy, precision, recall, F1 and the share of yes answers;
a ratio of nothing is 0. The number that is reported is the mean F1 of the three categories, in percent.

Labels: an answer's question id leads to the question file, and from there category, picture and question lead to the
label. Where a category holds the same question about the same picture more than once, the k-th in the question file
goes with the k-th in the annotations. The official script pairs answers and labels by position instead, which gives
the same numbers if the files belong together, and numbers near chance if they do not. Here such a pair of files is an
error: the public question file of 8910 rows goes with the annotations of POPE's commit e3e39262 (2910 in random), not
with later ones (3000 in each category).

Files, in pope/:
    llava_pope_test.jsonl: {"question_id", "image", "text", "category"}; the question is the first line of the text.
    coco/coco_pope_{adversarial,popular,random}.json, or the same without coco/: a JSON object a line,
        {"image", "text", "label": "yes" or "no"}.
    val2014/: the pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    ratio,
    read_json_lines,
    require_fields,
    require_one_answer_each,
)

MAX_NEW_TOKENS = 128
CATEGORIES = ("adversarial", "popular", "random")


@dataclass(frozen=True)
class Annotations:
    """What scoring needs.

    Attributes:
        labels: question id -> (category, whether the object is in the picture).
    """

    labels: dict[str | int, tuple[str, bool]]


def read(data: Path) -> Annotations:
    """The label of every question.

    Raises:
        DataError: a file is missing or flawed, or question file and annotations do not belong together.
    """
    path, rows = _question_rows(data)
    files = {
        name: existing(*(data / "pope" / folder / f"coco_pope_{name}.json" for folder in ("coco", "")))
        for name in CATEGORIES
    }
    annotated = {name: _labels(file) for name, file in files.items()}
    asked: dict[str, dict[tuple[str, str], list[str | int]]] = {name: defaultdict(list) for name in CATEGORIES}
    for row in rows:
        asked[row["category"]][row["image"], _first_line(row["text"])].append(row["question_id"])
    problems = [
        problem for name in CATEGORIES for problem in _differences(name, files[name], asked[name], annotated[name])
    ]
    if problems:
        raise DataError(
            f"{path} and the annotations of POPE do not belong together:\n{gathered(problems)}\n"
            "LLaVA's question file of 8910 rows goes with the annotations of POPE's commit e3e39262, which has 2910 "
            "in random; with later annotations (3000 in each category) use a question file made from them."
        )
    return Annotations(
        {
            id_: (name, label)
            for name in CATEGORIES
            for key, ids in asked[name].items()
            for id_, label in zip(ids, annotated[name][key], strict=True)
        }
    )


def questions(data: Path) -> list[Question]:
    """What the model is asked: 8910 questions in LLaVA's file.

    Raises:
        DataError: the question file is missing or flawed, or a picture's path leaves pope/val2014.
    """
    path, rows = _question_rows(data)
    images = paths_inside(data / "pope" / "val2014", [row["image"] for row in rows], source=path)
    return [
        Question(row["question_id"], row["text"], image, row["category"])
        for row, image in zip(rows, images, strict=True)
    ]


def score(annotations: Annotations, answers: Sequence[Answer]) -> Score:
    """Mean F1 of the three categories, in percent.

    Raises:
        DataError: a question has no answer or several, or an answer belongs to no question.
    """
    require_one_answer_each(annotations.labels, [answer.question_id for answer in answers], bench="POPE")
    pairs: dict[str, list[tuple[bool, bool]]] = {name: [] for name in CATEGORIES}
    for answer in answers:
        category, label = annotations.labels[answer.question_id]
        pairs[category].append((says_yes(answer.text), label))
    categories = {name: _measures(pairs[name]) for name in CATEGORIES}
    mean = {
        f"mean_{measure}": sum(part[measure] for part in categories.values()) / len(CATEGORIES)
        for measure in ("f1", "accuracy")
    }
    return Score(mean["mean_f1"], {**mean, **categories})


def says_yes(text: str) -> bool:
    """Whether an answer counts as yes. Anything that does not say no does."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _question_rows(data: Path) -> tuple[Path, list[dict[str, Any]]]:
    path = existing(data / "pope" / "llava_pope_test.jsonl")
    rows = read_json_lines(path)
    require_fields(path, rows, {"question_id": (int, str), "image": str, "text": str, "category": str})
    problems: list[str] = []
    seen: set[str | int] = set()
    for number, row in enumerate(rows, start=1):
        if row["category"] not in CATEGORIES:
            problems.append(f"row {number}: category '{row['category']}' is none of {', '.join(CATEGORIES)}")
        if row["question_id"] in seen:
            problems.append(f"row {number}: question_id {row['question_id']!r} occurs a second time")
        seen.add(row["question_id"])
    if problems or not rows:
        raise DataError(f"{path} is not a question file of POPE:\n{gathered(problems or ['no rows'])}")
    return path, rows


def _labels(path: Path) -> dict[tuple[str, str], list[bool]]:
    """(image, question) -> its labels in the order of the file: mostly one, sometimes more."""
    rows = read_json_lines(path)
    require_fields(path, rows, {"image": str, "text": str, "label": str})
    problems = [
        f"row {number}: label '{row['label']}'"
        for number, row in enumerate(rows, start=1)
        if row["label"] not in ("yes", "no")
    ]
    if problems:
        raise DataError(f"{path} has labels other than yes and no:\n{gathered(problems)}")
    labels: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in rows:
        labels[row["image"], _first_line(row["text"])].append(row["label"] == "yes")
    return labels


def _first_line(text: str) -> str:
    return text.split("\n")[0].strip()


def _differences(
    category: str,
    path: Path,
    asked: dict[tuple[str, str], list[str | int]],
    annotated: dict[tuple[str, str], list[bool]],
) -> list[str]:
    """What keeps questions and labels of a category from being paired, with an example each."""
    number_asked, number_annotated = (sum(map(len, part.values())) for part in (asked, annotated))
    unlabelled = [key for key, ids in asked.items() if len(ids) > len(annotated.get(key, ()))]
    unasked = [key for key, labels in annotated.items() if len(labels) > len(asked.get(key, ()))]
    counts = f"{category}: {number_asked} questions, {number_annotated} annotations in {path}"
    return [
        f"{counts}; {what} {len(keys)}, such as '{keys[0][1]}' about {keys[0][0]}"
        for what, keys in (("questions without a label:", unlabelled), ("labels without a question:", unasked))
        if keys
    ]


def _measures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float | int]:
    """The measures of (says yes, is yes) pairs, in percent, and the counts they come from."""
    true_yes, false_yes, true_no, false_no = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, False), (False, True))
    )
    precision = ratio(true_yes, true_yes + false_yes)
    recall = ratio(true_yes, true_yes + false_no)
    return {
        "f1": 100 * ratio(2 * precision * recall, precision + recall),
        "accuracy": 100 * ratio(true_yes + true_no, len(pairs)),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes_ratio": 100 * ratio(true_yes + false_yes, len(pairs)),
        "true_positives": true_yes,
        "false_positives": false_yes,
        "true_negatives": true_no,
        "false_negatives": false_no,
        "questions": len(pairs),
    }
