"""Statistics of a sample of gates: as of all gates, at the steps that were asked for, and kept over a resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from maskft import MaskConfig
from maskft.analysis import attached_masks, statistics
from maskft.mask_stats import SAMPLED, MaskStatistics, Sample
from maskft.runs import write_json

from .tuner.models import batch, masked, tiny_llama

CASES: dict[str, dict] = {
    "soft": {"gate": "soft"},
    "normalized low-rank": {"gate": "normalized", "score_layout": "low-rank", "rank": 2},
    "centered row": {"gate": "centered", "score_layout": "row"},
    "soft block": {"gate": "soft", "score_layout": "block", "block_size": 5},
    "threshold": {"gate": "threshold", "init_gate": 0.6},
    "topk": {"gate": "topk", "keep_ratio": 0.7},
}


@pytest.mark.parametrize("name", CASES)
def test_a_sample_tells_what_all_gates_do(name: str) -> None:
    model = masked(tiny_llama(), **CASES[name])
    sample = Sample(model, "default", model.peft_config["default"])
    found = sample.measures()
    assert len(sample.layers) == 14
    for i, (mask, size) in enumerate(zip(attached_masks(model), sample.sizes, strict=True)):
        whole = statistics(mask)
        assert size == whole.gates
        for measure, values in found.items():
            # a share or mean of 1024 draws; five standard deviations of it, and what a ranking adds
            room = 5 / math.sqrt(SAMPLED) * (0.5 if measure in ("moved", "saturated", "kept") else 0.6)
            assert values[i] == pytest.approx(getattr(whole, measure), abs=room), measure


def test_gates_that_are_all_alike_are_told_exactly() -> None:
    model = masked(tiny_llama(), gate="soft")
    for name, scores in model.named_parameters():
        if "mask_scores" in name:
            scores.data.fill_(-math.log(0.98 / 0.02))  # s0 + D = 0
    found = Sample(model, "default", model.peft_config["default"]).measures()
    assert found["mean"] == pytest.approx([0.5] * 14)
    assert found["distance"] == pytest.approx([0.48] * 14)
    assert found["change"] == pytest.approx([0.5] * 14)
    assert (set(found["moved"]), set(found["saturated"])) == ({1.0}, {0.0})


def test_a_ranking_over_all_matrices_keeps_its_share_of_all() -> None:
    model = masked(tiny_llama(), gate="topk", keep_ratio=0.6, ranking="global")
    sample = Sample(model, "default", model.peft_config["default"])
    kept = sample.measures()["kept"]
    share = sum(n * k for n, k in zip(sample.sizes, kept, strict=True)) / sum(sample.sizes)
    assert share == pytest.approx(0.6, abs=0.001)
    assert max(kept) > min(kept)
    whole = {mask.name: statistics(mask).kept for mask in attached_masks(model)}
    for name, value in zip(sample.layers, kept, strict=True):
        assert value == pytest.approx(whole[name], abs=0.1)


def train(model: nn.Module, folder: Path, watch: MaskStatistics, **arguments: Any) -> None:
    rows = {name: tensor[:1].expand(8, -1).tolist() for name, tensor in batch(model).items()}
    data = Dataset.from_dict({**rows, "labels": rows["input_ids"]})
    settings = {"max_steps": 5, "learning_rate": 0.5, "logging_steps": 2, "use_cpu": True, **arguments}
    training = TrainingArguments(output_dir=str(folder), report_to="none", save_strategy="no", **settings)
    trainer = Trainer(model, training, train_dataset=data, callbacks=[watch])
    watch.trackers = SimpleNamespace(
        callbacks=[*trainer.callback_handler.callbacks, SimpleNamespace(tb_writer=Writer())]
    )
    trainer.train()


class Writer:
    """TensorBoard's writer, as far as it is used."""

    seen: list[tuple[str, int]]

    def __init__(self) -> None:
        type(self).seen = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert math.isfinite(value)
        self.seen.append((name, step))

    def add_image(self, name: str, image: torch.Tensor, step: int) -> None:
        assert image.dtype == torch.uint8
        assert image.shape == (3, 7 * 8, 2 * 8)  # seven projections in two layers
        self.seen.append((name, step))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mask_stats.json"


def test_records(path: Path, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), MaskConfig())
    train(model, tmp_path / "out", MaskStatistics(path, write_json))
    content = json.loads(path.read_text())
    assert (content["sampled"], content["hard"], len(content["modules"])) == (1024, False, 14)
    assert content["gates"] == [layer.m.numel() for layer in attached_masks(model)]
    assert content["modules"][0] == "model.layers.0.self_attn.q_proj"
    records = content["records"]
    assert [record["step"] for record in records] == [0, 2, 4, 5]
    assert records[0]["overall"]["distance"] == records[0]["overall"]["moved"] == 0
    distances = [record["overall"]["distance"] for record in records]
    assert distances == sorted(distances)
    assert distances[-1] > 0.001
    assert len(records[-1]["modules"]["moved"]) == 14


def test_tensorboard_is_told(path: Path, tmp_path: Path) -> None:
    train(get_peft_model(tiny_llama(), MaskConfig()), tmp_path / "out", MaskStatistics(path, write_json), max_steps=1)
    assert ("mask/mean", 0) in Writer.seen
    assert ("mask/change", 1) in Writer.seen
    assert ("mask/distance from the start", 1) in Writer.seen


def test_a_resumed_run_goes_on_with_its_records(path: Path, tmp_path: Path) -> None:
    kept = {"step": 0, "overall": {"mean": 0.98}, "modules": {"mean": [0.98] * 14}}
    write_json(path, {"records": [kept, {**kept, "step": 3}, {**kept, "step": 9}]})
    watch = MaskStatistics(path, write_json)
    state = SimpleNamespace(global_step=4, logging_steps=1, max_steps=6, is_world_process_zero=True)
    watch.on_train_begin(None, state, None, model=get_peft_model(tiny_llama(), MaskConfig()))
    assert [record["step"] for record in watch.records] == [0, 3, 4]  # what came after the checkpoint is dropped
    assert watch.records[0] == kept
    watch.on_save(None, state, None)
    assert len(json.loads(path.read_text())["records"]) == 3


def test_a_file_that_cannot_be_read_is_written_anew(path: Path, tmp_path: Path) -> None:
    path.write_text("{")
    train(get_peft_model(tiny_llama(), MaskConfig()), tmp_path / "out", MaskStatistics(path, write_json), max_steps=1)
    assert [record["step"] for record in json.loads(path.read_text())["records"]] == [0, 1]


def test_a_long_run_keeps_a_bounded_number_of_records(path: Path) -> None:
    watch = MaskStatistics(path, write_json)
    state = SimpleNamespace(global_step=0, logging_steps=1, max_steps=640, is_world_process_zero=False)
    watch.on_train_begin(None, state, None, model=get_peft_model(tiny_llama(), MaskConfig(layers="0", modules="attn")))
    for step in range(1, 641):
        state.global_step = step
        watch.on_step_end(None, state, None)
    assert [record["step"] for record in watch.records] == list(range(0, 641, 10))


def test_a_model_without_masks_leaves_nothing(path: Path, tmp_path: Path) -> None:
    train(tiny_llama(), tmp_path / "out", MaskStatistics(path, write_json), max_steps=1)
    assert not path.exists()
