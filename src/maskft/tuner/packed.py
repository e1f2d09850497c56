"""Adapters in few bits: what `save_pretrained` writes for `MaskConfig.storage`, and the way back.

Only dense scores are packed; the other layouts are small. Scores that can still be trained are never packed, since
training cannot go on from rounded ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskft.errors import AdapterError
from maskft.linear import Mask
from maskft.packing import PARTS, Parts, pack_bits, pack_integers, packed_shape, unpack
from maskft.scores import Dense
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer

FAR = 1e30
"""An offset beyond every start and threshold, finite in fp32 and bf16."""
State = dict[str, Tensor]
_OFFSETS = {"topk": (FAR, 0.0), "threshold": (0.0, -FAR)}
"""Offsets of kept and of cut entries, by the gate that makes the mask of them again."""


def pack_offsets(offset: Tensor, storage: str) -> Parts:
    """Parts of dense scores (..., out, in) as "int8" or "int4".

    Raises:
        AdapterError: a score is not finite.
    """
    return pack_integers(offset, {"int8": 8, "int4": 4}[storage])


def pack_mask(mask: Mask, weight: Tensor) -> Parts:
    """Parts of a hard mask as bits; `weight` is the frozen weight (..., out, in).

    Raises:
        AdapterError: a score is not finite.
    """
    with torch.no_grad():
        offset = mask.offset(weight)
        if not torch.isfinite(offset).all():
            raise AdapterError("has values that are not finite")
        return pack_bits(mask.gate.value(offset, weight) > 0)


def mask_offsets(kept: Tensor, gate: str) -> Tensor:
    """Offsets in fp32 of which the gate of that name makes the hard mask `kept`.

    Raises:
        AdapterError: it makes none.
    """
    if gate not in _OFFSETS:
        raise AdapterError(f"holds a hard mask, and the gate is '{gate}'")
    far_kept, far_cut = _OFFSETS[gate]
    return torch.full(kept.shape, far_cut, device=kept.device).masked_fill_(kept, far_kept)


def split_part(name: str) -> tuple[str, str | None]:
    """("x.mask_scores", "int4") of "x.mask_scores.int4"; the second is None for a tensor that is no part."""
    score, _, part = name.rpartition(".")
    return (score, part) if score.endswith("mask_scores") and part in PARTS else (name, None)


def packed_state(model: nn.Module, config: MaskConfig, adapter_name: str, state: State) -> State:
    """`state`, an adapter's part of the state dict, with dense scores as `config.storage` asks for.

    Raises:
        AdapterError: a score is not finite.
    """
    layers = {f"{name}.mask_scores.{adapter_name}": layer for name, layer in _dense_layers(model, adapter_name).items()}
    trained = any(p.requires_grad for layer in layers.values() for p in layer.parameters_of(adapter_name))
    if config.storage == "float32" or trained:
        return state
    packed = {name: tensor for name, tensor in state.items() if name not in layers}
    for name, layer in layers.items():
        if name not in state:
            continue
        try:
            if config.storage == "bits":
                weight = layer.pretrained_matrix()
                parts = pack_mask(Mask(layer.mask(adapter_name).gate, (state[name].to(weight.device),)), weight)
            else:
                parts = pack_offsets(state[name], config.storage)
        except AdapterError as error:
            raise AdapterError(f"the adapter cannot be saved: {name} {error}.") from error
        packed.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    return packed


def unpacked_state(
    config: MaskConfig, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]
) -> tuple[State, dict[str, str]]:
    """A saved state with packed scores as fp32 offsets, whatever the configuration says of storage.

    Args:
        config: the adapter's.
        state: tensors as saved.
        expected: shapes of the model's scores by saved name.

    Returns:
        The tensors, and what is wrong with each score that could not be unpacked.
    """
    plain: State = {}
    packed: dict[str, Parts] = {}
    for name, tensor in state.items():
        score, part = split_part(name)
        if part is None:
            plain[name] = tensor
        else:
            packed.setdefault(score, {})[part] = tensor
    flaws = {name: "is there both packed and in full" for name in packed if name in plain}
    for name, parts in packed.items():
        try:
            shape = packed_shape(parts)
            if name not in expected:
                flaws[name] = "is not in the model"
            elif shape != expected[name]:
                flaws[name] = f"has shape {tuple(shape)}, the model's weight {tuple(expected[name])}"
            elif name not in flaws:
                found = unpack(parts)
                offset = mask_offsets(found, config.gate) if found.dtype == torch.bool else found
                plain[name] = offset.to(config.torch_dtype())
        except AdapterError as error:
            flaws[name] = str(error)
    if packed and not config.inference_mode:
        warnings.warn(
            "this adapter was saved packed, so its scores are rounded and training cannot go on from them as it would "
            "have; resume from scores in full.",
            stacklevel=2,
        )
    return plain, flaws


def await_scores(model: nn.Module, adapter_name: str) -> None:
    """Let layers refuse to run until the dense scores of a packed adapter have been loaded.

    Transformers' own `load_adapter` reads files without asking PEFT. It would leave packed scores out with no more
    than a line in its log, and the model would answer as its base.
    """
    for layer in _dense_layers(model, adapter_name).values():
        with torch.no_grad():
            layer.mask_scores[adapter_name].fill_(torch.nan)
        layer.awaited[adapter_name] = layer.register_forward_pre_hook(partial(_refuse_unloaded, adapter_name))


def scores_arrived(model: nn.Module, adapter_name: str) -> None:
    """End of `await_scores`."""
    for layer in _dense_layers(model, adapter_name).values():
        if adapter_name in layer.awaited:
            layer.awaited.pop(adapter_name).remove()


def _refuse_unloaded(adapter_name: str, layer: Any, args: object) -> None:
    if adapter_name in layer.mask_scores and torch.isnan(layer.mask_scores[adapter_name].flatten()[0]):
        raise AdapterError(
            f"the scores of the adapter '{adapter_name}' have not been loaded: Transformers cannot read packed "
            "adapters by itself. Load it with PeftModel.from_pretrained, or write it in full first with: "
            "maskft pack ADAPTER OUT --storage float32"
        )
    layer.awaited.pop(adapter_name).remove()


def _dense_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MaskLayer) and isinstance(module.mask_layout.get(adapter_name), Dense)
    }
