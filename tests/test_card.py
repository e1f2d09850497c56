"""Model cards are what Hugging Face reads, hold measured numbers alone, and keep what isn't trusted quoted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from maskft.card import base_licence, model_card
from maskft.errors import RunError
from tests.data.helpers import write_json

SCORE = {"accuracy": 0.804, "low": 0.767, "high": 0.836, "correct": 402, "examples": 500}
METRICS = {
    "train": {
        "seconds": 277.6,
        "steps": 120,
        "epochs": 0.96,
        "examples": 1000,
        "loss": 0.4744,
        "trainable_parameters": 106721280,
        "base_parameters": 153575232,
        "resumed_from_step": None,
    },
    "metric": "exact",
    "base": {**SCORE, "accuracy": 0.002, "low": 0.0004, "high": 0.011, "correct": 1},
    "tuned": SCORE,
    "blind": {**SCORE, "accuracy": 0.626, "correct": 313},
    "validation": {"metric": "exact", "tuned": {**SCORE, "accuracy": 0.7875, "correct": 315, "examples": 400}},
}
RECIPE: dict[str, Any] = {
    "model": {"base": "org/small-vlm"},
    "data": {"kind": "files", "train": "/home/me/secret/shapes.json"},
}

CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")  # closed by as many backticks as it was opened with


def made_run(folder: Path, recipe: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "recipe.yaml", recipe or RECIPE)
    write_json(folder / "metrics.json", METRICS if metrics is None else metrics)
    write_json(folder / "environment.json", {"packages": {"torch": "2.13.0+cpu"}, "commit": "c5f39b0"})
    write_json(folder / "adapter_config.json", {"base_fingerprint": "0123abcd"})
    return folder


def test_the_card_of_a_merged_model(tmp_path: Path) -> None:
    text = model_card(made_run(tmp_path / "shapes"))
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers",
        "image-text-to-text",
        "org/small-vlm",
    )
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.tags == ["maskft", "mask-fine-tuning"]
    assert (data.license, data.license_name) == ("other", "see-the-base")
    (result,) = data.eval_results
    assert data.model_name == "shapes"
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("image-text-to-text", "shapes", "test")
    assert (result.metric_type, result.metric_value) == ("exact", 0.804)
    body = card.text
    assert "| tuned | 80.4 % | 76.7 % to 83.6 % | 402 | 500 |" in body
    assert "| best guess without the image | 62.6 % |" in body
    assert "| tuned | 78.8 % | 76.7 % to 83.6 % | 315 | 400 |" in body  # of the validation part
    for fact in ("`0123abcd`", "`torch 2.13.0+cpu`", "`c5f39b0`", "see the base's licence", "1,000 training examples"):
        assert fact in body
    assert "trainable parameters: 106,721,280" in body
    assert "AutoModelForImageTextToText.from_pretrained" in body
    assert "PeftModel" not in body
    assert "secret" not in text  # folders of the writer's machine stay there
    assert "train: shapes.json" in body


def test_the_card_of_an_adapter(tmp_path: Path) -> None:
    card = ModelCard(model_card(made_run(tmp_path / "shapes"), adapter=True))
    assert card.data.library_name == "peft"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "from maskft import MaskConfig" in card.text
    assert 'from_pretrained("org/small-vlm", dtype="bfloat16")' in card.text
    assert "`PeftModel`" not in card.text


def test_a_quantised_model(tmp_path: Path) -> None:
    card = ModelCard(model_card(made_run(tmp_path / "shapes"), quantization="nf4", dtype="float16"))
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "Its language model is kept in nf4." in card.text
    assert 'dtype="float16"' in card.text


@pytest.mark.parametrize(
    "rounded", [{"quantization": "nf4"}, {"dtype": "float16"}, {"storage": "int4", "adapter": True}]
)
def test_scores_are_those_of_the_model_that_was_measured(rounded: dict[str, Any], tmp_path: Path) -> None:
    run = made_run(tmp_path / "shapes")
    card = ModelCard(model_card(run, **rounded))
    kept = next(iter(rounded.values()))
    assert f"Measured with the run's model. Here it is kept in {kept}, which was not measured." in card.text
    assert "| tuned | 80.4 %" in card.text
    assert card.data.eval_results is None
    for same in ({"dtype": "bfloat16"}, {"adapter": True, "storage": "bits"}):
        card = ModelCard(model_card(run, **same))
        assert "not measured" not in card.text
        assert len(card.data.eval_results) == 1


@pytest.mark.parametrize(
    ("method", "library", "said"),
    [
        ({"name": "mask"}, "peft", "made with mask fine-tuning"),
        ({"name": "mask", "gate": "topk", "fixed": "magnitude"}, "peft", "made with a fixed mask, not trained,"),
        ({"name": "lora"}, "peft", "made with LoRA"),
        ({"name": "full"}, "maskft", "The trained weights of `base`, made with full fine-tuning"),
        ({"name": "projector"}, "maskft", "made with training of the projector"),
    ],
)
def test_what_other_methods_leave(method: dict[str, Any], library: str, said: str, tmp_path: Path) -> None:
    recipe = {"model": {"base": "/models/base"}, "method": method, "data": {"kind": "easy-vqa"}}
    run = made_run(tmp_path / "run", recipe)
    card = ModelCard(model_card(run, adapter=True))
    assert card.data.library_name == library
    assert card.data.tags == ["maskft", "mask-fine-tuning" if method["name"] == "mask" else method["name"]]
    assert card.data.base_model is None
    assert said in card.text
    assert ("MaskConfig" in card.text) is (method["name"] == "mask")
    assert ("PeftModel" in card.text) is (library == "peft")
    assert ("maskft export path/to/this/folder" in card.text) is (library == "maskft")
    merged = ModelCard(model_card(run))
    assert merged.data.library_name == "transformers"
    assert "and merged: an ordinary Transformers model" in merged.text


def test_the_licence_of_the_embedded_base(tmp_path: Path) -> None:
    recipe = {"model": {"base": "embedded"}, "data": {"kind": "easy-vqa"}}
    card = ModelCard(model_card(made_run(tmp_path / "demo", recipe)))
    assert (card.data.license, card.data.license_name) == ("other", "apache-2.0-and-mit")
    assert "`easy-vqa`" in card.text


def test_benchmarks(tmp_path: Path) -> None:
    run = made_run(tmp_path / "shapes")
    (run / "benchmarks").mkdir()
    scores = {
        "shapes": {"pope": {"score": 86.1, "details": {}}, "gqa": {"score": None}},
        "base": {"pope": {"score": 1}},
    }
    write_json(run / "benchmarks" / "results.json", scores)
    card = ModelCard(model_card(run))
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [("shapes", 0.804), ("pope", 86.1)]
    assert "| pope | 86.1 |" in card.text


@pytest.mark.parametrize("metrics", [{}, {"tuned": {"accuracy": "high"}, "train": []}, {"tuned": 3, "validation": "x"}])
def test_nothing_is_said_of_what_was_not_measured(tmp_path: Path, metrics: dict[str, Any]) -> None:
    run = made_run(tmp_path / "shapes", metrics=metrics)
    (run / "environment.json").write_text("[")
    card = ModelCard(model_card(run))
    assert card.data.eval_results is None
    assert "Not evaluated." in card.text
    assert "Not finished." in card.text
    with pytest.raises(RunError, match="is not a run folder"):
        model_card(tmp_path)


def test_text_from_others_stays_text(tmp_path: Path) -> None:
    evil = "x`</code>\n---\n# Best | <script>alert(1)</script>\x1b[31m"
    recipe = {
        "model": {"base": f"/models/{evil}"},
        "data": {"kind": "files", "train": "/data/t.json"},
        "method": {"name": "mask", "target_modules": [f"```\n{evil}"]},
    }
    run = made_run(tmp_path / "a`b <i>|", recipe)
    write_json(run / "adapter_config.json", {"base_fingerprint": evil})
    write_json(run / "environment.json", {"packages": {evil: evil}, "commit": evil})
    text = model_card(run)
    assert "\x1b" not in text
    card = ModelCard(text)
    assert card.data.model_name == "a`b <i>|"
    lines = text.splitlines()
    assert lines.count("---") == 2
    assert [line for line in lines if line.startswith("# ")] == ["# ``a`b <i>|``"]
    outside = [line for number, line in enumerate(lines) if "<script>" in line and not fenced(lines, number)]
    assert outside
    assert not [line for line in outside if "<" in CODE_SPAN.sub("", line)]


def fenced(lines: list[str], number: int) -> bool:
    """Whether a line is inside a code block or the header, by the rule that a fence closes one of its own length."""
    opened = ""
    for line in lines[:number]:
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not opened and len(ticks) >= 3:
            opened = ticks
        elif opened and line == opened:
            opened = ""
    return bool(opened) or number < lines[1:].index("---") + 1


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: gemma\n---\n# Base\n", {"license": "gemma"}),
        (
            "---\nlicense: other\nlicense_name: tongyi-qianwen\nlicense_link: https://example.org/LICENSE\n---\n",
            {"license": "other", "license_name": "tongyi-qianwen", "license_link": "https://example.org/LICENSE"},
        ),
        ("---\nlicense: [a, b]\n---\n", {"license": "other", "license_name": "see-the-base"}),
        ("---\nlicense: 'MIT\nx: y'\n---\n", {"license": "other", "license_name": "see-the-base"}),
        ("---\n{: \n---\n", {"license": "other", "license_name": "see-the-base"}),
        ("license: mit\n", {"license": "other", "license_name": "see-the-base"}),
    ],
)
def test_the_licence_is_the_bases(card: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert base_licence(str(tmp_path)) == expected


def test_the_licence_of_a_base_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n")
    known = {"org/there": str(card)}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: known.get(name))
    assert base_licence("org/there") == {"license": "apache-2.0"}
    assert base_licence("org/elsewhere")["license_name"] == "see-the-base"
    assert base_licence("no id at all")["license_name"] == "see-the-base"


def test_the_recipe_in_a_card_is_whole(tmp_path: Path) -> None:
    text = model_card(made_run(tmp_path / "shapes"))
    recipe = text.split("```yaml\n")[1].split("\n```")[0]
    assert "init_gate: 0.98" in recipe
    assert json.dumps(recipe).count("/home") == 0
