"""The configuration file of a saved adapter, read as a stranger's: every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from maskft.errors import AdapterError, did_you_mean, gathered
from maskft.tuner.config import MaskConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
WHOLE = ("projector.safetensors", "trained_weights.safetensors")
"""What runs without an adapter end with."""
MAX_BYTES = 1 << 20
"""Of the configuration file."""


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of a mask adapter's configuration file.

    Raises:
        AdapterError: a file is missing or is no JSON object, the adapter is of another method, or has unknown keys or
            values of the wrong type.
    """
    for name in WHOLE:
        if (folder / name).is_file() and not (folder / WEIGHTS).is_file():
            raise AdapterError(f"{folder} holds weights that were trained whole ({name}), and no mask.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no adapter: {name} is missing. Give the folder of a finished run.")
    file = folder / CONFIG
    if file.stat().st_size > MAX_BYTES:
        raise AdapterError(f"{file} has more than {MAX_BYTES:,} bytes, which no adapter's configuration needs.")
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        method = settings.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{file} is not a JSON object: {error}") from error
    if method != "MASK":
        raise AdapterError(f"{folder} holds an adapter of method {str(method)[:40]}, not MASK.")
    problems = [problem for key, value in settings.items() if (problem := _problem(key, value))]
    if problems:
        raise AdapterError(f"{file} cannot be used:\n{gathered(problems)}")
    return settings


def _problem(key: str, value: Any) -> str | None:
    types = _types()
    if key not in types:
        return (
            f"'{key[:40]}' is no key of a mask adapter.{did_you_mean(key[:40], types)} Was it saved by a newer version?"
        )
    try:
        types[key].validate_json(json.dumps(value))
    except (ValidationError, RecursionError):
        return f"{key} is a value of the wrong type: {str(value)[:40]!r}."
    return None


@functools.cache
def _types() -> dict[str, TypeAdapter[Any]]:
    """What checks a value, by key."""
    hints = get_type_hints(MaskConfig)
    strict = ConfigDict(strict=True)
    return {field.name: TypeAdapter(hints[field.name], config=strict) for field in dataclasses.fields(MaskConfig)}
