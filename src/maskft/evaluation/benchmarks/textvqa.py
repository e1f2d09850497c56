"""TextVQA, validation part: 5000 questions about text in pictures, ten human answers each.

The rule is that of LLaVA's eval_textvqa.py with MMF's TextVQAAccuracyEvaluator:

- An answer belongs to the annotation with its image id (`question_id`) and, in lower case, the question in its prompt.
  Where that stands depends on the prompt:
  - it starts with "OCR tokens: ": between "Question: " and the first " Short answer:" after it, over any lines;
  - it holds "Reference OCR token: " and has three lines: the second line if it starts with "Reference OCR token:",
    else the first (the form of LLaVA's question file);
  - else it has two lines: the first.
- Annotations that share image id and question are all scored against the last one's human answers.
- The model's text and the ten human answers are made comparable by `vqa_text`.
- A question scores the mean, over leaving out each of the ten humans in turn, of min(1, n / 3), n being how many of the
  other nine said what the model said. That is 0, 0.3, 0.6, 0.9 and 1 where 0, 1, 2, 3 and 4 or more of the ten did.
- The benchmark's score is the mean over questions, in percent, summed in the annotations' order.

Reads textvqa/TextVQA_0.5.1_val.json and textvqa/llava_textvqa_val_v051_ocr.jsonl; pictures are in
textvqa/train_images/.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
from maskft.evaluation.benchmarks.vqa_text import normalise

MAX_NEW_TOKENS = 128
HUMANS = 10
_LEVELS = ("0", "0.3", "0.6", "0.9", "1")


@dataclass(frozen=True)
class Annotations:
    """What scoring needs; both have one entry a question, in the file's order.

    Attributes:
        keys: image id and question in lower case; the same one may occur several times.
        answers: what the ten humans said.
    """

    keys: tuple[tuple[str, str], ...]
    answers: tuple[tuple[str, ...], ...]


def read(data: Path) -> Annotations:
    """The annotations under `data`/textvqa.

    Raises:
        DataError: the file is missing or not as expected; names file and rows.
    """
    path = existing(data / "textvqa" / "TextVQA_0.5.1_val.json")
    content = read_json(path)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} is not the file that was expected: it has no list 'data' of questions.")
    require_fields(path, rows, {"image_id": str, "question": str, "answers": list})
    problems = [
        f"row {number}: 'answers' must be {HUMANS} texts"
        for number, row in enumerate(rows, start=1)
        if len(row["answers"]) != HUMANS or not all(isinstance(answer, str) for answer in row["answers"])
    ]
    if problems:
        raise DataError(f"{path} is not the file that was expected:\n{gathered(problems)}")
    return Annotations(
        keys=tuple((row["image_id"], row["question"].lower()) for row in rows),
        answers=tuple(tuple(row["answers"]) for row in rows),
    )


def questions(data: Path) -> list[Question]:
    """The 5000 questions as LLaVA asks them, OCR tokens included, in the question file's order.

    Raises:
        DataError: the file is missing, empty or not as expected, or a picture would lie outside train_images.
    """
    path = existing(data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl")
    rows = read_json_lines(path)
    if not rows:
        raise DataError(f"{path} holds no questions.")
    require_fields(path, rows, {"question_id": str, "image": str, "text": str})
    images = paths_inside(data / "textvqa" / "train_images", [row["image"] for row in rows], source=path)
    return [Question(row["question_id"], row["text"], image) for row, image in zip(rows, images, strict=True)]


def asked(prompt: str) -> str | None:
    """The question within a prompt, in lower case; None for a prompt that has none of the three forms."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        _, _, rest = prompt.partition("Question: ")
        question, found, _ = rest.partition(" Short answer:")
        return question.lower() if found else None
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return (lines[1] if prompt.startswith("Reference OCR token:") else lines[0]).lower()
    return lines[0].lower() if len(lines) == 2 else None


def soft_score(text: str, humans: Sequence[str]) -> float:
    """Leave-one-out score in [0, 1] of a text against human answers, all of them normalised; `humans` isn't empty."""
    matches = humans.count(text)
    if not matches:
        return 0.0
    # Summed human by human, as the official scorer does: the last digit depends on the order.
    parts = [min(1, (matches - (human == text)) / 3) for human in humans]
    return sum(parts) / len(parts)


def score(annotations: Annotations, answers: Sequence[Answer]) -> Score:
    """Accuracy in percent; details count the questions and those on each of the five score levels.

    Raises:
        DataError: a prompt holds no question, or answers are missing, doubled or unknown; names up to ten of each.
    """
    keys = _keys(answers)
    times = Counter(annotations.keys)
    require_one_answer_each(
        _numbered(annotations.keys, times), list(_numbered(keys, times)), bench="TextVQA (image id, question)"
    )
    given: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, answer in sorted(zip(keys, (answer.text for answer in answers), strict=True), reverse=True):
        given[key].append(answer)

    distinct = {answer.text for answer in answers}.union(*annotations.answers)
    normal = {text: normalise(text) for text in distinct}
    humans = {
        key: [normal[text] for text in texts] for key, texts in zip(annotations.keys, annotations.answers, strict=True)
    }
    scores, levels = [], Counter[int]()
    for key in annotations.keys:
        text = normal[given[key].pop()]
        scores.append(soft_score(text, humans[key]))
        levels[min(4, humans[key].count(text))] += 1
    accuracy = 100.0 * (sum(scores) / len(scores)) if scores else 0.0
    details: dict[str, Any] = {
        "accuracy": accuracy,
        "questions": len(scores),
        "levels": {name: levels[matches] for matches, name in enumerate(_LEVELS)},
    }
    return Score(accuracy, details)


def _keys(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Image id and question of each answer."""
    pairs = [(str(answer.question_id), asked(answer.prompt)) for answer in answers]
    if problems := [f"answer {n}, image {id!r}" for n, (id, question) in enumerate(pairs, start=1) if question is None]:
        raise DataError(
            "the prompts of some answers hold no question of TextVQA. A prompt must be the text of a line of "
            f"llava_textvqa_val_v051_ocr.jsonl:\n{gathered(problems)}"
        )
    return [(image, question) for image, question in pairs if question is not None]


def _numbered(keys: Iterable[tuple[str, str]], times: Counter[tuple[str, str]]) -> Iterator[tuple[str | int, ...]]:
    """The keys, where the second to last of the `times` that a key is asked carry a number to tell them apart."""
    seen = Counter[tuple[str, str]]()
    for key in keys:
        seen[key] += 1
        yield (*key, seen[key]) if 1 < seen[key] <= times[key] else key
