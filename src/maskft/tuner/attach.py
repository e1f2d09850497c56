"""Putting masks on a model and taking them from disk, for the rooms above, which don't import peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open

from maskft.errors import AdapterError, ModelError, UserError
from maskft.tuner.config import MaskConfig
from maskft.tuner.formats import keep_from_repacking
from maskft.tuner.peers import Peer
from maskft.tuner.settings import CONFIG, WEIGHTS, read_settings


def attach(model: Any, adapter: MaskConfig | Peer, *, whole: Sequence[str] = ()) -> PeftModel:
    """Wrap `model` with a new adapter; its own weights are frozen and untouched.

    Args:
        model: the base.
        adapter: a mask's configuration, or another method's settings.
        whole: names of modules that are trained whole beside the adapter, on copies in fp32.

    Raises:
        ModelError: the targets match nothing that can be adapted; what lies in `whole` does not count.
    """
    masks = isinstance(adapter, MaskConfig)
    config: Any = adapter if isinstance(adapter, MaskConfig) else adapter.config(model)
    config.modules_to_save = list(whole) or config.modules_to_save
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # PEFT finds the right one by itself
            wrapped = get_peft_model(model, config)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # PEFT's own complaints about targets
        what = "masks" if masks else config.peft_type.value
        raise ModelError(f"cannot put {what} on {type(model).__name__}: {error}") from error
    if not masks:  # which see to it by themselves, wherever they are put on
        keep_from_repacking(wrapped)
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    return wrapped


def attach_saved(model: Any, folder: Path) -> PeftModel:
    """Wrap `model` with the mask adapter saved in `folder`, frozen.

    Raises:
        AdapterError: a file is missing or broken, the adapter is of another method, or it does not fit the model.
    """
    with _checked(folder, model):
        return PeftModel.from_pretrained(model, folder, is_trainable=False)


def add_saved(model: PeftModel, folder: Path, name: str) -> None:
    """Load one more saved mask adapter, frozen and not active, beside those that `model` has.

    Raises:
        AdapterError: as `attach_saved`.
    """
    with _checked(folder, model.get_base_model()):
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)


@contextmanager
def _checked(folder: Path, model: Any) -> Iterator[None]:
    """Check a saved adapter, and refuse with words what does not fit while it is loaded inside."""
    settings = read_settings(folder)
    with refused_with_words(folder, model):
        if settings.get("score_layout") == "low-rank":
            _refuse_other_ranks(folder, settings)
        yield


@contextmanager
def refused_with_words(folder: Path, model: Any) -> Iterator[None]:
    """Inside, what PEFT and torch say of a saved adapter's files and tensors that don't fit is an AdapterError."""
    try:
        yield
    except SafetensorError as error:
        raise unreadable(folder / WEIGHTS, error) from error
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder} cannot be put on {type(model).__name__}: {error}") from error


def _refuse_other_ranks(folder: Path, settings: dict[str, Any]) -> None:
    """Raise AdapterError where low-rank scores are not of the configuration's rank, before any of that are made."""
    rank = settings.get("rank", MaskConfig.rank)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if ".mask_left" in name]  # noqa: SIM118
    if not shapes or any(shape[-1:] != [rank] for shape in shapes):
        raise AdapterError(f"{folder / CONFIG} says that scores have the rank {rank}, and {WEIGHTS} holds others.")


def unreadable(path: Path, error: SafetensorError) -> AdapterError:
    """The error for a damaged file of tensors."""
    return AdapterError(f"{path} cannot be read: {error}. The file is damaged; save it again.")
