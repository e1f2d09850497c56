"""MMMU's 900 validation questions, asked as TinyLLaVA-Factory asks them and scored as MMMU's own eval_utils does.

Files, under MMMU/:
- anns_for_eval.json: list of {"id", "prompt", "image"?, "question_type", "all_choices", "index2ans"}, the last two of
  questions whose type is "multiple-choice";
- answer_dict_val.json, or eval/answer_dict_val.json: id -> {"question_type", "ground_truth": text or list of texts};
- all_images/<image>.

Asked: the prompt without "<image>", stripped. A question of several images has no "image". It is then asked by its text
alone; TinyLLaVA-Factory does not ask it and takes a random choice, or a fixed text for an open one. That is why the
details count these questions apart.

Multiple choice (`mmmu_text.choice`). Of the ends of the text the marks , . ! ? ; : ' are stripped, one after the other,
and a space is put before and after. The candidates are the choices whose "(A)" is in the text; if there are none, those
whose " A " is; if there are none and the text has more than five words, those whose content is, whatever the case. Of
several, the one whose last occurrence starts last. If there are none, a random choice: official runs seed Python's
generator with 42 once, and ours is an own random.Random(42) that is drawn from in the order of anns_for_eval.json and
only where needed, which gives the official draws if the answers are parsed in that order, whatever the order of the
lines. `random_choices` says how often. Right is a choice that equals the truth, or one of them.

Any other type is open (`mmmu_text.matches`). The text is stripped of space, then of full stops, and lower-cased. Of
each line, the shortest tail after the last "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ",
"result " (in the last line also "="), unless it is nothing but one of : , . ! ? ; '; without any tail, the whole text.
To these come all numbers in them: with thousands commas, in scientific notation, plain. Everything is normalised: what
float() takes once its commas are gone is a number, rounded to two decimals; anything else a text, with a space before
or after if it is one character. Right is a number that equals a number of the truth, or a text that holds a text of
it. "nan" equals nothing; "inf" and numbers too large for a float are equal.

The type in anns_for_eval.json decides how an answer is read, the type in answer_dict_val.json (which says
"short-answer" for open) how it is judged, as in the official scripts. No text makes the official scorer fail, so none
is counted as wrong for that.

The score is the share of right answers in percent: the mean over instances. The official scorer rounds the same share
to three decimals of a fraction. Subjects come from the ids (validation_Art_Theory_7: Art_Theory).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft.errors import DataError, gathered
from maskft.evaluation.benchmarks import mmmu_text
from maskft.evaluation.benchmarks.common import (
    Answer,
    Question,
    Score,
    existing,
    paths_inside,
    percent,
    read_json,
    require_fields,
    require_one_answer_each,
)

MAX_NEW_TOKENS = 1024
SEED = 42
IMAGE_TOKEN = "<image>"
MULTIPLE_CHOICE = "multiple-choice"
DISCIPLINES: dict[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_SUBJECTS = frozenset(subject for subjects in DISCIPLINES.values() for subject in subjects)


@dataclass(frozen=True)
class Item:
    """One question's truth.

    Attributes:
        id: such as validation_Accounting_1.
        letters: of the choices, in order; empty if the answer is not read as a choice.
        options: letter -> text of the choice, in order.
        truths: any of which is right.
        by_choice: whether the answer is judged as a choice.
        image: whether there is one image to ask about.
    """

    id: str
    letters: tuple[str, ...]
    options: Mapping[str, str]
    truths: tuple[str, ...]
    by_choice: bool
    image: bool

    @property
    def subject(self) -> str:
        """Such as Art_Theory."""
        return _subject(self.id)


@dataclass(frozen=True)
class Annotations:
    """All questions in the order of anns_for_eval.json."""

    items: tuple[Item, ...]


def read(data: Path) -> Annotations:
    """The truth of every question; see the module for the files.

    Raises:
        DataError: a file is missing or has a flaw, or the two do not have the same ids.
    """
    path, rows = _rows(data)
    truth_path = existing(path.parent / "answer_dict_val.json", path.parent / "eval" / "answer_dict_val.json")
    truths = read_json(truth_path)
    if not isinstance(truths, dict):
        raise DataError(f"{truth_path} is not a JSON object of answers by id.")
    ids = {row["id"] for row in rows}
    flaws = [f"id {key} is only in {path.name}" for key in sorted(ids - set(truths))]
    flaws += [f"id {key} is only in {truth_path.name}" for key in sorted(set(truths) - ids)]
    if flaws:
        raise DataError(f"{path} and {truth_path} do not have the same questions:\n{gathered(flaws)}")
    flaws = [f"id {key}: {flaw}" for key, truth in truths.items() if (flaw := _truth_flaw(truth))]
    if flaws:
        raise DataError(f"{truth_path} is not the file that was expected:\n{gathered(flaws)}")
    return Annotations(tuple(_item(row, truths[row["id"]]) for row in rows))


def questions(data: Path) -> list[Question]:
    """What the model is asked, in the order of anns_for_eval.json; the category is the subject.

    Raises:
        DataError: the file is missing or has a flaw.
    """
    path, rows = _rows(data)
    names = [row.get("image") or "none" for row in rows]  # every row has one, so that messages count rows
    paths = paths_inside(path.parent / "all_images", names, source=path)
    return [
        Question(
            row["id"],
            row["prompt"].replace(IMAGE_TOKEN, "").strip(),
            image if row.get("image") else None,
            _subject(row["id"]),
        )
        for row, image in zip(rows, paths, strict=True)
    ]


def score(annotations: Annotations, answers: Sequence[Answer]) -> Score:
    """Share of right answers in percent; see the module for the rule.

    Raises:
        DataError: names missing, doubled and unknown answers.
    """
    items = annotations.items
    require_one_answer_each((item.id for item in items), [answer.question_id for answer in answers], bench="MMMU")
    texts = {answer.question_id: answer.text for answer in answers}
    generator = random.Random(SEED)
    right, drawn = set(), set()
    for item in items:
        said: str | None = texts[item.id]
        if item.letters:
            said = mmmu_text.choice(texts[item.id], item.letters, item.options)
        if said is None:
            said = generator.choice(item.letters)
            drawn.add(item.id)
        if said in item.truths if item.by_choice else mmmu_text.matches(said, item.truths):
            right.add(item.id)
    overall = _share(items, right)
    return Score(
        overall["accuracy"],
        {
            **overall,
            "multiple_choice": _share((item for item in items if item.by_choice), right),
            "open": _share((item for item in items if not item.by_choice), right),
            "without_image": _share((item for item in items if not item.image), right),
            "random_choices": len(drawn),
            "random_choices_correct": len(drawn & right),
            "disciplines": _by({name: frozenset(subjects) for name, subjects in DISCIPLINES.items()}, items, right),
            "subjects": _by({name: frozenset({name}) for name in sorted(_SUBJECTS)}, items, right),
        },
    )


def _share(items: Iterable[Item], right: set[str]) -> dict[str, Any]:
    """Accuracy in percent with its counts."""
    ids = [item.id for item in items]
    correct = sum(key in right for key in ids)
    return {"accuracy": percent(correct, len(ids)), "correct": correct, "questions": len(ids)}


def _by(groups: Mapping[str, frozenset[str]], items: Sequence[Item], right: set[str]) -> dict[str, Any]:
    """Share of each group of subjects that has questions."""
    shares = {
        name: _share((item for item in items if item.subject in subjects), right) for name, subjects in groups.items()
    }
    return {name: share for name, share in shares.items() if share["questions"]}


def _subject(key: str) -> str:
    return "_".join(key.split("_")[1:-1])


def _rows(data: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The question file and its rows, whose fields are of the right kind and whose ids differ."""
    path = existing(data / "MMMU" / "anns_for_eval.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} is not a JSON list of questions.")
    require_fields(path, rows, {"id": str, "prompt": str, "question_type": str})
    seen: set[str] = set()
    problems = []
    for number, row in enumerate(rows, start=1):
        problems += [f"row {number}: {flaw}" for flaw in _row_flaws(row, seen)]
        seen.add(row["id"])
    if problems:
        raise DataError(f"{path} is not the file that was expected:\n{gathered(problems)}")
    return path, rows


def _row_flaws(row: Mapping[str, Any], seen: set[str]) -> list[str]:
    """What is wrong with a row of anns_for_eval.json beside its types; `seen` are the ids of the rows before."""
    flaws = []
    image = row.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        flaws.append("'image' is not a path")
    if row["id"] in seen:
        flaws.append(f"id {row['id']} was there before")
    if _subject(row["id"]) not in _SUBJECTS:
        flaws.append(f"id {row['id']} does not name a subject of MMMU")
    if row["question_type"] == MULTIPLE_CHOICE:
        letters, options = row.get("all_choices"), row.get("index2ans")
        if not _texts(letters) or not letters:
            flaws.append("'all_choices' is not a list of letters")
        if not isinstance(options, dict) or not _texts(list(options.values())):
            flaws.append("'index2ans' does not give a text for each letter")
    return flaws


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _truth_flaw(truth: Any) -> str:
    """What is wrong with an entry of answer_dict_val.json; empty if nothing is."""
    if not isinstance(truth, dict) or not isinstance(truth.get("question_type"), str):
        return "'question_type' is missing or not a text"
    given = truth.get("ground_truth")
    return "" if isinstance(given, str) or (_texts(given) and given) else "'ground_truth' is no text or list of texts"


def _item(row: Mapping[str, Any], truth: Mapping[str, Any]) -> Item:
    given, choice = truth["ground_truth"], row["question_type"] == MULTIPLE_CHOICE
    return Item(
        id=row["id"],
        letters=tuple(row["all_choices"]) if choice else (),
        options=row["index2ans"] if choice else {},
        truths=(given,) if isinstance(given, str) else tuple(given),
        by_choice=truth["question_type"] == MULTIPLE_CHOICE,
        image=bool(row.get("image")),
    )
