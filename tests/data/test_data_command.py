"""maskft data: folders that the library reads back, with images in one part each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from maskft.data import answer, check, leaked_images, load_easy_vqa, read
from maskft.data.easy_vqa import COLORS, SHAPES
from maskft.data.labels import STAMPS
from maskft.data.llava_folder import write_collection
from maskft.data.variants import _redrawn, held_out_pairs, write_easy_vqa
from maskft.errors import DataError, RunError
from tests.data.test_pictures import stamps
from tests.test_cli import call


def test_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = stamps(tmp_path / "unpacked"), tmp_path / "out"
    (source / STAMPS / "food" / "torn.png").write_bytes(b"torn")
    arguments = ("data", "stamps", "--source", source, "--output", out, "--size", "32", "--validation", "0.2")
    assert call(monkeypatch, *arguments, "--json") == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert summary["output"] == str(out)
    assert {**json.loads((out / "summary.json").read_text()), "output": str(out)} == summary
    assert "1 picture(s) cannot be decoded" in said.err
    parts = {part: read(out / f"{part}.json") for part in ("train", "validation", "test")}
    for part, rows in parts.items():
        assert check(rows).examples == sum(row["questions"] for row in summary["questions"][part].values()) > 0
        assert len(set(rows["id"])) == len(rows)
    assert leaked_images(parts["train"], parts["test"]) == leaked_images(parts["train"], parts["validation"]) == 0
    assert call(monkeypatch, *arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert call(monkeypatch, *arguments[:-4], "--output", tmp_path / "again") == 0
    shown = capsys.readouterr().out
    for text in ("stamps: 24 pictures", "belongs", "50.0 %", f"test: {tmp_path / 'again' / 'test.json'}"):
        assert text in shown


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    source = stamps(tmp_path / "unpacked")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_collection("stamps", source, tmp_path / name, seed=seed)
    texts = [(tmp_path / name / "train.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'stamp' is no collection.*Did you mean 'stamps'"):
        write_collection("stamp", tmp_path, tmp_path / "out")
    source = stamps(tmp_path / "unpacked")
    for share in (0, float("nan")):
        with pytest.raises(DataError, match="both must be above 0"):
            write_collection("stamps", source, tmp_path / "out", test=share)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stamp"], "there is no data set 'stamp'; there are stamps, clipart, digits, easy-vqa. Did you mean 'stamps'"),
        (["stamps", "--split", "compositional"], "--split cannot be used with stamps"),
        (["easy-vqa", "--source", "x", "--test", "0.2"], "--source, --test cannot be used with easy-vqa"),
        (["digits", "--source", "x"], "--source cannot be used with digits"),
        (["digits", "--test", "nan"], "validation is 0.05 and test nan; both must be above 0"),
        (["digits", "--test", "0.97"], "validation is 0.05 and test 0.97; both must be above 0"),
        (["stamps", "--questions", "kinds"], "there are no questions 'kinds'"),
        (["easy-vqa", "--labels", "rnd"], "--labels is 'rnd'; it must be true or random"),
        (["clipart", "--source", "nowhere"], "nowhere does not hold usr/share/openclipart"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "data", *arguments, "--output", "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_held_out_pairs() -> None:
    pairs = held_out_pairs()
    assert sorted(color for color, _ in pairs) == sorted(COLORS)
    assert all(2 <= [shape for _, shape in pairs].count(shape) <= 3 for shape in SHAPES)
    assert pairs == held_out_pairs(0) != held_out_pairs(1)


@pytest.fixture(scope="module")
def compositional(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("easy") / "out"
    return out, write_easy_vqa(out, split="compositional")


def test_compositional(compositional: tuple[Path, dict[str, Any]]) -> None:
    out, summary = compositional
    parts = {part: read(out / f"{part}.json") for part in ("train", "validation", "test", "test-seen")}
    assert {part: len(rows) for part, rows in parts.items()} == summary["questions"]
    assert summary["pictures"] == {"train": 986, "validation": 256, "test": 308, "test-seen": 580}
    assert summary["images_of_unknown_pair"] == 315
    assert len(parts["test"]) > 2000
    held_out = {tuple(pair.split()) for pair in summary["held_out_pairs"]}
    for part, rows in parts.items():
        for row in rows:
            question = row["messages"][0]["content"][-1]["text"].lower()
            named = re.fullmatch(r"what (?:color is the (\w+)|is the (\w+) shape)\?.*", question, re.DOTALL)
            if not named:
                continue
            pair = (answer(row), named[1]) if named[1] else (named[2], answer(row))
            if pair[0] in COLORS and pair[1] in SHAPES:
                assert (pair in held_out) == (part == "test"), (part, pair)
    for first, second in (("train", "test"), ("train", "test-seen"), ("train", "validation"), ("test", "test-seen")):
        assert leaked_images(parts[first], parts[second]) == 0


def test_compositional_captions(tmp_path: Path) -> None:
    summary = write_easy_vqa(tmp_path / "out", part="captions", split="compositional", seed=3)
    held_out = {f"A {pair}." for pair in summary["held_out_pairs"]}
    said = {part: {answer(row) for row in read(tmp_path / "out" / f"{part}.json")} for part in summary["questions"]}
    assert said["test"] == held_out
    assert not held_out & (said["train"] | said["validation"] | said["test-seen"])
    assert len(said["train"]) == 16


def test_random_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "data", "easy-vqa", "--labels", "random", "--output", tmp_path / "drawn") == 0
    shown = capsys.readouterr().out
    assert "labels random" in shown
    drawn, true = read(tmp_path / "drawn" / "train.json"), load_easy_vqa("vqa")["train"]
    assert len(drawn) == len(true) == 15477
    answers: dict[tuple[str, str], set[str]] = {}
    agreed = {"sort": 0, "answer": 0}
    for one, other in zip(drawn, true, strict=True):
        assert one["id"] == other["id"]
        sort = next(names for names in (COLORS, SHAPES, ("no", "yes")) if answer(other) in names)
        agreed["sort"] += answer(one) in sort
        agreed["answer"] += answer(one) == answer(other)
        key = (one["images"][0]["path"], one["messages"][0]["content"][-1]["text"])
        answers.setdefault(key, set()).add(answer(one))
    assert agreed["sort"] == len(true)
    assert 0.3 < agreed["answer"] / len(true) < 0.55  # by chance
    assert all(len(said) == 1 for said in answers.values())
    caption = _redrawn({"image": "a", "question": "b", "answer": "A red circle."}, 0)
    assert re.fullmatch(r"A [a-z]+ (circle|rectangle|triangle)\.", caption["answer"])


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(RunError, match="already exists"):
        write_easy_vqa(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_chosen_questions_alone(tmp_path: Path) -> None:
    source, out = stamps(tmp_path / "unpacked"), tmp_path / "out"
    summary = write_collection("stamps", source, out, types=["belongs"])
    assert set(summary["questions"]["train"]) == {"belongs"}
    assert {row["id"].split("/")[-2] for row in json.loads((out / "train.json").read_text())} == {"belongs"}


def test_the_kind_in_words_is_asked_for_by_name_alone(tmp_path: Path) -> None:
    source, out = stamps(tmp_path / "unpacked"), tmp_path / "out"
    assert "label" not in write_collection("stamps", source, tmp_path / "all")["questions"]["train"]
    write_collection("stamps", source, out, types=["label", "belongs"])
    rows = json.loads((out / "train.json").read_text())
    labels = [row for row in rows if "/label/" in row["id"]]
    kinds = {row["image"]: row["conversations"][1]["value"] for row in labels}
    assert len(kinds) == len(labels)
    assert set(kinds.values()) == {"animals", "food"}
    own = [row for row in rows if "/belongs/" in row["id"] and row["conversations"][1]["value"] == "yes"]
    assert own
    for row in own:
        assert row["conversations"][0]["value"].split('"')[1] == kinds[row["image"]]


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "data", "digits", "--output", tmp_path / "out", "--seed", "1") == 0
    assert "digits" in capsys.readouterr().out
    parts = {part: read(tmp_path / "out" / f"{part}.json") for part in ("train", "validation", "test")}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 4672, "validation": 360, "test": 2156}
    assert leaked_images(parts["train"], parts["test"]) == leaked_images(parts["validation"], parts["test"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["questions"]["test"] == 2156 == 4 * summary["pictures"]["test"]
    assert 0.25 < summary["guessed"]["test"] < 0.35  # a half of two sorts of questions, a tenth of the others
    for row in json.loads((tmp_path / "out" / "test.json").read_text())[:200]:
        asked, said = (turn["value"] for turn in row["conversations"])
        assert said == right_about(digit_of(tmp_path / "out", row["id"].split("/")[1]), asked)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1797


def digit_of(folder: Path, scan: str) -> int:
    """The digit of a scan, by what its own row says."""
    rows = json.loads((folder / "test.json").read_text())
    return int(next(r for r in rows if r["id"] == f"digits/{scan}/which")["conversations"][1]["value"])


def right_about(digit: int, asked: str) -> str:
    """The answer to a question about a digit."""
    words = asked.replace("?", " ").split()
    number = next((int(word) for word in words if word.isdigit()), 0)
    if "plus" in words:
        return str(digit + number)
    if "greater" in words or "a" in words[:4]:
        return "yes" if (digit > number if "greater" in words else digit == number) else "no"
    return str(digit)
