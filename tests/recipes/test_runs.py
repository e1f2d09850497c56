"""Every recipe of the paper trains, is scored on six benchmarks, exported and loaded again, with a shrunken base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from maskft.cli.export import run as export
from maskft.evaluation.run_benchmarks import run_benchmarks
from maskft.recipe import load_recipe
from maskft.runs import load_run
from maskft.training import train
from tests.evaluation.eval_folder import QUESTIONS, write_eval_folder
from tests.recipes.shrunken import ROOT, shrunken_base, write_llava
from tests.recipes.test_paper import BACKBONES, METHODS, RECIPES

SMALLER = (
    "training.max_steps=3",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.dataloader_num_workers=0",
    "training.logging_steps=1",
    "training.save_strategy=no",
)
PER_METHOD = {"lora": ("method.rank=4",), "qlora": ("method.rank=4",), "unilora": ("method.vector_length=256",)}
ROUNDING = 0.25
"""Of logits, where a product of factors is added to weights in bf16 instead of beside them; a mask's merge is exact."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, benchmarks and bases where the recipes look for them."""
    folder = tmp_path_factory.mktemp("place")
    write_llava(folder / "data" / "llava")
    write_eval_folder(folder / "eval")
    return folder


def make_bases(backbone: str, models: Path) -> None:
    """As composed and as aligned, the same."""
    for ending in ("", "-unaligned"):
        folder = models / f"tinyllava-{backbone}{ending}"
        if not folder.exists():
            shrunken_base(f"tinyllava-{backbone}", folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BACKBONES])
def test_from_training_to_scores(backbone: str, method: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    make_bases(backbone, Path("models"))
    name = f"{backbone}-{method}"
    run = Path("runs") / name
    recipe = load_recipe(ROOT / RECIPES / f"{name}.yaml", [*SMALLER, *PER_METHOD.get(method, ())])
    trained = train(recipe, run)["train"]
    assert trained["steps"] == 3
    losses = [entry["loss"] for entry in json.loads((run / "log.json").read_text()) if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))

    outcome = run_benchmarks(str(run), ["all"], Path("eval"), batch_size=64, max_new_tokens=2)
    assert outcome.answered == {name: QUESTIONS}
    assert set(outcome.results[name]) == set(QUESTIONS)

    export(run, Path("merged") / name, dtype=None, max_shard_size="5GB", quantize=None, as_json=False)
    check_reloaded(run, Path("merged") / name, exact=method not in PER_METHOD)


def check_reloaded(run: Path, merged: Path, *, exact: bool) -> None:
    """The exported model gives the run's logits, and not its base's."""
    loaded = load_run(run)
    inputs: Any = loaded.processor.tokenizer("what color shape", return_tensors="pt")
    exported = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        tuned, reloaded = loaded.model.eval()(**inputs).logits, exported(**inputs).logits
    assert torch.isfinite(reloaded).all()
    torch.testing.assert_close(reloaded, tuned, rtol=0, atol=0 if exact else ROUNDING)
