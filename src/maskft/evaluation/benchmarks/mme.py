"""MME: two yes-or-no questions about each of 1187 pictures, in 14 subtasks. Scored as the benchmark's own
eval_tool/calculation.py does, after LLaVA's convert_answer_to_mme.py.

Reading an answer: lower-cased, "yes" if the first four characters contain "yes", else "no" if they contain "no", else
neither, which is wrong. So "Yes, it is", "eyes" and " no" are read as meant, "know" counts as no and "it is" as
neither.

Score, in points: a subtask gives 100 * accuracy over its questions plus 100 * accuracy+, the share of its pictures
with both answers right. Perception, the number that is reported, is the sum of ten subtasks (at most 2000), cognition
the sum of four (at most 800). The official script takes two lines following each other for one picture; here the two
are found by the picture's name, so that the order of the answers does not matter.

Finding the question of an answer: subtask and picture come from the question id, which may or may not hold "images/":
what is before the first "/", and what is after the last "/" up to its first full stop. The question is the prompt
with "Answer the question using a single word or phrase." deleted and the ends stripped; where it lacks "Please answer
yes or no.", that is added after one space, or after two if the benchmark has no such question.
A question that stands twice in a picture's file is asked twice, with the answer of the later line.

Files, in MME/:
    llava_mme.jsonl: {"question_id", "image", "text", "category"}, two lines a picture with the same question id.
    MME_Benchmark_release_version/<subtask>/<picture>.txt beside the pictures, or in questions_answers_YN/ beside
        images/: a question, a tab and Yes or No in each of two lines.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

from maskft.errors import DataError, gathered
from maskft.evaluation.benchmarks.common import (
    Answer,
    Question,
    Score,
    existing,
    paths_inside,
    ratio,
    read_json_lines,
    read_text,
    require_fields,
    require_one_answer_each,
)

MAX_NEW_TOKENS = 128
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
POST_PROMPT = "Answer the question using a single word or phrase."
REQUEST = "Please answer yes or no."

Asked = tuple[str, str, str]
"""(subtask, the picture's name without ending, question)"""


@dataclass(frozen=True)
class Annotations:
    """What scoring needs.

    Attributes:
        truths: the right answer, "yes" or "no", of each question.
        counts: how often each question is asked: once, but for questions that stand twice in a picture's file.
    """

    truths: dict[Asked, str]
    counts: dict[Asked, int]


def read(data: Path) -> Annotations:
    """The right answers, from the text files of the 14 subtasks.

    Raises:
        DataError: a subtask is missing, or names up to ten flawed lines or files.
    """
    root = existing(data / "MME" / "MME_Benchmark_release_version")
    missing = [name for name in SUBTASKS if not (root / name).is_dir()]
    if missing:
        raise DataError(f"{root} lacks the folders of {', '.join(missing)}.")
    truths: dict[Asked, str] = {}
    counts: Counter[Asked] = Counter()
    problems: list[str] = []
    for subtask in SUBTASKS:
        with_images = root / subtask / "questions_answers_YN"
        folder = with_images if with_images.is_dir() else root / subtask
        files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
        if not files:
            problems.append(f"{folder}: no .txt file")
        for file in files:
            lines, flaws = _lines(file)
            problems += flaws
            for question, truth in lines:
                truths[subtask, file.name.removesuffix(".txt"), question] = truth
                counts[subtask, file.name.removesuffix(".txt"), question] += 1
    if problems:
        raise DataError(f"the right answers of MME cannot be read:\n{gathered(problems)}")
    return Annotations(truths, dict(counts))


def questions(data: Path) -> list[Question]:
    """What the model is asked: 2374 questions.

    Raises:
        DataError: the question file is missing or flawed, or a picture's path leaves the folder.
    """
    path = existing(data / "MME" / "llava_mme.jsonl")
    rows = read_json_lines(path)
    require_fields(path, rows, {"question_id": str, "image": str, "text": str})
    if not rows:
        raise DataError(f"{path} holds no questions.")
    folder = data / "MME" / "MME_Benchmark_release_version"
    images = paths_inside(folder, [row["image"] for row in rows], source=path)
    return [
        Question(row["question_id"], row["text"], image, row["question_id"].split("/")[0])
        for row, image in zip(rows, images, strict=True)
    ]


def score(annotations: Annotations, answers: Sequence[Answer]) -> Score:
    """Perception, in points.

    Raises:
        DataError: a question has no answer or several, or an answer belongs to no question.
    """
    given = [asked(answer, annotations) for answer in answers]
    expected = [key for key, count in annotations.counts.items() for _ in range(count)]
    require_one_answer_each(_named(expected, annotations.counts), _named(given, annotations.counts), bench="MME")
    pictures: dict[str, dict[str, list[tuple[str, str]]]] = {name: defaultdict(list) for name in SUBTASKS}
    for key, answer in zip(given, answers, strict=True):
        subtask, picture, _ = key
        pictures[subtask][picture].append((says(answer.text), annotations.truths[key]))
    subtasks = {name: _measures(pictures[name].values()) for name in SUBTASKS}
    perception, cognition = (  # one addition after the other: sum() rounds otherwise from Python 3.12 on
        reduce(add, (subtasks[name]["score"] for name in names)) for names in (PERCEPTION, COGNITION)
    )
    return Score(
        perception,
        {
            "perception": perception,
            "cognition": cognition,
            "neither_yes_nor_no": sum(part["neither_yes_nor_no"] for part in subtasks.values()),
            **subtasks,
        },
    )


def says(text: str) -> str:
    """How an answer is read: "yes", "no" or "neither"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "neither")


def asked(answer: Answer, annotations: Annotations) -> Asked:
    """The question that an answer belongs to; one that `annotations` lacks where there is none."""
    parts = str(answer.question_id).split("/")
    subtask, picture = parts[0], parts[-1].split(".")[0]
    question = answer.prompt
    if POST_PROMPT in question:
        question = question.replace(POST_PROMPT, "").strip()
    if REQUEST not in question:
        question = f"{question} {REQUEST}"
        if (subtask, picture, question) not in annotations.truths:
            question = question.replace(f" {REQUEST}", f"  {REQUEST}")
    return subtask, picture, question


def _lines(file: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(question, "yes" or "no") of a picture's two lines, and what is wrong with them."""
    found, flaws = [], []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        question, *rest = line.strip().split("\t")
        if len(rest) == 1 and rest[0].lower() in ("yes", "no"):
            found.append((question, rest[0].lower()))
        else:
            flaws.append(f"{file} line {number}: not a question, a tab and Yes or No")
    if not flaws and len(found) != 2:
        flaws.append(f"{file}: {len(found)} questions instead of 2")
    return found, flaws


def _named(keys: Sequence[Asked], counts: Mapping[Asked, int]) -> list[str]:
    """A readable name for each key. A question that is asked n times has n names; beyond them the last one recurs."""
    seen: Counter[Asked] = Counter()
    names = []
    for key in keys:
        seen[key] = min(seen[key] + 1, counts.get(key, 1))
        subtask, picture, question = key
        names.append(f"{subtask}/{picture} {question!r}" + (f" ({seen[key]})" if seen[key] > 1 else ""))
    return names


def _measures(pictures: Collection[Sequence[tuple[str, str]]]) -> dict[str, float | int]:
    """The score of a subtask in points and what it comes from, given (answer, truth) of each picture's questions."""
    pairs = [pair for picture in pictures for pair in picture]
    right = [answer == truth for answer, truth in pairs]
    both = [all(answer == truth for answer, truth in picture) for picture in pictures]
    accuracy, accuracy_plus = 100 * ratio(sum(right), len(right)), 100 * ratio(sum(both), len(both))
    return {
        "score": accuracy + accuracy_plus,
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "questions": len(pairs),
        "pictures": len(pictures),
        "neither_yes_nor_no": sum(answer == "neither" for answer, _ in pairs),
    }
