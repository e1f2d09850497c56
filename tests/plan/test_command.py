"""`maskft plan`: what it prints, what it refuses, and large models."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, LlamaConfig, PreTrainedConfig

from maskft.errors import ModelError, RecipeError
from maskft.plan import Plan, plan, planning
from maskft.recipe import load_recipe
from tests.test_cli import call
from tests.tuner.models import TEXT, tiny_llava

METHODS = [
    "recipe: S-MFT fast",
    "S-MFT fast",
    "S-MFT balanced",
    "S-MFT tight",
    "H-MFT fast",
    "LoRA r16",
    "QLoRA r16, nf4",
    "full, bf16 with bf16 moments",
    "full, fp32",
]


def written(folder: Path, config: PreTrainedConfig, *lines: str, tokens: int = 24) -> Path:
    """A recipe for a base of which there is nothing but its config.json."""
    config.save_pretrained(folder / "base")
    recipe = folder / "recipe.yaml"
    text = f"model: {{base: {folder / 'base'}}}\ndata: {{kind: files, train: nowhere.json}}\n"
    training = f"training: {{per_device_train_batch_size: 2, max_length: {tokens}}}\n"
    recipe.write_text(text + training + "".join(f"{line}\n" for line in lines))
    return recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plan"), tiny_llava().config)


def planned(path: Path, *overrides: str, **asked: Any) -> Plan:
    return plan(load_recipe(path, overrides), **asked)


def test_json(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "plan", recipe, "--json", "--gpu", "1GB") == 0
    found = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in found["methods"]] == METHODS
    assert found["step"] == {
        "batch": 2,
        "tokens": 24,
        "images": 1,
        "accumulation": 1,
        "checkpointing": False,
        "autocast": "bfloat16",
        "device": "gpu",
    }
    assert all(method["fits"] and method["seen"] for method in found["methods"])
    own = found["methods"][0]
    parts = ("base", "trained", "moments", "gradients", "activations", "logits", "temporary", "gathered")
    assert own["total"] == sum(own[part] for part in parts)
    assert {**own, "name": ""} == {**found["methods"][1], "name": ""}
    assert (found["changes"], found["enough"], found["ranks"]) == ([], None, 1)


def test_text(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "plan", recipe, "--gpu", "1KB", "--cpu", "--tokens", "16", "--images", "2") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "Peak memory of one step on a CPU: 2 rows of 16 tokens with 2 image(s)",
        "The recipe does not fit:",
        "To change first, each by itself:",
        "method.memory=tight -> ",
        "None of these is enough",
    ):
        assert part in shown


def test_ranks(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "plan", recipe, "--ranks", "2") == 0
    shown = capsys.readouterr().out
    assert "each of 2 processes" in " ".join(shown.split())
    assert "gathered" in shown
    assert "QLoRA" not in shown
    assert "note: gathered: two layers" in shown


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**{**TEXT, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4})
    return written(tmp_path_factory.mktemp("large"), config, tokens=64)


class TestChanges:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Other methods take time and change nothing here."""
        monkeypatch.setattr(planning, "_peers", lambda *_: ())

    def test_best_first(self, large: Path) -> None:
        found = planned(large)
        totals = [change.total for change in found.changes]
        assert totals == sorted(totals)
        assert {change.settings[0].partition("=")[0] for change in found.changes} >= {
            "method.memory",
            "method.score_layout",
        }
        assert all(change.total < found.rows[0].peak.total and change.fits is None for change in found.changes)

    @pytest.mark.slow
    def test_a_change_is_what_the_changed_recipe_gives(self, large: Path) -> None:
        for change in planned(large).changes:
            assert planned(large, *change.settings).rows[0].peak.total == change.total

    @pytest.mark.slow
    def test_several_together(self, large: Path) -> None:
        alone = planned(large)
        budget = alone.changes[0].total - 1
        found = planned(large, budget=budget)
        assert not any(change.fits for change in found.changes)
        assert found.enough is not None
        assert len(found.enough.settings) > 1
        again = planned(large, *found.enough.settings, budget=budget)
        assert again.rows[0].fits
        assert again.rows[0].peak.total == found.enough.total
        assert again.changes == []


def test_stage_1(recipe: Path) -> None:
    found = planned(recipe, "method={name: projector}")
    assert found.rows[0].name == "recipe: projector"
    projector = 16 * 16 + 16 + 16 * 16 + 16
    assert (found.rows[0].peak.trained, found.rows[0].peak.moments) == (4 * projector, 8 * projector)


def test_a_hard_mask_and_scores_of_another_layout(recipe: Path) -> None:
    found = planned(recipe, "method.gate=topk", "method.score_layout=row", "training.gradient_checkpointing=true")
    assert found.rows[0].name == "recipe: H-MFT fast"
    assert found.rows[0].peak.trained < found.rows[1].peak.trained
    assert found.load.checkpointing


def test_a_model_of_text_alone(tmp_path: Path) -> None:
    found = planned(written(tmp_path, LlamaConfig(**TEXT)), "training.max_length=null")
    assert (found.load.tokens, found.load.images) == (64, 0)  # as many as it has positions for
    assert not found.rows[0].peak.seen


def test_images_of_a_form_that_is_not_known(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskft.plan.step._images", lambda *_: [])
    found = planned(recipe)
    assert not found.rows[0].peak.seen
    assert any("vision encoder was not run" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "24"], "'24' is no size of memory"),
        (["model.base=./nowhere"], "./nowhere"),
        (["method.gaet=soft"], "Did you mean 'gate'"),
        (["training.max_lenght=8"], "'max_length'"),
        (["method.layers=40-44"], "layers 0 to 1"),
        (["--tokens", "4"], "take 4 tokens, and a row has 4"),
        (["--ranks", "2", "model.quantization=nf4"], "a quantised base in pieces"),
    ],
)
def test_mistakes(
    arguments: list[str],
    expected: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "plan", recipe, *arguments) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


def test_no_length_is_known(tmp_path: Path) -> None:
    path = written(tmp_path, BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(RecipeError, match="Give --tokens"):
        planned(path, "training.max_length=null")
    with pytest.raises(RecipeError, match="--ranks is 0"):
        planned(path, ranks=0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({"model_type": "no-such-model"}, "no-such-model"), ({"num_attention_heads": "two"}, "config.json")],
)
def test_configs_that_make_no_model(changed: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, LlamaConfig(**TEXT))
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(ModelError, match=expected):
        planned(path)


@pytest.mark.slow
def test_70_billion_parameters_in_a_minute_and_little_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    path = written(tmp_path, config, "method: {memory: tight}", tokens=4096)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "maskft.cli", "plan", str(path), "--gpu", "80GB", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4e6  # in kB
    found = json.loads(done.stdout)
    own = found["methods"][0]
    masked = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert found["parameters"] == masked + 2 * 128256 * 8192 + 161 * 8192
    assert own["trained"] == 2 * masked
    assert own["moments"] == pytest.approx(2 * masked, rel=0.001)
    assert own["base"] == pytest.approx(2 * found["parameters"], rel=1e-6)
    assert not own["fits"]
    assert found["enough"] is None or found["enough"]["fits"]
