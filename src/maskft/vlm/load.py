"""Loading a base model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maskft.errors import ModelError
from maskft.vlm.embedded import embedded_base

_EMBEDDED = {"embedded": True, "embedded-unaligned": False}


def load_processor(base: str, *, trust_remote_code: bool = False) -> Any:
    """Load the processor (tokenizer, image processor, chat template) of a base; cheap beside its model.

    Raises:
        ModelError: there is no such base, or it has no chat template.
    """
    from transformers import AutoProcessor

    source = _source(base)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the processor of '{base}': {error}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"'{base}' has no image processor, so it is not a vision-language model.")
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"the processor of '{base}' has no chat template; add chat_template.jinja to its folder.")
    return processor


def load_model(base: str, *, dtype: str, attention: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load an image-text-to-text model in evaluation mode, its weights frozen.

    Args:
        base: "embedded", "embedded-unaligned", a folder, or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        attention: Transformers' attn_implementation; None leaves the choice to it.
        trust_remote_code: allow Python code from the model's folder to run.

    Raises:
        ModelError: there is no such model, or it isn't an image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    source = _source(base)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load '{base}' as an image-text-to-text model: {error}") from error
    return model.requires_grad_(False).eval()


def _source(base: str) -> str:
    """What Transformers loads for `base`: a folder that has been found, or a hub id."""
    if base in _EMBEDDED:
        return str(embedded_base(aligned=_EMBEDDED[base]))
    folder = Path(base).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if base.count("/") != 1 or base.startswith((".", "~", "/")) or folder.exists():
        raise ModelError(
            f"model.base is '{base}', but there is no model there: {folder / 'config.json'} is missing. Give a folder "
            f"written by save_pretrained, a hub id such as 'org/name', or one of {', '.join(_EMBEDDED)}."
        )
    return base
