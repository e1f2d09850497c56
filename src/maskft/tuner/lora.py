"""LoRA on the layers that masks would be put on, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model


def attach_lora(model: Any, rank: int, modules: Sequence[str], parameters: Sequence[str] = ()) -> PeftModel:
    """Wrap `model` with a new LoRA adapter in fp32; its own weights are frozen.

    Args:
        model: any model.
        rank: of the two factors.
        modules: names of linear layers.
        parameters: names of parameters that are no linear layer's weight.
    """
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(modules), target_parameters=list(parameters) or None
    )
    return get_peft_model(model, config)
