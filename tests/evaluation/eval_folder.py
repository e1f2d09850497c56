"""A small but complete folder of the six benchmarks, laid out as LLaVA's, about real pictures of the package easy-vqa.

56 questions: 4 of GQA, ScienceQA and TextVQA each, 12 of POPE, 28 of MME (two in each subtask), 4 of MMMU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa

from maskft.data.easy_vqa import COLORS, SHAPES, described
from maskft.evaluation.benchmarks.mme import SUBTASKS

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
YES_OR_NO = "Please answer yes or no."
QUESTIONS = {"gqa": 4, "mmmu": 4, "mme": 28, "pope": 12, "scienceqa": 4, "textvqa": 4}
_WITH_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")


class Picture(NamedTuple):
    """A drawn shape."""

    file: Path
    color: str
    shape: str


def pictures(count: int) -> list[Picture]:
    """The first pictures of the package's test part."""
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*easy_vqa.get_test_questions(), strict=True):
        asked.setdefault(image, []).append((question, answer))
    paths = easy_vqa.get_test_image_paths()
    found = []
    for image in sorted(paths):
        color, shape = described(asked[image], COLORS), described(asked[image], SHAPES)
        if color and shape:
            found.append(Picture(Path(paths[image]), color, shape))
        if len(found) == count:
            break
    return found


def write_eval_folder(data: Path) -> Path:
    """Write all six benchmarks below `data` and return it."""
    shown = pictures(14)
    _gqa(data / "gqa", shown[:4])
    _scienceqa(data / "scienceqa", shown[:4])
    _textvqa(data / "textvqa", shown[:4])
    _pope(data / "pope", shown[:2])
    _mme(data / "MME", shown)
    _mmmu(data / "MMMU", shown[:4])
    return data


def _gqa(folder: Path, shown: list[Picture]) -> None:
    lines, truths = [], {}
    for number, picture in enumerate(shown):
        image = _copy(picture, folder / "images" / f"n{number}.png")
        question, answer = ("What color is the shape?", picture.color) if number % 2 else ("Is it a circle?", "yes")
        if answer == "yes" and picture.shape != "circle":
            answer = "no"
        lines.append(_line(f"20{number}", image.name, question + WORD))
        truths[f"20{number}"] = {
            "question": question,
            "answer": answer,
            "imageId": image.stem,
            "isBalanced": True,
            "types": {"structural": "query" if number % 2 else "verify", "semantic": "attr", "detailed": "color"},
            "groups": {"global": "color" if number % 2 else None, "local": "x"},
            "semantic": [{"operation": "select", "argument": "shape", "dependencies": []}],
            "entailed": [],
            "equivalent": [],
            "semanticStr": "select: shape",
        }
    _write_lines(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    _write(folder / "testdev_balanced_questions.json", truths)


def _scienceqa(folder: Path, shown: list[Picture]) -> None:
    rows, problems = [], {}
    for number, picture in enumerate(shown):
        image = f"{number}/image.png" if number else None  # the first has none
        if image:
            _copy(picture, folder / "images" / "test" / image)
        answer = list(SHAPES).index(picture.shape) if image else 1
        question = "Which shape is shown?" if image else "Which of these is a color?"
        choices = list(SHAPES) if image else ["circle", "red", "triangle"]
        options = " ".join(f"({'ABC'[n]}) {choice}" for n, choice in enumerate(choices))
        text = f"Context: {'Look at the picture.' if image else 'N/A'}\nQuestion: {question}\nOptions: {options}"
        turns = [
            {"from": "human", "value": f"<image>\n{text}" if image else text},
            {"from": "gpt", "value": "ABC"[answer]},
        ]
        rows.append({"id": str(number), **({"image": image} if image else {}), "conversations": turns})
        problems[str(number)] = {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": "Look at the picture." if image else "",
            "image": "image.png" if image else None,
            "task": "closed choice",
            "grade": "grade2" if number % 2 else "grade8",
            "subject": "natural science",
            "topic": "geometry",
            "split": "test",
        }
    _write(folder / "llava_test_CQM-A.json", rows)
    _write(folder / "problems.json", problems)
    _write(folder / "pid_splits.json", {"test": list(problems), "train": [], "val": []})


def _textvqa(folder: Path, shown: list[Picture]) -> None:
    """Two questions about the first picture, which share its id."""
    lines, rows = [], []
    for number, picture in enumerate([shown[0], *shown[:3]]):
        name = f"00{max(number - 1, 0)}a"
        image = _copy(picture, folder / "train_images" / f"{name}.jpg")
        question = "what color is the shape?" if number else "what shape is it?"
        lines.append(_line(name, image.name, f"{question}\nReference OCR token: STOP, 42, e-mail{WORD}"))
        truth = picture.color if number else picture.shape
        rows.append(
            {
                "question": question.capitalize(),
                "image_id": name,
                "question_id": 34602 + number,
                "set_name": "val",
                "answers": [truth] * 7 + ["answering does not require reading text in the image"] * 3,
            }
        )
    _write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows}
    _write(folder / "TextVQA_0.5.1_val.json", content)


def _pope(folder: Path, shown: list[Picture]) -> None:
    """Two pictures with two questions each in every category."""
    lines: list[dict[str, Any]] = []
    for category in ("adversarial", "popular", "random"):
        labels = []
        for number, picture in enumerate(shown):
            image = _copy(picture, folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
            for shape in (picture.shape, next(s for s in SHAPES if s != picture.shape)):
                question = f"Is there a {shape} in the image?"
                label = "yes" if shape == picture.shape else "no"
                labels.append({"question_id": len(labels) + 1, "image": image.name, "text": question, "label": label})
                lines.append({**_line(len(lines), image.name, question + WORD), "category": category})
        _write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    _write_lines(folder / "llava_pope_test.jsonl", lines)


def _mme(folder: Path, shown: list[Picture]) -> None:
    """One picture a subtask, in both layouts of the right answers."""
    lines = []
    for subtask, picture in zip(SUBTASKS, shown, strict=True):
        place = folder / "MME_Benchmark_release_version" / subtask
        apart = subtask in _WITH_FOLDERS
        image = _copy(picture, place / "images" / "0001.png" if apart else place / "0001.png")
        other = next(color for color in COLORS if color != picture.color)
        asked = [(f"Is the shape {color}? {YES_OR_NO}", color == picture.color) for color in (picture.color, other)]
        truths = place / "questions_answers_YN" if apart else place
        truths.mkdir(exist_ok=True)
        (truths / "0001.txt").write_text("".join(f"{text}\t{'Yes' if is_so else 'No'}\n" for text, is_so in asked))
        name = image.relative_to(folder / "MME_Benchmark_release_version").as_posix()
        lines += [{**_line(name, name, text + WORD), "category": subtask} for text, _ in asked]
    _write_lines(folder / "llava_mme.jsonl", lines)


def _mmmu(folder: Path, shown: list[Picture]) -> None:
    """Two of multiple choice, an open one, and one of several pictures, which is asked without any."""
    rows: list[dict[str, Any]] = []
    truths = {}
    for number, picture in enumerate(shown):
        name = f"validation_Math_{number + 1}"
        row: dict[str, Any] = {"id": name, "question_type": "multiple-choice", "all_choices": ["A", "B", "C"]}
        row["index2ans"] = dict(zip("ABC", SHAPES, strict=True))
        options = "\n".join(f"({letter}) {shape}" for letter, shape in row["index2ans"].items())
        row["prompt"] = f"<image 1> Which shape is it?\n{options}\n\n{LETTER}"
        truth = "ABC"[list(SHAPES).index(picture.shape)]
        if number == 2:
            row = {"id": name, "question_type": "open", "prompt": f"<image 1> How many corners has the shape?{WORD}"}
            truth = {"circle": "0", "rectangle": "4", "triangle": "3"}[picture.shape]
        if number < 3:
            row["image"] = _copy(picture, folder / "all_images" / f"{name}.png").name
        rows.append(row)
        kind = "short-answer" if number == 2 else "multiple-choice"
        truths[name] = {"question_type": kind, "ground_truth": truth}
    _write(folder / "anns_for_eval.json", rows)
    _write(folder / "answer_dict_val.json", truths)


def _line(id_: str | int, image: str, text: str) -> dict[str, Any]:
    return {"question_id": id_, "image": image, "text": text, "category": "default"}


def _copy(picture: Picture, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture.file, to)
    return to


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
