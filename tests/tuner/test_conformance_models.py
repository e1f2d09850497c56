"""Behaviours of a PEFT method that need a whole language model, for models that keep their weights differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from maskft import MaskConfig
from maskft.tuner import MaskLayer

from .conformance import (
    GATES,
    IDENTITIES,
    LAYOUTS,
    Exemption,
    assert_gradients_close,
    masked_layers,
    run,
    run_exemption,
    scores_of,
)
from .models import batch, logits, loss, tiny_language_model, tiny_language_models

MODELS = list(tiny_language_models())


@dataclass(frozen=True)
class ModelCase:
    """One language model, all of whose layers are masked under one gate, with scores in one layout."""

    kind: str
    gate: str = "soft"
    layout: str = "dense"
    layers: int = 2

    def base(self) -> nn.Module:
        return tiny_language_model(self.kind, num_hidden_layers=self.layers)

    def config(self, **fields: Any) -> MaskConfig:
        named = {"task_type": "CAUSAL_LM", "init_weights": False, **GATES[self.gate], **LAYOUTS[self.layout]}
        return MaskConfig(**{**named, **fields})

    def model(self, base: nn.Module | None = None, **fields: Any) -> PeftModel:
        bare = self.base() if base is None else base
        torch.manual_seed(2)
        return get_peft_model(bare, self.config(**fields)).eval()


CASES = list(
    dict.fromkeys(
        [ModelCase(name) for name in MODELS]
        + [ModelCase("llama", gate) for gate in GATES]
        + [ModelCase("llama", layout=layout) for layout in LAYOUTS]
        + [ModelCase(name, "topk-global", "row") for name in ("gpt2", "mixtral")]
    )
)
"""Every model, gate and layout; all combinations of the layers themselves are in `test_conformance`."""
ALL_GATES = [ModelCase(name, gate) for name in MODELS for gate in GATES]


def starts_as_the_base(case: ModelCase) -> None:
    assert torch.equal(logits(case.model(init_weights=True)), logits(case.base()))


def is_the_model_that_merging_gives(case: ModelCase) -> None:
    model = case.model()
    inputs = {key: value for key, value in batch(model).items() if key != "attention_mask"}
    written = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected, tokens = logits(model), model.generate(**inputs, **written)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert torch.equal(merged.generate(**inputs, **written), tokens)
    assert not torch.equal(expected, logits(case.base()))


def takes_embeddings(case: ModelCase) -> None:
    model = case.model()
    inputs = batch(model)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        output = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(output, logits(model))


@contextmanager
def checkpointing(model: PeftModel, use_reentrant: bool) -> Iterator[None]:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    yield
    assert model.get_base_model().is_activation_checkpointing


def checkpoints_gradients(case: ModelCase) -> None:
    def gradients(model: PeftModel) -> list[Tensor]:
        loss(model.train()).backward()
        return [p.grad for p in scores_of(model).values()]

    expected = gradients(case.model())
    assert all(gradient.any() for gradient in expected)
    for use_reentrant in (True, False):
        model = case.model()
        with checkpointing(model, use_reentrant):
            assert_gradients_close(gradients(model), expected)


def masks_chosen_layers(case: ModelCase) -> None:
    def names(**fields: Any) -> list[str]:
        return [name for name, module in case.model(**fields).named_modules() if isinstance(module, MaskLayer)]

    chosen = [name for name in names() if ".1." in name]
    assert 0 < len(chosen) < len(names())
    assert names(layers="1") == names(layers_to_transform=[1]) == names(layers_to_transform=1) == chosen
    one = {"target_modules": ["c_attn", "o_proj"]}
    (layer,) = names(**one, layers_to_transform=[1])
    assert layer in chosen
    pattern = "h" if case.kind == "gpt2" else "layers"
    assert names(**one, layers_to_transform=[1], layers_pattern=pattern) == [layer]


def loads_by_the_auto_class(case: ModelCase) -> None:
    with TemporaryDirectory() as folder:
        case.base().save_pretrained(f"{folder}/base")
        base = type(case.base()).from_pretrained(f"{folder}/base")
        model = case.model(base)
        model.save_pretrained(f"{folder}/adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")
    assert model.peft_config["default"].base_model_name_or_path == f"{folder}/base"
    assert torch.equal(logits(loaded), logits(model))


def is_handled_by_transformers(case: ModelCase) -> None:
    """add_adapter, set_adapter, disable_adapters, enable_adapters, save_pretrained, load_adapter, delete_adapter."""
    model = case.base()
    base = logits(model)
    model.add_adapter(case.config(), "mine")
    model.add_adapter(case.config(), "other")
    model.set_adapter("mine")
    mine = logits(model.eval())
    assert model.active_adapters() == ["mine"]
    model.set_adapter(["mine", "other"])
    assert not torch.equal(logits(model), mine)
    model.set_adapter("mine")
    assert torch.equal(logits(model), mine)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), mine)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = case.base()
        loaded.load_adapter(folder, "again")
        assert torch.equal(logits(PeftModel.from_pretrained(case.base(), folder)), mine)
    assert torch.equal(logits(loaded), mine)
    model.delete_adapter(["other", "mine"])
    assert torch.equal(logits(model), base)


def converts_to_lora(case: ModelCase) -> None:
    model = case.model()
    config, state = convert_to_lora(model, rank=8)
    converted = get_peft_model(case.base(), config).eval()
    assert not set_peft_model_state_dict(converted, state).unexpected_keys
    for mask, lora in zip(masked_layers(model), lora_layers(converted), strict=True):
        delta, factored = mask.get_delta_weight("default"), lora.get_delta_weight("default")
        # the best approximation of rank 8 leaves out all but the 8 largest singular values
        left_out = torch.linalg.svdvals(delta)[8:].norm()
        torch.testing.assert_close((delta - factored).norm(), left_out, rtol=1e-3, atol=1e-4)


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def compiles_without_graph_breaks(case: ModelCase) -> None:
    model = case.model()
    inputs = batch(model)
    expected = model(**inputs).logits
    gradients = torch.autograd.grad(expected.square().mean(), list(scores_of(model).values()))
    torch.compiler.reset()
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    assert_gradients_close([p.grad for p in scores_of(model).values()], gradients)


BEHAVIOURS = {
    **dict.fromkeys(
        [
            is_the_model_that_merging_gives,
            takes_embeddings,
            checkpoints_gradients,
            masks_chosen_layers,
            loads_by_the_auto_class,
            is_handled_by_transformers,
            converts_to_lora,
        ],
        CASES,
    ),
    starts_as_the_base: ALL_GATES,
    compiles_without_graph_breaks: [ModelCase(name, layers=1) for name in ("llama", "mixtral")],  # takes seconds
}
EXEMPTIONS = [
    Exemption(
        "starts_as_the_base",
        lambda case: case.gate not in IDENTITIES,
        "The published soft gate starts at m0 < 1, hard masks by cutting weights.",
    ),
    Exemption(
        "converts_to_lora",
        lambda case: case.kind in ("qwen3-moe", "mixtral", "gpt-oss"),
        "PEFT converts linear layers alone, and experts are none.",
        raises=TypeError,
        match="do not support LoRA conversion",
    ),
]
each_model = pytest.mark.parametrize("kind", MODELS)


@each_model
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # by PEFT for LoRA on GPT-2
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # by PEFT for Transformers' add_adapter
def test_conformance(behaviour: Any, kind: str) -> None:
    run(behaviour, BEHAVIOURS[behaviour], EXEMPTIONS, kind)


@pytest.mark.parametrize("exemption", EXEMPTIONS, ids=lambda one: one.behaviour)
def test_exemptions_are_exact(exemption: Exemption) -> None:
    (behaviour,) = (one for one in BEHAVIOURS if one.__name__ == exemption.behaviour)
    assert run_exemption(behaviour, BEHAVIOURS[behaviour], exemption)
