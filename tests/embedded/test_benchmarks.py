"""Benchmarks on the embedded base: six in one command, killed and taken up again, batched as one by one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskft.cli import main
from maskft.data import load_easy_vqa
from maskft.evaluation import generate_answers
from maskft.evaluation.benchmarks import BENCHMARKS
from maskft.vlm.load import load_model, load_processor
from tests.evaluation.eval_folder import QUESTIONS, write_eval_folder

SETTINGS = ("--dtype", "float32", "--batch-size", "4", "--max-new-tokens", "5")


def call(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["maskft", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eval_folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the base on all six."""
    output = tmp_path_factory.mktemp("out") / "whole"
    assert call("evaluate", "embedded", "--benchmark", "all", "--data", data, "--output", output, *SETTINGS) == 0
    return output


def test_one_command_scores_all_six(whole: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((whole / "results.json").read_text())["embedded"]
    assert sorted(results) == sorted(BENCHMARKS)
    for bench, entry in results.items():
        assert math.isfinite(entry["score"])
        answers = whole / bench / "answers" / "embedded.jsonl"
        assert len(answers.read_text().splitlines()) == QUESTIONS[bench]
        assert call("score", bench, answers, "--data", data, "--json") == 0
        scored = json.loads(capsys.readouterr().out)
        assert {"score": scored["score"], "details": scored["details"]} == entry


def test_a_killed_evaluation_is_taken_up_and_ends_with_the_same_files(whole: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", "embedded", "--benchmark", "mme", "--data", data, "--output", tmp_path, *SETTINGS)
    answers = tmp_path / "mme" / "answers" / "embedded.jsonl"
    command = [sys.executable, "-m", "maskft.cli", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ}) as process:
        while process.poll() is None and not (answers.is_file() and answers.read_bytes().count(b"\n") >= 8):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = answers.read_bytes()
    assert 8 <= done.count(b"\n") < QUESTIONS["mme"]
    assert not (tmp_path / "results.json").exists()

    assert call(*arguments) == 0
    for name in ("embedded.jsonl", "embedded.json"):
        assert (answers.parent / name).read_bytes() == (whole / "mme" / "answers" / name).read_bytes()
    assert answers.read_bytes().startswith(done)
    results = json.loads((tmp_path / "results.json").read_text())["embedded"]
    assert results["mme"] == json.loads((whole / "results.json").read_text())["embedded"]["mme"]


def test_base_and_run_stand_side_by_side(
    run: Path, whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--adapters", run, "--benchmark", "gqa", "--data", data, "--output", tmp_path, *SETTINGS)
    assert call("evaluate", "embedded", *arguments) == 0
    assert capsys.readouterr().out.count("GQA accuracy, %") == 1
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["embedded", run.name]
    folder = tmp_path / "gqa" / "answers"
    assert (folder / "embedded.jsonl").read_bytes() == (whole / "gqa" / "answers" / "embedded.jsonl").read_bytes()
    texts = [json.loads(line)["text"] for line in (folder / f"{run.name}.jsonl").read_text().splitlines()]
    assert len(texts) == 4
    assert texts != [json.loads(line)["text"] for line in (folder / "embedded.jsonl").read_text().splitlines()]


def test_a_batch_answers_as_single_questions() -> None:
    """Questions of several lengths, left-padded together, in fp32. (bf16 rounds sums of padded rows differently, which
    tips near-ties; that is why the batch size is part of what answers were made with.)"""
    rows = list(load_easy_vqa("vqa", limits={"train": 1, "validation": 1, "test": 64})["test"])
    processor, model = load_processor("embedded"), load_model("embedded", dtype="float32")
    alone = generate_answers(model, processor, rows, batch_size=1, max_new_tokens=4)
    assert generate_answers(model, processor, rows, batch_size=16, max_new_tokens=4) == alone
    assert len(set(alone)) > 8
