"""Dry runs on machines where data, processor or weights are still missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskft.preview import preview
from maskft.recipe import load_recipe
from maskft.vlm.load import has_processor, has_weights
from tests.faults.tiny_run import write_recipe
from tests.test_cli import call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "work")


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


WEIGHTS, PROCESSOR = "*.safetensors", "*processor_config.json"


def test_nothing_is_missing(recipe: Path, tmp_path: Path) -> None:
    seen = preview(load_recipe(recipe), tmp_path / "run")
    assert seen["missing"] == []
    assert (seen["train_examples"], seen["rows_per_step"]) == (12, 2)


def test_without_weights_all_but_them_is_looked_at(recipe: Path, tmp_path: Path) -> None:
    whole = preview(load_recipe(recipe), tmp_path / "run")
    remove(recipe.parent / "base", WEIGHTS)
    seen = preview(load_recipe(recipe), tmp_path / "run")
    (line,) = seen.pop("missing")
    assert line.endswith("has no weights here; modules and numbers are those of its config.json")
    assert whole.pop("missing") == []
    assert seen == whole


def test_without_processor_no_tokens_are_counted(recipe: Path, tmp_path: Path) -> None:
    remove(recipe.parent / "base", PROCESSOR)
    seen = preview(load_recipe(recipe), tmp_path / "run")
    assert [line for line in seen["missing"] if "has no processor" in line] == seen["missing"]
    assert (seen["train_examples"], seen["longest_example_tokens"]) == (12, None)


def test_the_command_lists_what_is_missing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove(recipe.parent / "base", WEIGHTS, PROCESSOR)
    gone = ["data.validation=nowhere.json", f"data.image_root={tmp_path / 'nowhere'}"]
    output = tmp_path / "run"
    assert call(monkeypatch, "train", recipe, *gone, "--output", output, "--dry-run") == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert [line.split(": ")[1] for line in missing] == [
        "data.validation",
        "data.image_root",
        "model.base",
        "model.base",
    ]
    assert call(monkeypatch, "train", recipe, *gone, "--output", output, "--dry-run", "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    assert len(seen["missing"]) == 4
    assert "train_examples" not in seen
    assert not output.exists()


@pytest.mark.parametrize(
    ("gone", "expected"),
    [((WEIGHTS,), "cannot load"), ((PROCESSOR,), "processor"), ((), "data.train")],
)
def test_training_refuses_what_a_dry_run_lists(
    gone: tuple[str, ...],
    expected: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remove(recipe.parent / "base", *gone)
    overrides = [] if gone else ["data.train=nowhere.json"]
    assert call(monkeypatch, "train", recipe, *overrides, "--output", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert ("nowhere.json" if not gone else expected) in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_not_there_is_a_mistake(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", recipe, "model.base=./nowhere", "--dry-run") == 2
    assert "there is no model there" in capsys.readouterr().err


def test_a_hub_ids_weights_are_looked_for_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "model.safetensors.index.json"
    cached.touch()
    found = {"org/here": {cached.name: str(cached)}, "org/known": {cached.name: object()}}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, name: found.get(repo, {}).get(name), raising=True
    )
    assert [has_weights(base) for base in ("org/here", "org/known", "org/nowhere")] == [True, False, False]
    assert has_processor("org/nowhere")
