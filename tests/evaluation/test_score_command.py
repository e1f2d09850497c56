from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from maskft.cli.score import _flat, _table
from maskft.evaluation.benchmarks import benchmark
from tests.evaluation.test_mme import write_mme
from tests.evaluation.test_pope import write_pope
from tests.test_cli import call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    write_pope(folder)
    write_mme(folder)
    return folder


def answer_all(data: Path, name: str, text: str) -> Path:
    """An answers file that says the same to every question."""
    file = data / f"{name}.jsonl"
    rows = [{"question_id": q.id, "prompt": q.text, "text": text} for q in benchmark(name).questions(data)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("name", "score", "questions"), [("pope", 200 / 3, 12), ("mme", 500.0, 56)])
def test_score_as_json(
    name: str,
    score: float,
    questions: int,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = answer_all(data, name, "Yes")
    assert call(monkeypatch, "score", name, answers, "--data", data, "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    assert list(seen) == ["benchmark", "score", "details", "answers", "questions"]
    assert seen["score"] == pytest.approx(score)
    assert (seen["benchmark"], seen["answers"], seen["questions"]) == (name, str(answers), questions)
    assert ("random" if name == "pope" else "OCR") in seen["details"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pope", ["POPE mean F1, %", "66.67", "random, yes ratio", "100.00", "random, true positives"]),
        ("mme", ["MME perception, points", "500.00", "cognition", "200.00", "code reasoning, accuracy plus"]),
    ],
)
def test_score_as_a_table(
    name: str, expected: list[str], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "score", name, answer_all(data, name, "Yes"), "--data", data) == 0
    shown = capsys.readouterr().out
    for part in expected:
        assert part in shown
    assert "[" not in shown


def test_details_of_any_kind_are_shown() -> None:
    details = {"a_b": {"c": {"d_e": 0.126}}, "f": None, "g": "[red]", "h": 3, "i": {}}
    assert list(_flat(details)) == [("a b, c, d e", 0.126), ("f", None), ("g", "[red]"), ("h", 3)]
    console = Console(width=60)
    with console.capture() as shown:
        console.print(_table("T", 1.0, details))
    for part in ("0.13", " - ", "[red]", " 3 "):
        assert part in shown.get()


def test_mistakes_end_with_one_message(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = answer_all(data, "pope", "Yes")
    short = data / "short.jsonl"
    short.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    cases: list[tuple[list[object], list[str]]] = [
        (["popo", answers, "--data", data], ["no benchmark 'popo'", "Did you mean 'pope'?"]),
        (["pope", answers, "--data", data / "pope"], ["llava_pope_test.jsonl", "missing"]),
        (["pope", data / "none.jsonl", "--data", data], ["none.jsonl", "No such file"]),
        (["pope", short, "--data", data], ["no answer (1)", "- 203"]),
        (["mme", answers, "--data", data], ["the answers do not match the questions of MME"]),
        (["pope", answers], ["--data"]),
    ]
    for arguments, expected in cases:
        assert call(monkeypatch, "score", *arguments, "--json") == 2
        seen = capsys.readouterr()
        assert seen.out == ""
        assert "Traceback" not in seen.err
        for part in expected:
            assert part in seen.err


def test_the_command_starts_without_torch(data: Path) -> None:
    answers = answer_all(data, "pope", "No")
    code = f"""
import sys
sys.argv = ["maskft", "score", "pope", {str(answers)!r}, "--data", {str(data)!r}, "--json"]
from maskft.cli import main
try:
    main()
finally:
    print(*{{name.split(".")[0] for name in sys.modules}}, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["score"] == 0.0
    assert not {"torch", "transformers", "peft", "datasets"} & set(done.stderr.split())
