"""A TRL script with `peft_config=MaskConfig()` on two processes is the script on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.distributed.launch import launch
from tests.distributed.script import train

OPTIONS = {"fsdp2": ("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")}


@pytest.fixture(scope="module")
def alone(bases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    for base in bases:
        train(base, folder / base.name, processes=1, use_cpu=True)
    return folder


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "losses.json").read_text()), dtype=torch.float64)


def scores(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def check_training(one: Path, two: Path) -> None:
    """Losses and scores of a run on one process and of one on two."""
    assert len(losses(two)) == 10
    # a batch in two halves adds up in another order
    torch.testing.assert_close(losses(two), losses(one), rtol=0, atol=1e-5)
    learnt, expected = scores(two), scores(one)
    assert learnt.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0.1, name
        # Adam divides a gradient by its own size, so rounding shows where a gradient is near zero
        torch.testing.assert_close(learnt[name], expected[name], rtol=0, atol=1e-3)


def check_adapter(base: Path, folder: Path) -> None:
    """The adapter on one process answers as the model that was trained."""
    kind = AutoModelForImageTextToText if base.name == "llava" else AutoModelForCausalLM
    # the fingerprint is checked here
    model = PeftModel.from_pretrained(kind.from_pretrained(base, dtype="float32"), folder / "adapter").eval()
    assert model.peft_config["default"].base_fingerprint is not None
    tensors = load_file(folder / "logits.safetensors")
    trained = tensors.pop("logits")
    with torch.no_grad():
        torch.testing.assert_close(model(**tensors).logits, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_processes_learn_what_one_does(kind: str, bases: list[Path], alone: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"bases": [str(base) for base in bases], "out": str(tmp_path), "processes": 2}))
    done = launch(kind, "tests.distributed.script", settings, options=OPTIONS.get(kind, ()))
    assert done.returncode == 0, done.stderr[-4000:]
    for base in bases:
        folder = tmp_path / base.name
        check_training(alone / base.name, folder)
        check_adapter(base, folder)
        pieces = json.loads((folder / "pieces.json").read_text())
        assert set(pieces) == {kind != "ddp"}
