"""ScienceQA's test questions as LLaVA asks and scores them; the score is the accuracy on those with an image.

Files, under scienceqa/:
- llava_test_CQM-A.json: list of {"id", "image"?, "conversations": [human, gpt]}; 4241 questions, 2017 with "image";
- pid_splits.json ("test": ids) and problems.json (id -> "choices", "answer" from 0, "subject", ...): with both, the
  truth is problems.json's and the ids of the split must be those of the question file. If one is missing, the truth is
  the gpt turn of the question file, read as an answer is, and the choices are the (A), (B), ... after "Options:";
- images/test/<image>.

Asked: the human turn without "<image>", stripped, and a second line that wants the letter (LLaVA's
--single-pred-prompt).

Scored as the eval_science_qa of LLaVA 1.5 (and of TinyLLaVA-Factory) does, case-sensitive and without stripping:
1. the text is one of A B C D E: that letter;
2. else it starts with one of these letters, a full stop and a space: that letter;
3. else "The answer is ", a letter A to Z and any one character but a line break, found exactly once: that letter. So
   "The answer is B" at the very end of a text is no answer, and "The answer is B)" is one;
4. else there is no answer, which is wrong. A letter beyond the question's choices is wrong too. (In the first LLaVA
   both were random choices.)

Which questions have an image: LLaVA looks for "<image>" in the prompt of the answer line. Its own answer files have it
exactly where the question file has an image. Prompts that hold it elsewhere, or lack it there, belong to other
questions and are an error, as they would change the denominator. Where no prompt holds it (files of other tools), the
question file alone decides; details["image_flag_from"] says which it was.

Answers cover all questions, or exactly those with an image; then whatever counts the others is None. The groups are
those of ScienceQA's own evaluate_acc: subject (NAT, SOC, LAN), context (TXT has a hint, IMG an image, NO neither) and
grade (G1-6, G7-12); groups and topics need problems.json. Groups without any question are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
    require_fields,
    require_one_answer_each,
)

MAX_NEW_TOKENS = 1024
LETTERS = ("A", "B", "C", "D", "E")
IMAGE_TOKEN = "<image>"
POST_PROMPT = "Answer with the option's letter from the given choices directly."
QUESTION_FILE, SPLIT_FILE, PROBLEM_FILE = "llava_test_CQM-A.json", "pid_splits.json", "problems.json"

_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{number}": "G1-6" if number <= 6 else "G7-12" for number in range(1, 13)}
_GROUPS = (*_SUBJECTS.values(), "TXT", "IMG", "NO", "G1-6", "G7-12")
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class Problem:
    """One question's truth.

    Attributes:
        id: as text, for question files and answer files differ in its type.
        answer: index of the right choice, from 0.
        choices: number of choices, at least 1.
        image: whether the question file has an image.
        groups: names out of ScienceQA's groups; empty without problems.json.
        topic: empty without problems.json.
    """

    id: str
    answer: int
    choices: int
    image: bool
    groups: tuple[str, ...] = ()
    topic: str = ""


@dataclass(frozen=True)
class Annotations:
    """All questions in the order of the question file, and the name of the file that holds their truth."""

    problems: tuple[Problem, ...]
    source: str


def read(data: Path) -> Annotations:
    """The truth of every test question; see the module for the files.

    Raises:
        DataError: a file is missing or has a flaw, or the files do not belong together.
    """
    path, rows = _rows(data)
    splits, problems = path.with_name(SPLIT_FILE), path.with_name(PROBLEM_FILE)
    if splits.is_file() and problems.is_file():
        return Annotations(_from_problems(path, rows, splits, problems), PROBLEM_FILE)
    return Annotations(_from_questions(path, rows), QUESTION_FILE)


def questions(data: Path) -> list[Question]:
    """What the model is asked, with and without image, in the order of the question file.

    Raises:
        DataError: the question file is missing or has a flaw.
    """
    path, rows = _rows(data)
    names = [row.get("image") or "none" for row in rows]  # every row has one, so that messages count rows
    paths = paths_inside(path.parent / "images" / "test", names, source=path)
    return [
        Question(row["id"], f"{_asked(row)}\n{POST_PROMPT}", image if row.get("image") else None)
        for row, image in zip(rows, paths, strict=True)
    ]


def letter(text: str) -> str | None:
    """The letter that `text` answers with, A to Z; None where the rule finds none."""
    if text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[0]
    found: list[str] = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def score(annotations: Annotations, answers: Sequence[Answer]) -> Score:
    """Accuracy in percent on the questions with an image; see the module for the rule.

    Raises:
        DataError: names missing, doubled and unknown answers, or prompts that belong to other questions.
    """
    answered = {str(answer.question_id): answer for answer in answers}
    without = [problem.id for problem in annotations.problems if not problem.image]
    whole = not without or any(key in answered for key in without)
    asked = [problem for problem in annotations.problems if whole or problem.image]
    require_one_answer_each(
        (problem.id for problem in asked), [str(answer.question_id) for answer in answers], bench="ScienceQA"
    )
    flag_from = _image_flag(asked, answered)

    letters = {problem.id: letter(answered[problem.id].text) for problem in asked}
    beyond = {problem.id for problem in asked if letters[problem.id] not in (None, *LETTERS[: problem.choices])}
    right = {problem.id for problem in asked if letters[problem.id] == LETTERS[problem.answer]}
    of_image = _share((problem for problem in asked if problem.image), right)
    of_text = _share((problem for problem in asked if not problem.image), right)
    of_all = _share(asked, right)
    groups, topics = _groups(asked, right) if whole and annotations.source == PROBLEM_FILE else (None, None)
    return Score(
        of_image["accuracy"],
        {
            "accuracy": of_all["accuracy"] if whole else None,
            "image_accuracy": of_image["accuracy"],
            "text_accuracy": of_text["accuracy"] if whole and without else None,
            "questions": len(annotations.problems),
            "image_questions": of_image["questions"],
            "answered": "all questions" if whole else "questions with an image",
            "correct": of_all["correct"],
            "image_correct": of_image["correct"],
            "unparsed": sum(found is None for found in letters.values()),
            "beyond_choices": len(beyond),
            "groups": groups,
            "topics": topics,
            "image_flag_from": flag_from,
            "truth_from": annotations.source,
        },
    )


def _image_flag(asked: Sequence[Problem], answered: Mapping[str, Answer]) -> str:
    """Where the image flag is from: "prompts", which then agree with the question file, or "question file"."""
    marked = {problem.id for problem in asked if IMAGE_TOKEN in answered[problem.id].prompt}
    if not marked:
        return "question file"
    differ = [problem.id for problem in asked if problem.image != (problem.id in marked)]
    if differ:
        raise DataError(
            f"the prompts of {len(differ)} answers of ScienceQA have {IMAGE_TOKEN} where the question has no image, or "
            f"lack it where it has one, so they answer other questions:\n{gathered(differ)}"
        )
    return "prompts"


def _share(problems: Iterable[Problem], right: set[str]) -> dict[str, Any]:
    """Accuracy in percent with its counts, divided before it is scaled as the official scorer does."""
    ids = [problem.id for problem in problems]
    correct = sum(key in right for key in ids)
    return {"accuracy": correct / len(ids) * 100 if ids else 0.0, "correct": correct, "questions": len(ids)}


def _groups(asked: Sequence[Problem], right: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Share of each of ScienceQA's groups and of each topic that has questions."""
    groups = {name: [problem for problem in asked if name in problem.groups] for name in _GROUPS}
    topics = {
        name: [problem for problem in asked if problem.topic == name] for name in sorted({p.topic for p in asked})
    }
    return (
        {name: _share(members, right) for name, members in groups.items() if members},
        {name: _share(members, right) for name, members in topics.items()},
    )


def _asked(row: Mapping[str, Any]) -> str:
    """The human turn without image token."""
    text: str = row["conversations"][0]["value"]
    return text.replace(IMAGE_TOKEN, "").strip()


def _rows(data: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The question file and its rows, whose fields are of the right kind and whose ids differ."""
    path = existing(data / "scienceqa" / QUESTION_FILE)
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a JSON list of questions.")
    require_fields(path, rows, {"id": (str, int), "conversations": list})
    seen: set[str] = set()
    problems = []
    for number, row in enumerate(rows, start=1):
        turns, image = row["conversations"][:2], row.get("image")
        if [turn.get("from") for turn in turns if isinstance(turn, dict)] != ["human", "gpt"] or not all(
            isinstance(turn.get("value"), str) for turn in turns
        ):
            problems.append(f"row {number}: 'conversations' does not start with texts of human and gpt")
        if image is not None and (not isinstance(image, str) or not image):
            problems.append(f"row {number}: 'image' is not a path")
        if str(row["id"]) in seen:
            problems.append(f"row {number}: id {row['id']} was there before")
        seen.add(str(row["id"]))
    if not any(row.get("image") for row in rows):
        problems.append("no question has an 'image'")
    if problems:
        raise DataError(f"{path} is not the file that was expected:\n{gathered(problems)}")
    return path, rows


def _from_questions(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Problem, ...]:
    """Truth out of the question file alone."""
    found, problems = [], []
    for number, row in enumerate(rows, start=1):
        answer, choices = letter(row["conversations"][1]["value"]), _choices(_asked(row))
        if answer in LETTERS[:choices]:
            found.append(Problem(str(row["id"]), LETTERS.index(answer), choices, bool(row.get("image"))))
        else:
            problems.append(f"row {number}: the gpt turn is not the letter of one of the {choices} options")
    if problems:
        raise DataError(f"{path} does not hold the right answers:\n{gathered(problems)}")
    return tuple(found)


def _choices(text: str) -> int:
    """How many of (A), (B), ... come in order after the last "Options:"."""
    start = max(text.rfind("Options:"), 0)
    for count, name in enumerate(LETTERS):
        start = text.find(f"({name})", start)
        if start < 0:
            return count
    return len(LETTERS)


def _from_problems(path: Path, rows: Sequence[Mapping[str, Any]], splits: Path, problems: Path) -> tuple[Problem, ...]:
    """Truth out of problems.json, of the questions of the test split."""
    split, truth = read_json(splits), read_json(problems)
    if not isinstance(split, dict) or not isinstance(split.get("test"), list):
        raise DataError(f"{splits} has no list of ids under 'test'.")
    if not isinstance(truth, dict):
        raise DataError(f"{problems} is not a JSON object of questions by id.")
    ids, test = [str(row["id"]) for row in rows], {str(key) for key in split["test"]}
    flaws = [f"id {key} is not in the test split" for key in ids if key not in test]
    flaws += [f"id {key} of the test split is not in {path.name}" for key in sorted(test - set(ids))]
    flaws += [f"id {key} is not in {problems.name}" for key in ids if key in test and key not in truth]
    if flaws:
        raise DataError(f"{path}, {splits} and {problems} do not belong together:\n{gathered(flaws)}")
    flaws = [f"id {key}: {flaw}" for key in ids if (flaw := _flaw(truth[key]))]
    if flaws:
        raise DataError(f"{problems} is not the file that was expected:\n{gathered(flaws)}")
    return tuple(_problem(key, truth[key], bool(row.get("image"))) for key, row in zip(ids, rows, strict=True))


def _flaw(truth: Any) -> str:
    """What is wrong with an entry of problems.json; empty if nothing is."""
    if not isinstance(truth, dict) or not isinstance(truth.get("choices"), list):
        return "'choices' is not a list"
    answer, choices = truth.get("answer"), min(len(truth["choices"]), len(LETTERS))
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < choices:
        return f"'answer' is not the number of one of the {choices} choices"
    return next(
        (f"'{name}' is not text" for name in ("subject", "grade", "topic") if not isinstance(truth.get(name), str)), ""
    )


def _problem(key: str, truth: Mapping[str, Any], image: bool) -> Problem:
    hint, picture = bool(truth.get("hint")), bool(truth.get("image"))
    groups = [_SUBJECTS.get(truth["subject"]), _GRADES.get(truth["grade"])]
    groups += ["TXT" if hint else None, "IMG" if picture else None, None if hint or picture else "NO"]
    names = tuple(name for name in groups if name)
    return Problem(key, truth["answer"], len(truth["choices"]), image, names, truth["topic"])
