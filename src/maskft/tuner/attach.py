"""Putting masks on a model and taking them from disk, for the rooms above, which don't import peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

from maskft.errors import AdapterError, ModelError, UserError
from maskft.tuner.config import MaskConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def attach(model: Any, config: MaskConfig) -> PeftModel:
    """Wrap `model` with a new mask adapter; its own weights are frozen and untouched.

    Raises:
        ModelError: the targets match nothing that can be masked.
    """
    try:
        return get_peft_model(model, config)
    except UserError:
        raise
    except ValueError as error:  # PEFT's own complaints about targets
        raise ModelError(f"cannot put masks on {type(model).__name__}: {error}") from error


def attach_saved(model: Any, folder: Path) -> PeftModel:
    """Wrap `model` with the mask adapter saved in `folder`, frozen.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of another method, or it does not fit the model.
    """
    read_settings(folder)
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=False)
    except SafetensorError as error:
        raise unreadable(folder / WEIGHTS, error) from error


def add_saved(model: PeftModel, folder: Path, name: str) -> None:
    """Load one more saved mask adapter, frozen and not active, beside those that `model` has.

    Raises:
        AdapterError: as `attach_saved`.
    """
    read_settings(folder)
    try:
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    except SafetensorError as error:
        raise unreadable(folder / WEIGHTS, error) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of a mask adapter's configuration file.

    Raises:
        AdapterError: a file is missing or is no JSON object, or the adapter is of another method.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no adapter: {name} is missing. Give the folder of a finished run.")
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        method = settings.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG} is not a JSON object: {error}") from error
    if method != "MASK":
        raise AdapterError(f"{folder} holds an adapter of method {method}, not MASK.")
    return settings


def unreadable(path: Path, error: SafetensorError) -> AdapterError:
    """The error for a damaged file of tensors."""
    return AdapterError(f"{path} cannot be read: {error}. The file is damaged; save it again.")
