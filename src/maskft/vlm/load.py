"""Loading a base model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maskft.errors import ModelError
from maskft.vlm.embedded import embedded_base

_EMBEDDED = {"embedded": True, "embedded-unaligned": False}


def base_folder(base: str) -> str:
    """The folder or hub id that `base` stands for; composes the embedded base where it is asked for."""
    if base in _EMBEDDED:
        return str(embedded_base(aligned=_EMBEDDED[base]))
    return base


def load_base(base: str, *, dtype: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor.

    Args:
        base: "embedded", "embedded-unaligned", a folder, or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        trust_remote_code: allow Python code from the model's folder to run.

    Returns:
        (model, processor); the model in evaluation mode, its weights frozen.

    Raises:
        ModelError: there is no such model, it isn't an image-text-to-text model, or it has no chat template.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = base_folder(base)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_like_path and not (Path(source).expanduser() / "config.json").is_file():
        raise ModelError(
            f"model.base is '{base}', but there is no model there: {Path(source) / 'config.json'} is missing. Give a "
            f"folder written by save_pretrained, a hub id such as 'org/name', or one of {', '.join(_EMBEDDED)}."
        )
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load '{base}' as an image-text-to-text model: {error}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"the processor of '{base}' has no chat template; add chat_template.jinja to its folder.")
    model.requires_grad_(False)
    return model.eval(), processor
