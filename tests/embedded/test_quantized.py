"""Twenty steps on the embedded base in few bits, merging what they learnt, and exporting it in full precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskft.adapters.export import export_merged
from maskft.data import Collator
from maskft.linear import masked_weight
from maskft.runs import LoadedRun, load_data, load_run
from maskft.trainer import labelled_loss
from maskft.training import train
from tests.tuner.quantization import layers, merge_quietly
from tests.tuner.test_quantized import rounding_bound

from .conftest import short_recipe


def trained(folder: Path, *overrides: str) -> LoadedRun:
    """A run of 20 steps of two questions, loaded again; the loss has fallen."""
    recipe = short_recipe(
        "training.max_steps=20",
        "training.per_device_train_batch_size=2",
        "training.learning_rate=0.05",
        "data.limits={train: 64, validation: 8, test: 8}",
        *overrides,
    )
    metrics = train(recipe, folder)["train"]
    assert metrics["base_parameters"] == 153_575_232  # as many as in bf16
    run = load_run(folder)
    rows = load_data(recipe)["train"]
    seen = Collator(run.processor, max_length=None)([rows[i] for i in range(16)])
    with torch.no_grad():
        tuned = labelled_loss(run.model, seen)
        with run.model.disable_adapter():
            base = labelled_loss(run.model, seen)
    assert tuned < 0.5 * base
    return run


def last_logits(model: torch.nn.Module, probe: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**probe, logits_to_keep=1).logits.float()[:, -1]
    return logits


def questions(run: LoadedRun) -> dict[str, Tensor]:
    rows = load_data(run.recipe)["test"]
    return Collator(run.processor, max_length=None).prompts([rows[0], rows[1]])


def check_merging(run: LoadedRun) -> dict[str, Tensor]:
    """Each merged weight is off by no more than its rounding bound, which is returned by name; unmerging is exact."""
    model, probe = run.model, questions(run)
    tuned = last_logits(model, probe)
    with model.disable_adapter():
        assert not torch.equal(last_logits(model, probe), tuned)
    merge_quietly(model)
    assert not torch.equal(last_logits(model, probe), tuned)
    bounds = {}
    for name, layer in layers(model).items():
        with torch.no_grad():
            weight = masked_weight(layer.pretrained_weight(), layer.masks(["default"])).float()
            bounds[name.removeprefix("base_model.model.")] = bound = rounding_bound(layer, weight)
            assert ((layer.get_base_weight() - weight).abs() <= bound).all()
    model.unmerge_adapter()
    assert torch.equal(last_logits(model, probe), tuned)
    return bounds


def test_a_few_layers_in_4_bits(tmp_path: Path) -> None:
    assert len(check_merging(trained(tmp_path / "run", "model.quantization=nf4", "method.layers=0-3"))) == 28


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8", "int8-torchao"])
def test_the_whole_language_model(quantization: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", f"model.quantization={quantization}")
    bounds = check_merging(run)
    probe = questions(run)
    tuned = last_logits(run.model, probe)
    merge_quietly(run.model)
    moved = (last_logits(run.model, probe) - tuned)[0].abs()
    run.model.unmerge_adapter()

    assert export_merged(run.model, run.processor, tmp_path / "merged", probe=probe).difference == 0
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()

    plain = run.model.get_base_model()
    weights = {name: plain.get_submodule(name).weight.requires_grad_(True) for name in bounds}
    for token in tuned[0].topk(2).indices.tolist():
        logit = plain(**probe, logits_to_keep=1).logits[0, -1, token].float()
        gradients = torch.autograd.grad(logit, list(weights.values()))
        allowed = sum((g.float().abs() * bounds[name]).sum() for name, g in zip(weights, gradients, strict=True))
        assert moved[token] <= allowed


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    steps = ("model.quantization=nf4", "method.layers=0-3", "training.save_strategy=steps", "training.save_steps=4")
    whole = tmp_path / "whole"
    train(short_recipe(*steps), whole)
    again = tmp_path / "again"
    train(short_recipe(*steps), again)
    for name in ("adapter_model.safetensors", "metrics.json"):
        (again / name).unlink()
    (again / "checkpoints" / "checkpoint-8" / "trainer_state.json").unlink()
    assert train(short_recipe(*steps), again)["train"]["resumed_from_step"] == 4
    assert (again / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
