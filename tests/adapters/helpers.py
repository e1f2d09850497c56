"""Small saved adapters of `tiny_llama`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskft.tuner import MaskLayer, attach_saved
from tests.tuner.models import masked, tiny_llama

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ONE = "base_model.model.model.layers.0.self_attn.q_proj"
LAYERS = 14


def saved(folder: Path, *, seed: int = 1, base: int = 0, bits: bool = False, **fields: Any) -> Path:
    """A scattered adapter in a folder; a hard one as bits where that is asked for."""
    model = masked(tiny_llama(seed=base), seed=seed, **fields)
    generator = torch.Generator().manual_seed(seed)
    for name, scores in model.named_parameters():
        if "mask_left" in name or "mask_right" in name:
            scores.data.normal_(generator=generator)
    if bits:
        model.peft_config["default"].storage = "bits"
        model.requires_grad_(False)
    model.save_pretrained(folder)
    return folder


def gates(folder: Path, base: int = 0) -> dict[str, Tensor]:
    """m of every layer of a saved adapter, as the tuner makes it."""
    model = attach_saved(tiny_llama(seed=base), folder)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MaskLayer):
            weight, mask = layer.pretrained_matrix(), layer.mask("default")
            found[name] = mask.gate.value(mask.offset(weight), weight)
    return found


def loaded(folder: Path, base: int = 0) -> nn.Module:
    return attach_saved(tiny_llama(seed=base), folder).eval()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """The adapter's configuration, with changes written to it where there are any."""
    content = {**json.loads((folder / CONFIG).read_text()), **changes}
    if changes:
        (folder / CONFIG).write_text(json.dumps(content))
    return content


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    content = load_file(folder / WEIGHTS)
    change(content)
    save_file(content, folder / WEIGHTS)
