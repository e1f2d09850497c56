"""What comes after training: evaluation, merging, export, asking."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from maskft.cli import main
from maskft.data import Collator
from maskft.evaluation import evaluate_run, generate_answers
from maskft.runs import load_data, load_run

SETTINGS = {"batch_size": 50, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def questions(run: Path) -> list[dict]:
    return list(load_data(load_run(run).recipe)["test"])


@pytest.fixture(scope="module")
def evaluated(run: Path) -> tuple[dict, list[dict]]:
    return evaluate_run(run)


def test_evaluation_writes_scores_and_answers(run: Path, evaluated: tuple[dict, list[dict]]) -> None:
    scores, records = evaluated
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_examples"] == len(records) == 100
    assert metrics["train"]["steps"] == 8
    for name in ("base", "tuned"):
        right = sum(r[name].strip().rstrip(".").lower() == r["truth"] for r in records)
        assert metrics[name]["accuracy"] == scores[name]["accuracy"] == right / 100
        assert metrics[name]["low"] <= metrics[name]["accuracy"] <= metrics[name]["high"]
    lines = (run / "answers-test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert any(r["base"] != r["tuned"] for r in records)


def test_unmerged_merged_and_exported_models_agree(
    run: Path, questions: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masked weight is rounded to bf16 once, in the same way each time, so the bound on logits is zero."""
    loaded = load_run(run)
    probe = Collator(loaded.processor).prompts(questions[:16])
    with torch.inference_mode():
        unmerged_logits = loaded.model(**probe).logits
    unmerged = generate_answers(loaded.model, loaded.processor, questions, **SETTINGS)
    loaded.model.merge_adapter(safe_merge=True)
    merged = generate_answers(loaded.model, loaded.processor, questions, **SETTINGS)
    assert merged == unmerged
    loaded.model.unmerge_adapter()

    monkeypatch.setattr("sys.argv", ["maskft", "export", str(run), str(tmp_path / "merged")])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        assert torch.equal(model(**probe).logits, unmerged_logits)
    assert generate_answers(model, processor, questions, **SETTINGS) == unmerged
    assert not any("mask_scores" in name for name, _ in model.named_parameters())


def test_base_context_gives_the_base_back(run: Path, questions: list[dict]) -> None:
    loaded = load_run(run)
    base = AutoModelForImageTextToText.from_pretrained(
        loaded.model.get_base_model().config._name_or_path, dtype=torch.bfloat16
    ).eval()
    probe = Collator(loaded.processor).prompts(questions[:4])
    with torch.inference_mode():
        expected = base(**probe).logits
        with loaded.base() as model:
            assert torch.equal(model(**probe).logits, expected)
        assert not torch.equal(loaded.model(**probe).logits, expected)


def test_an_adapter_for_another_base_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.json"):
        os.link(run / name, other / name)
    recipe = (run / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("base: embedded", "base: embedded-unaligned"))
    monkeypatch.setattr("sys.argv", ["maskft", "evaluate", str(other)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "trained on another base" in capsys.readouterr().err
    assert not (other / "answers-test.jsonl").exists()


def test_a_limited_evaluation_writes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "metrics.json").read_bytes()
    monkeypatch.setattr("sys.argv", ["maskft", "evaluate", str(run), "--split", "validation", "--limit", "7"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "exact match on 7 held-out questions" in shown
    by_type = shown.partition("by type of answer")[2].partition("some of the questions")[0]
    assert "yes/no" in by_type
    assert "other" in by_type
    assert "nothing was written" in shown
    assert (run / "metrics.json").read_bytes() == before
    assert not (run / "answers-validation.jsonl").exists()


def test_export_does_not_overwrite(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr("sys.argv", ["maskft", "export", str(run), str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "already exists" in capsys.readouterr().err


def test_ask_prints_both_answers(
    run: Path, questions: list[dict], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = questions[0]["images"][0]["path"]
    monkeypatch.setattr("sys.argv", ["maskft", "ask", str(run), image, "What color is the shape?", "--json"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    answers = json.loads(capsys.readouterr().out)
    assert answers["question"] == "What color is the shape?"
    assert answers["base"]
    assert answers["tuned"]
