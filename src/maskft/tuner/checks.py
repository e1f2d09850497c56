"""Whether an adapter belongs on a model: the base it was trained on, and parameters that other adapters wrap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskft.errors import AdapterError, ModelError
from maskft.tuner.base import base_fingerprint
from maskft.tuner.config import MaskConfig
from maskft.tuner.kinds import ParamWrapper
from maskft.tuner.layer import MaskLayer


def refuse_other_base(model: nn.Module, config: MaskConfig, adapter_name: str, scores: Mapping[str, Tensor]) -> None:
    """Raise AdapterError if scores that were trained on other weights than the model's are put on it.

    Scores at their start say nothing about a base, and fit any.
    """
    if config.base_fingerprint is None or not any(_has_moved(name, tensor) for name, tensor in scores.items()):
        return
    found = base_fingerprint(model, config, adapter_name)
    if found not in (None, config.base_fingerprint):
        raise AdapterError(
            f"this adapter was trained on another base: its masked weights have the fingerprint "
            f"{config.base_fingerprint[:12]}, the model's have {found[:12]}. Load the base named in its "
            f"adapter_config.json ({config.base_model_name_or_path}), quantised as it was then; to use it all the "
            "same, set base_fingerprint to null there."
        )


def check_when_run(model: nn.Module, adapter_name: str) -> None:
    """Let a model check an adapter's base and scores before it is run, unless `checked_on_loading` comes first.

    PEFT has adapters checked as they are loaded. Transformers' own `load_adapter` puts scores in place without asking.
    """
    checks = model.__dict__.setdefault("_mask_checks", {})
    checks[adapter_name] = model.register_forward_pre_hook(partial(_check, adapter_name))


def checked_on_loading(model: Any, adapter_name: str) -> None:
    """End of `check_when_run`; the model may be wrapped by PEFT."""
    handle = getattr(model, "_mask_checks", {}).pop(adapter_name, None)
    if handle is not None:
        handle.remove()


def _check(adapter_name: str, model: Any, args: object) -> None:
    layers = [m for m in model.modules() if isinstance(m, MaskLayer) and adapter_name in m.mask_layout]
    if torch.compiler.is_compiling() or any(adapter_name in layer.awaited for layer in layers):
        return  # another time; layers that await packed scores refuse to run themselves
    scores = {
        f"{number}.{name}": parameter
        for number, layer in enumerate(layers)
        for name, parameter in layer.named_scores(adapter_name)
    }
    if layers:
        refuse_other_base(model, model.peft_config[adapter_name], adapter_name, scores)
    if not all(torch.isfinite(tensor).all() for tensor in scores.values()):
        raise AdapterError(f"the adapter '{adapter_name}' has scores that are not finite. Its file is damaged.")
    checked_on_loading(model, adapter_name)


def _has_moved(name: str, tensor: Tensor) -> bool:
    """Whether a score gives offsets other than zero; the right factor of low-rank ones is random from the start."""
    return "mask_right" not in name and bool(tensor.any())


def refuse_other_parameters(model: nn.Module, wanted: Iterable[str]) -> None:
    """Raise ModelError if one module's parameters are wanted that differ from those other adapters have masked.

    Masked parameters of one module are layers inside each other, so that the names of scores depend on all of them.

    Args:
        model: that the adapter is for.
        wanted: its target_parameters, names as PEFT matches them.
    """
    masked: dict[int, set[str]] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            masked.setdefault(id(module.frozen()), set()).add(module.parameter_name)
    for name, module in model.named_modules():
        bare = name.replace(".base_layer", "")
        here = {p for p, _ in module.named_parameters(recurse=False) if f".{bare}.{p}".endswith(_suffixes(wanted))}
        if here and id(module) in masked and here != masked[id(module)]:
            raise ModelError(
                f"'{bare}' cannot be masked at {', '.join(sorted(here))}: another adapter masks "
                f"{', '.join(sorted(masked[id(module)]))} there. All adapters must target the same set of parameters "
                "of one module."
            )


def _suffixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)
