"""What becomes of a run's answers; the answers themselves are made up."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import maskft.evaluation.evaluate as module
from maskft.errors import DataError, RunError
from maskft.evaluation.evaluate import answer_types, evaluate_run, image_groups
from maskft.recipe import load_recipe
from maskft.runs import LoadedRun


class Loaded(LoadedRun):
    """A run whose base and tuned model are names."""

    @contextlib.contextmanager
    def base(self) -> Iterator[str]:
        yield "base"


def row(image: str | None, question: str, answer: str, **more: Any) -> dict[str, Any]:
    mark = "<image>\n" if image else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {**({"image": image} if image else {}), "conversations": turns, **more}


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], list[Any], Path]]:
    """Evaluate rows with given answers by base and tuned model."""
    for name, color in (("red", "red"), ("again", "red"), ("blue", "blue"), ("train", "green")):
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{name}.png")

    def _evaluate(rows: list[dict[str, Any]], base: list[str], tuned: list[str], metric: str = "exact", **arguments):
        (tmp_path / "test.json").write_text(json.dumps(rows))
        (tmp_path / "train.json").write_text(json.dumps([row("train.png", "What?", "red")]))
        text = f"data: {{kind: files, train: {tmp_path / 'train.json'}, test: {tmp_path / 'test.json'}}}\n"
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "recipe.yaml").write_text(text + f"evaluation: {{metric: {metric}}}\n")
        monkeypatch.setattr(
            module, "load_run", lambda folder: Loaded(folder, load_recipe(folder / "recipe.yaml"), "tuned", None)
        )
        said = {"base": base, "tuned": tuned}
        monkeypatch.setattr(module, "generate_answers", lambda model, processor, rows, **_: said[model][: len(rows)])
        return (*evaluate_run(run, **arguments), run)

    return _evaluate


ROWS = [
    row("red.png", "What?", "red", id="a"),
    row("again.png", "Which?", "red car", answers=["red car", "car"], id="b"),
    row("blue.png", "What?", "blue", id="c"),
    row(None, "Sure?", "yes", id="d"),
]


def test_scores_and_records(evaluate) -> None:
    scores, records, run = evaluate(ROWS, ["no"] * 4, ["Red.", "CAR", "red", "yes"])
    assert scores["metric"] == "exact"
    assert (scores["base"]["accuracy"], scores["tuned"]["accuracy"], scores["test_examples"]) == (0.0, 0.75, 4)
    assert scores["blind"]["correct"] == 1  # "red" to everything
    metrics = json.loads((run / "metrics.json").read_text())
    assert {key: metrics[key] for key in scores} == scores
    assert [json.loads(line) for line in (run / "answers-test.jsonl").read_text().splitlines()] == records
    assert [r["group"] is None for r in records] == [False, False, False, True]
    assert records[0]["group"] == records[1]["group"] != records[2]["group"]  # equal files under two names
    assert [r.get("answers") for r in records] == [None, ["red car", "car"], None, None]
    assert len(set(image_groups(records))) == 3


def test_scores_by_type_of_answer(evaluate) -> None:
    scores, records, _ = evaluate(ROWS, ["no"] * 3 + ["yes"], ["Red.", "CAR", "red", "no"])
    found = scores["by_answer_type"]
    assert list(found) == ["other", "yes/no"]
    assert [found[kind]["tuned"]["examples"] for kind in found] == [3, 1]
    assert [found[kind][side]["correct"] for kind in found for side in ("base", "blind", "tuned")] == [0, 1, 2, 1, 0, 0]
    assert answer_types(records) == "oooy"


def test_one_type_of_answer_has_no_scores_of_its_own(evaluate) -> None:
    assert "by_answer_type" not in evaluate(ROWS[:3], ["no"] * 3, ["red"] * 3)[0]


def test_graded_metrics(evaluate) -> None:
    scores, _, _ = evaluate(ROWS, ["no"] * 4, ["red", "red", "blue thing", "yes"], metric="f1")
    assert scores["metric"] == "f1"
    assert scores["tuned"]["accuracy"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 1) / 4)
    assert scores["tuned"]["correct"] == 2
    assert scores["blind"]["accuracy"] == pytest.approx((1 + 2 / 3) / 4)


def test_a_limit_writes_nothing(evaluate) -> None:
    scores, records, run = evaluate(ROWS, ["no"] * 4, ["red"] * 4, limit=1)
    assert (len(records), scores["test_examples"], scores["tuned"]["accuracy"]) == (1, 1, 1.0)
    assert sorted(path.name for path in run.iterdir()) == ["recipe.yaml"]


def test_choice_wants_letters_in_the_right_answers(evaluate) -> None:
    letters = [row("red.png", "A. x\nB. y", "B"), row("blue.png", "A. x\nB. y", "(a) x")]
    scores, _, _ = evaluate(letters, ["A", "B"], ["The answer is B", "A."], metric="choice")
    assert (scores["base"]["accuracy"], scores["tuned"]["accuracy"]) == (0.0, 1.0)
    with pytest.raises(DataError, match=r"4 right answer\(s\) name no option letter(.|\n)*test.json item 0"):
        evaluate(ROWS, ["A"] * 4, ["A"] * 4, metric="choice")


def test_no_such_split(evaluate) -> None:
    with pytest.raises(RunError, match=r"no validation split; it has train, test. Set data.split.validation"):
        evaluate(ROWS, [""] * 4, [""] * 4, split="validation")


def test_images_known_by_path_only() -> None:
    records = [{"image": "a.png"}, {"image": "a.png"}, {"image": "b.png"}, {"image": None}, {"image": None}]
    assert len(set(image_groups(records))) == 4
