"""`maskft train` on two processes, launched by accelerate."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from maskft.recipe import load_recipe
from maskft.runs import load_run
from maskft.training import train
from tests.data.helpers import llava, png, write_json
from tests.distributed.launch import Done, launch
from tests.distributed.script import WORDS

MODULES = {"ddp": "maskft.cli", "fsdp2": "tests.distributed.cpu", "zero3": "tests.distributed.cpu"}


@pytest.fixture(scope="module")
def recipe(bases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on forty-eight pictures, with checkpoints after the fourth and eighth."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    rows = []
    for i in range(48):
        colour = draw.choice(["red", "blue", "lime"])
        png(folder / f"{i}.png", colour)
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))
        rows.append(llava(f"<image>\n{question}?", " ".join([colour] * draw.randint(1, 3)), image=f"{i}.png"))
    content = {
        "model": {"base": str(bases[1]), "dtype": "float32"},
        "data": {"kind": "files", "train": str(write_json(folder / "train.json", rows))},
        "training": {
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "save_steps": 4,
        },
    }
    return write_json(folder / "recipe.yaml", content)  # YAML reads JSON


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    train(load_recipe(recipe), run)
    return losses(run)


@pytest.fixture(scope="module")
def copies(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run with DDP: its folder, and what was written to the terminal."""
    run = tmp_path_factory.mktemp("runs") / "copies"
    return run, run_command("ddp", recipe, run, "--json")


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((run / "log.json").read_text()) if "loss" in entry]


def run_command(kind: str, recipe: Path, run: Path, *options: str) -> Done:
    overrides = ["training.per_device_train_batch_size=2", f"training.use_cpu={str(kind == 'ddp').lower()}"]
    done = launch(kind, MODULES[kind], "train", recipe, *overrides, "--output", run, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def check_training(kind: str, alone: list[float], run: Path, done: Done) -> None:
    """The losses are those of one process, and one process speaks."""
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["train"]["steps"] == 10
    assert result["train"]["trainable_parameters"] == 5120
    assert done.stderr.count("training 5,120 parameters beside a base of 28,912") == 1
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(alone), rtol=0, atol=1e-5)
    assert ("each of 2 processes reads its share" in done.stderr) == (kind == "fsdp2")
    assert load_run(run).folder == run  # on one process, where the base is checked


def check_resuming(kind: str, recipe: Path, run: Path) -> None:
    """Without result and last checkpoint, a run goes on from the one before and ends the same."""
    adapter = run / "adapter_model.safetensors"
    first = adapter.read_bytes()
    adapter.unlink()
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-10")
    assert run_command(kind, recipe, run).stdout.count("trained 10 steps") == 1
    assert json.loads((run / "metrics.json").read_text())["train"]["resumed_from_step"] == 8
    assert adapter.read_bytes() == first


class TestCopies:
    def test_train_as_one_process_does(self, alone: list[float], copies: tuple[Path, Done]) -> None:
        check_training("ddp", alone, *copies)

    def test_resume(self, recipe: Path, copies: tuple[Path, Done]) -> None:
        check_resuming("ddp", recipe, copies[0])

    @pytest.mark.slow
    def test_pause_together(self, recipe: Path, copies: tuple[Path, Done], tmp_path: Path) -> None:
        overrides = ["training.per_device_train_batch_size=2", "training.use_cpu=true"]
        done = launch("ddp", "tests.distributed.paused", "train", recipe, *overrides, "--output", tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "paused after step 3 of 10" in done.stderr
        assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["checkpoint-3"]
        run_command("ddp", recipe, tmp_path)
        assert json.loads((tmp_path / "metrics.json").read_text())["train"]["resumed_from_step"] == 3
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / name).read_bytes() == (copies[0] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_pieces_train_and_resume(kind: str, recipe: Path, alone: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    check_training(kind, alone, run, run_command(kind, recipe, run, "--json"))
    check_resuming(kind, recipe, run)
