"""maskft report, and the reports that training and evaluation leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import maskft.evaluation
import maskft.training
from tests.adapters.test_commands import run  # noqa: F401 (a fixture)

from .made import make_run, metrics, score

Call = Any


def test_one_and_several(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    code, out, err = run("report", a)
    assert (code, err) == (0, "")
    assert f"report   {a / 'report.html'}" in out
    assert (a / "report.html").read_text().startswith("<!doctype html>")
    code, out, _ = run("report", a, b, "-o", tmp_path / "both.html", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["bytes"] == (tmp_path / "both.html").stat().st_size
    assert told["runs"] == [str(a), str(b)]
    monkeypatch.chdir(tmp_path)
    assert run("report", a, b)[0] == 0
    assert (tmp_path / "report.html").is_file()


def test_mistakes(run: Call, tmp_path: Path) -> None:  # noqa: F811
    for arguments, message in (((tmp_path,), "not a run folder"), ((), "Missing argument")):
        code, out, err = run("report", *arguments)
        assert (code, out) == (2, "")
        assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose training is made up, and the folder it trains into."""
    folder = tmp_path / "run"

    def train(recipe: Any, output: Path, **_: Any) -> dict[str, Any]:
        make_run(output)
        return {"train": {**metrics(0)["train"], "base_parameters": 2000}}

    monkeypatch.setattr(maskft.training, "train", train)
    (tmp_path / "recipe.yaml").write_text("data: {kind: easy-vqa}\n")
    return folder


def test_training_leaves_a_report_and_a_card(run: Call, trained: Path) -> None:  # noqa: F811
    code, out, err = run("train", trained.parent / "recipe.yaml", "--output", trained)
    assert code == 0, err
    assert (trained / "README.md").read_text().startswith("---\nlibrary_name: peft\n")
    assert f"report   {trained / 'report.html'}\nnext" in out
    assert (trained / "report.html").is_file()


def test_a_report_that_fails_does_not_fail_the_run(run: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def broken(*_: Any) -> int:
        raise ZeroDivisionError("bins")

    monkeypatch.setattr("maskft.report.page.write_report", broken)
    code, out, err = run("train", trained.parent / "recipe.yaml", "--output", trained)
    assert code == 0
    assert "next     maskft evaluate" in out
    assert "report  " not in out
    assert f"the report could not be written (bins); try: maskft report {trained}" in err.replace("\n", " ")


def test_evaluation_leaves_a_report(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    folder = make_run(tmp_path / "run")
    content = json.loads((folder / "metrics.json").read_text())
    content["train"]["base_parameters"] = 2000
    (folder / "metrics.json").write_text(json.dumps(content))
    scores = {"metric": "exact", **{side: score(3) for side in ("base", "blind", "tuned")}, "test_examples": 12}
    monkeypatch.setattr(maskft.evaluation, "evaluate_run", lambda *_, **__: (scores, []))
    code, out, err = run("evaluate", folder)
    assert code == 0, err
    assert f"report   {folder / 'report.html'}" in out
    (folder / "report.html").unlink()
    assert run("evaluate", folder, "--limit", 2)[0] == 0
    assert not (folder / "report.html").exists()
