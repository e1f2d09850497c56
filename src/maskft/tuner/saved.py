"""Saved adapters of the methods a recipe knows: putting them on a base, taking them off, merging them into it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn

from maskft.errors import AdapterError, gathered
from maskft.tuner.attach import attach_saved, refused_with_words
from maskft.tuner.formats import format_of
from maskft.tuner.patterns import flaw_of
from maskft.tuner.quantized import dense_linear, merge_in_full_precision
from maskft.tuner.settings import CONFIG, MAX_BYTES, WEIGHTS

PEERS = ("LORA", "UNILORA", "HIRA")


def method_of(folder: Path) -> str:
    """PEFT's name of the method of a saved adapter.

    Raises:
        AdapterError: a file is missing, or the configuration is no JSON object.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no adapter: {name} is missing. Give the folder of a finished run.")
    return str(_settings(folder).get("peft_type"))


def attach_adapter(model: Any, folder: Path) -> PeftModel:
    """Wrap `model` with the adapter saved in `folder`, frozen: a mask, LoRA, Uni-LoRA or HiRA.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of another method, or it does not fit the model.
    """
    method = method_of(folder)
    if method not in PEERS:
        return attach_saved(model, folder)
    if isinstance(pattern := _settings(folder).get("target_modules"), str) and (flaw := flaw_of(pattern)):
        raise AdapterError(f"{folder / CONFIG} cannot be used: target_modules {flaw}.")
    with refused_with_words(folder, model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # named below
        attached = PeftModel.from_pretrained(model, folder, is_trainable=False)
    _check_tensors(attached, folder / WEIGHTS)
    return attached


def take_off(wrapped: PeftModel) -> nn.Module:
    """The base as it was before the adapter was put on, modules that were trained whole included."""
    bare: Any = wrapped.get_base_model()
    for name, module in _whole_modules(bare).items():
        bare.set_submodule(name, module.original_module)
    wrapped.unload()
    base: nn.Module = bare
    return base


def merge_adapter(model: PeftModel) -> nn.Module:
    """The bare model with its active adapter merged, and quantised linear layers made plain ones.

    As `maskft.tuner.merge_in_full_precision`, for other methods' adapters too.

    Raises:
        ModelError: a layer is quantised in a way that gives no full weight.
        ValueError: a merged weight is not finite.
    """
    bare: Any = model.get_base_model()
    dtype = bare.dtype
    for name, layer in list(bare.named_modules()):
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else None
        if base is not None and (kept := format_of(base)):
            weight = _with_lora(layer, kept.unpack(kept.read(base, exact=False)).float())
            if not torch.isfinite(weight).all():
                raise ValueError(f"the merged weight of {name} is not finite.")
            bare.set_submodule(name, dense_linear(weight, base, dtype))
    for name, module in _whole_modules(bare).items():
        bare.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    return merge_in_full_precision(model, safe_merge=True)


def _whole_modules(bare: nn.Module) -> dict[str, Any]:
    """Modules that are trained whole, by name. PEFT's unloading takes them for layers with a weight of their own in
    some methods (Uni-LoRA, HiRA), so they are put in place before."""
    return {name: module for name, module in bare.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _with_lora(layer: Any, weight: Tensor) -> Tensor:
    """A weight in fp32 with the factors of the active LoRA or DoRA adapter."""
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        factors = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
        changed = weight + layer.scaling[name] * factors
        if name in layer.lora_magnitude_vector:  # DoRA: rows of a learnt length
            lengths = torch.linalg.vector_norm(changed, dim=1)
            changed = changed * (layer.lora_magnitude_vector[name].weight.float() / lengths)[:, None]
        weight = changed
    return weight.detach()


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if file.stat().st_size > MAX_BYTES:
        raise AdapterError(f"{file} has more than {MAX_BYTES:,} bytes, which no adapter's configuration needs.")
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        settings.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{file} is not a JSON object: {error}") from error
    return settings


def _check_tensors(attached: PeftModel, file: Path) -> None:
    """Raise AdapterError where the file has not exactly what the adapter needs, or values that are not finite."""
    expected = get_peft_model_state_dict(attached)
    with safe_open(file, framework="pt") as saved:
        there = set(saved.keys())
    problems = [f"missing: {name}" for name in expected if name not in there]
    problems += [f"not in the model: {name}" for name in sorted(there - set(expected))]
    problems += [f"{n} has values that are not finite" for n, t in expected.items() if not torch.isfinite(t).all()]
    if problems:
        raise AdapterError(f"{file} does not fit this model:\n{gathered(problems)}")
