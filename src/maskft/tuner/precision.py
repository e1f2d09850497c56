"""Scores keep their dtype on quantised bases, whose adapters TRL's trainers cast to bf16.

bf16 has 8 significant bits, and an optimizer's steps on a score are soon smaller than that. TRL casts adapters while a
trainer is built. `MaskModel` undoes it at the next chance: when the model is set to training or evaluation, moved, or
given the scores of a checkpoint, all of which come before the first step. Scores at the start are zeros, which bf16
keeps; other scores have been rounded once by then, unless the trainer was built inside `kept_scores`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.integrations import is_fsdp_enabled

from maskft.tuner.layer import MaskLayer


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes quantised the model, as TRL finds out."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def restore_score_dtype(model: nn.Module, adapter_name: str, dtype: torch.dtype) -> None:
    """Cast an adapter's scores back to their dtype, if the base is quantised.

    FSDP and DeepSpeed choose the dtype of what they take to pieces, and are left to it.
    """
    if not is_quantized(model) or is_fsdp_enabled() or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return
    for module in model.modules():
        if isinstance(module, MaskLayer) and adapter_name in module.mask_layout:
            for parameter in module.parameters_of(adapter_name):
                if parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)


@contextmanager
def kept_scores(model: nn.Module) -> Iterator[None]:
    """Scores, and all else that is trained, are what they were before after the block, bit for bit.

    Build a TRL trainer inside it to go on from scores that have been trained already.
    """
    scores = [
        (parameter, parameter.data)
        for module in model.modules()
        if isinstance(module, MaskLayer)
        for name in module.mask_layout
        for parameter in module.parameters_of(name)
    ]
    scores += [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, values in scores:
        if parameter.dtype != values.dtype:
            parameter.data = values
