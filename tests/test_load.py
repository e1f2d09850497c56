"""Bases that are quantised while they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import maskft.vlm.load
from maskft.errors import MissingExtraError, ModelError, RecipeError
from maskft.methods import LoraMethod
from maskft.recipe import load_recipe
from maskft.tuner import attach
from maskft.vlm.load import load_model

from .tuner.models import batch, tiny_llava

QUANTIZED = {"nf4": "Params4bit", "fp4": "Params4bit", "int8": "Int8Params", "int8-torchao": "Int8Tensor"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llava().save_pretrained(folder)
    return folder


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m.weight).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_language_model_is_quantised_and_nothing_else(folder: Path, quantization: str, dtype: str) -> None:
    model = load_model(str(folder), dtype=dtype, quantization=quantization)
    plain = load_model(str(folder), dtype=dtype)
    found = kinds(model)
    expected = {
        name: QUANTIZED[quantization] if ".layers." in name and "language" in name else "Parameter" for name in found
    }
    assert found == expected
    assert list(found.values()).count(QUANTIZED[quantization]) == 14
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == getattr(torch, dtype)
    assert model.num_parameters() == plain.num_parameters()
    if quantization in ("nf4", "fp4"):
        assert {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")} == {getattr(torch, dtype)}
    assert torch.isfinite(model.train()(**batch(model)).logits).all()


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_an_evaluation_leaves_weights_as_training_reads_them(folder: Path, quantization: str) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, and computes no gradient from then on."""
    base = load_model(str(folder), dtype="bfloat16", quantization=quantization)
    model = attach(base, LoraMethod(name="lora").peer())
    weights = {name: p.data.clone() for name, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    with torch.no_grad():
        expected = model.train()(**batch(model)).logits
        found = model.eval()(**batch(model)).logits
    assert torch.equal(found, expected)
    assert all(torch.equal(model.get_parameter(name).data, weight) for name, weight in weights.items())


def test_none_is_the_default(folder: Path) -> None:
    assert set(kinds(load_model(str(folder), dtype="float32")).values()) == {"Parameter"}


def test_a_base_that_is_quantised_already(folder: Path, tmp_path: Path) -> None:
    load_model(str(folder), dtype="float32", quantization="nf4").save_pretrained(tmp_path)
    assert "Params4bit" in kinds(load_model(str(tmp_path), dtype="float32")).values()
    with pytest.raises(ModelError, match=r"is quantised already\. Set model.quantization to none"):
        load_model(str(tmp_path), dtype="float32", quantization="nf4")


@pytest.mark.parametrize(("quantization", "package"), [("nf4", "bitsandbytes"), ("int8-torchao", "torchao")])
def test_missing_package(folder: Path, quantization: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maskft.vlm.load, "find_spec", lambda name: None)
    message = rf"model.quantization '{quantization}' needs the package '{package}', .* pip install 'maskft\[quant\]'"
    with pytest.raises(MissingExtraError, match=message):
        load_model(str(folder), dtype="float32", quantization=quantization)


def test_a_model_of_text_alone(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="as an image-text-to-text model"):
        load_model(str(tmp_path), dtype="float32", quantization="nf4")


def test_no_language_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maskft.vlm.load, "find_weights", lambda model: [])
    with pytest.raises(ModelError, match="has no language model that is known here"):
        load_model(str(folder), dtype="float32", quantization="nf4")


class TestRecipe:
    RECIPES = Path(__file__).parents[1] / "recipes"

    def test_shipped(self) -> None:
        recipe = load_recipe(self.RECIPES / "quickstart-nf4.yaml")
        assert recipe.model.quantization == "nf4"

    def test_unknown_value(self) -> None:
        with pytest.raises(RecipeError, match=r"'model.quantization' is 'int3'"):
            load_recipe(self.RECIPES / "quickstart.yaml", ["model.quantization=int3"])

    @pytest.mark.parametrize("method", ["projector", "full", "hira", "unilora"])
    def test_is_for_masks_and_lora(self, method: str) -> None:
        with pytest.raises(RecipeError, match=r"model\.quantization is 'nf4', which is for the methods mask and lora"):
            load_recipe(self.RECIPES / "stage1-projector.yaml", ["model.quantization=nf4", f"method.name={method}"])
