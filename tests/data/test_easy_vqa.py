import re
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest
from datasets import Dataset

from maskft import inspection
from maskft.data import FEATURES, answer, check, leaked_images, load_easy_vqa, open_image, prompt
from maskft.data import easy_vqa as module
from maskft.data.easy_vqa import COLORS, SHAPES, questions_of
from maskft.errors import DataError, MissingExtraError
from maskft.recipe import Recipe
from maskft.runs import load_data

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def vqa() -> dict[str, Dataset]:
    return load_easy_vqa("vqa")


@pytest.fixture(scope="module")
def captions() -> dict[str, Dataset]:
    return load_easy_vqa("captions")


def sizes(parts: dict[str, Dataset]) -> dict[str, int]:
    return {name: len(part) for name, part in parts.items()}


def test_sizes(vqa: dict[str, Dataset], captions: dict[str, Dataset]) -> None:
    assert sizes(vqa) == {"train": 15477, "validation": 3888, "test": 9673}
    assert sizes(captions) == {"train": 1781, "validation": 354, "test": 888}
    assert vqa["train"].features == FEATURES


def test_rows(vqa: dict[str, Dataset], captions: dict[str, Dataset]) -> None:
    one = next(row for row in vqa["test"] if row["id"] == "easy-vqa/test/0/0")
    path = one["images"][0]["path"]
    assert path.endswith("data/test/images/0.png")
    parts = prompt(one)[0]["content"]
    assert parts[0] == {"type": "image", "text": None}
    assert re.fullmatch(r"[A-Z][a-z ]+\?\nAnswer the question using a single word or phrase\.", parts[1]["text"])
    assert one["origin"] == "easy-vqa test questions.json item 0"
    caption = captions["train"][0]
    assert prompt(caption)[0]["content"][1]["text"] == "Describe the image briefly."
    assert re.fullmatch(r"A [a-z]+ (circle|rectangle|triangle)\.", answer(caption))
    assert re.fullmatch(r"easy-vqa/train/\d+", caption["id"])


def test_ids_are_unique(vqa: dict[str, Dataset], captions: dict[str, Dataset]) -> None:
    ids = [name for parts in (vqa, captions) for part in parts.values() for name in part["id"]]
    assert len(ids) == len(set(ids))


def test_image_ranges(vqa: dict[str, Dataset], captions: dict[str, Dataset]) -> None:
    def numbers(part: Dataset) -> list[int]:
        return sorted({int(name.split("/")[2]) for name in part["id"]})

    assert numbers(captions["train"])[-1] < 2000
    assert numbers(vqa["train"]) == list(range(2000, 3600))
    assert numbers(vqa["validation"]) == list(range(3600, 4000))
    assert set(numbers(captions["validation"])) < set(numbers(vqa["validation"]))
    assert numbers(vqa["test"]) == list(range(1000))


def test_no_image_leaks(vqa: dict[str, Dataset], captions: dict[str, Dataset]) -> None:
    parts = [captions["train"], vqa["train"], vqa["validation"], vqa["test"]]
    for number, part in enumerate(parts):
        assert all(leaked_images(part, other) == 0 for other in parts[number + 1 :])


def test_captions_name_the_drawn_color(captions: dict[str, Dataset]) -> None:
    for one in captions["validation"]:
        colors = open_image(one["images"][0]).getcolors(64 * 64)
        assert RGB[answer(one).split()[1]] in {color for _, color in colors or []}


def test_rows_pass_the_check(captions: dict[str, Dataset]) -> None:
    summary = check(captions["validation"])
    assert (summary.examples, summary.images, summary.text_only) == (354, 354, 0)


def test_limits_and_seed(vqa: dict[str, Dataset]) -> None:
    few = load_easy_vqa("vqa", limits={"train": 20, "test": 5})
    assert sizes(few) == {"train": 20, "validation": 3888, "test": 5}
    assert few["train"]["id"][:] == vqa["train"]["id"][:20]
    order = {name: number for number, name in enumerate(vqa["test"]["id"])}
    places = [order[name] for name in few["test"]["id"]]
    assert places == sorted(places)
    other = load_easy_vqa("vqa", limits={"train": 20, "validation": 1, "test": 5}, seed=1)
    assert other["train"]["id"][:] != few["train"]["id"][:]
    assert other["test"]["id"][:] != few["test"]["id"][:]


def test_balanced_questions_are_not_answered_by_their_form(vqa: dict[str, Dataset]) -> None:
    balanced = load_easy_vqa("vqa", balanced=True)
    assert sizes(balanced) == {"train": 8256, "validation": 2052, "test": 5029}
    for part, rows in balanced.items():
        forms: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            ((question, said),) = questions_of(row)
            if said in ("yes", "no"):
                forms[re.sub("|".join((*SHAPES, *COLORS)), "", question)][said] += 1
        assert len(forms) == 16
        assert all(answers["yes"] == answers["no"] > 0 for answers in forms.values())
        asked = [row["id"] for row in vqa[part] if questions_of(row)[0][1] not in ("yes", "no")]
        assert set(asked) < set(rows["id"]) < set(vqa[part]["id"])
    assert load_easy_vqa("vqa", balanced=True)["test"]["id"][:] == balanced["test"]["id"][:]
    assert load_easy_vqa("vqa", balanced=True, seed=1)["test"]["id"][:] != balanced["test"]["id"][:]


def test_a_recipe_asks_for_balanced_questions() -> None:
    limits = {"train": 5, "validation": 2, "test": 40}
    recipe = Recipe.model_validate({"data": {"kind": "easy-vqa", "balanced": True, "limits": limits}})
    wanted = load_easy_vqa("vqa", limits=limits, balanced=True)
    assert load_data(recipe)["test"]["id"][:] == wanted["test"]["id"][:]
    scanned = {row.row["id"] for row in inspection._parts(recipe, {})["test"]}
    assert scanned == set(wanted["test"]["id"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "caption"}, r"part is 'caption', but must be vqa or captions\. Did you mean 'captions'"),
        ({"limits": {"valid": 3}}, r"limits names 'valid', .*Did you mean 'validation'"),
        ({"limits": {"train": 0}}, r"limits\.train is 0, but must be a whole number"),
        ({"limits": {"train": 1.5}}, r"limits\.train is 1\.5"),
        ({"limits": {"train": True}}, r"limits\.train is True"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_easy_vqa(**{"part": "vqa", **options})


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps easy-vqa==1\.0"):
        load_easy_vqa("vqa")


def test_images_of_later_parts_are_dropped(tmp_path: Any) -> None:
    def image(name: int, content: str) -> str:
        (tmp_path / str(name)).write_text(content)
        return str(tmp_path / str(name))

    contents = {0: "a", 1: "b", 2000: "b", 2001: "c", 2002: "d", 3600: "d", 3601: "e", 3602: "f"}
    train = module._Source("train", {number: image(number, text) for number, text in contents.items()}, {})
    test = module._Source("test", {0: image(9, "e"), 1: image(10, "c")}, {})
    kept = module._split_images(train, test)
    assert kept == {"test": [0, 1], "validation": [3600, 3602], "vqa": [2000], "captions": [0]}


@pytest.mark.parametrize(
    ("asked", "color"),
    [
        ([("what color is the shape?", "red")], "red"),
        ([("what is the red shape?", "circle")], "red"),
        ([("is there a red shape?", "yes")], "red"),
        ([("does the image not contain a red shape?", "no")], "red"),
        ([("is no red shape present?", "no")], "red"),
        ([("is no red shape present?", "yes")], None),
        ([(f"is a {name} shape present?", "no") for name in module.COLORS if name != "teal"], "teal"),
        ([("is there not a red shape?", "no"), ("is there a red shape?", "no")], None),
        ([("is there a red shape?", "yes"), ("is there a blue shape?", "yes")], None),
        ([("is there a circle?", "yes")], None),
    ],
)
def test_described(asked: list[tuple[str, str]], color: str | None) -> None:
    assert module.described(asked, module.COLORS) == color


def test_conversations_keep_every_question_once(vqa: dict[str, Dataset]) -> None:
    joined = load_easy_vqa("vqa", turns=4)
    assert len(joined["train"]) < len(vqa["train"]) / 3
    assert sizes(joined)["test"] == sizes(vqa)["test"]

    def asked(rows: Dataset) -> list[tuple[str, str, str]]:
        found = []
        for row in rows:
            assert len(row["images"]) == 1
            messages = row["messages"]
            for question, reply in zip(messages[::2], messages[1::2], strict=True):
                text = question["content"][-1]["text"].removesuffix(module.INSTRUCTION)
                found.append((row["images"][0]["path"], text, reply["content"][0]["text"]))
        return sorted(found)

    assert asked(joined["train"]) == asked(vqa["train"])
    first = joined["train"][0]["messages"]
    assert len(first) <= 8
    assert first[0]["content"][-1]["text"].endswith(module.INSTRUCTION)
    assert all([part["type"] for part in turn["content"]] == ["text"] for turn in first[1:])


def test_turns_must_be_positive() -> None:
    with pytest.raises(DataError, match="turns is 0"):
        load_easy_vqa("vqa", turns=0)
