"""maskft evaluate on the training part, and on a data file of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskft.errors import DataError
from maskft.evaluation import answers_name
from tests.evaluation.test_evaluate import ROWS, evaluate, row  # noqa: F401 (a fixture)
from tests.test_cli import call


def test_training_questions(evaluate) -> None:  # noqa: F811
    scores, records, run = evaluate(ROWS, ["no"], ["red"], split="train")
    assert (len(records), scores["train_examples"], scores["tuned"]["accuracy"]) == (1, 1, 1.0)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == {"answers-train": scores}
    assert (run / "answers-train.jsonl").is_file()


def test_a_data_file(evaluate, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "again.png").write_bytes((tmp_path / "red.png").read_bytes())
    (folder / "green.png").write_bytes((tmp_path / "train.png").read_bytes())
    rows = [row("again.png", "What?", "red"), row("green.png", "What?", "green")]
    (folder / "mine.json").write_text(json.dumps(rows))
    scores, records, run = evaluate(ROWS, ["red", "red"], ["red", "green"], data=folder / "mine.json")
    assert [r["truth"] for r in records] == ["red", "green"]
    assert (scores["base"]["accuracy"], scores["tuned"]["accuracy"], scores["data_examples"]) == (0.5, 1.0, 2)
    assert scores["blind"]["correct"] == 1  # as the run's own training data says
    assert scores["data"] == str(folder / "mine.json")
    assert scores["images_of_training"] == 1
    name = answers_name("test", folder / "mine.json")
    assert name == "data-other-mine"
    assert json.loads((run / "metrics.json").read_text()) == {f"answers-{name}": scores}
    assert len((run / f"answers-{name}.jsonl").read_text().splitlines()) == 2


def test_a_flaw_is_found_before_the_model_is_loaded(evaluate, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "bad.json").write_text('[{"image": "red.png"}]')
    with pytest.raises(DataError, match=r"bad\.json"):
        evaluate(ROWS, [], [], data=tmp_path / "bad.json")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("answers*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "r", "--split", "train", "--data", "x.json"], "--split and --data both say what to ask"),
        (["evaluate", "r", "--data", "nowhere.json"], "nowhere.json"),
        (["evaluate", "r", "--split", "trian"], "or train for what was trained on"),
        (["compare", "a", "b", "--split", "data"], "data-<folder>-<file>"),
        (["compare", "a", "--base", "--split", "data-x-y"], "maskft evaluate a --data FILE"),
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
    if arguments[0] == "compare":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "recipe.yaml").write_text("data: {kind: easy-vqa}\n")
    assert call(monkeypatch, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
