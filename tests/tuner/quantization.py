"""A small quantised language model, and what tests ask of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

from maskft.tuner.quantized import QuantizedLinear

from .models import tiny_llama

FOUR_BITS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
}
KINDS = (*FOUR_BITS, "int8", "int8-torchao", "int8-groups", "int4-torchao")
BACKENDS = {"int8": ("bnb 8bit", "Linear8bitLt"), **dict.fromkeys(FOUR_BITS, ("bnb 4bit", "Linear4bit"))}


def save_base(folder: Path) -> Path:
    """A Llama whose weights are exact in bf16 and whose logits don't multiply small errors."""
    model = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.1, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> LlamaForCausalLM:
    """The checkpoint quantised in one of KINDS, computing in `dtype`."""
    if kind in ("int8-groups", "int4-torchao"):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        groups = PerGroup(32)
        config = (
            Int8WeightOnlyConfig(granularity=groups, set_inductor_config=False)
            if kind == "int8-groups"
            else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
        )
        quantize_(model.model, config)
        return model
    if kind == "int8-torchao":
        config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **{**FOUR_BITS[kind], **fields})
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def packed_hash(model: nn.Module) -> str:
    """Over the bytes of every tensor of the base, scales included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".mask_scores." not in name and isinstance(tensor, Tensor):
            parts = [getattr(tensor, part) for part in ("qdata", "scale")] if hasattr(tensor, "qdata") else [tensor]
            digest.update(name.replace("base_model.model.", "").replace("base_layer.", "").encode())
            for part in parts:
                digest.update(part.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merge_quietly(model: PeftModel, **arguments: Any) -> None:
    with pytest.warns(UserWarning, match="Merging a mask into a quantised weight .* rounds the result"):
        model.merge_adapter(**arguments)
