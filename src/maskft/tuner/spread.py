"""Values for a masked model that was taken to pieces on the meta device, each process its share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from maskft.errors import ModelError, gathered
from maskft.fingerprint import fingerprint
from maskft.scores import LowRank
from maskft.tuner.base import BaseWeights, base_name
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import MaskLayer
from maskft.tuner.sharding import is_first_process


def spread(model: Any, shares: nn.Module, *, seed: int, device: torch.device) -> None:
    """Give weights and scores their values; every process must call this.

    Scores are those of a model that was masked whole, after `seed` was set: where they start random, every process
    draws each tensor whole, one after the other, and keeps its share.

    Args:
        model: after `fully_shard`, with or without masks, all on the meta device.
        shares: the same base, with this process's share of every weight; its weights become those of the model.
        seed: for scores that start random.
        device: to hold the shares on.

    Raises:
        ModelError: the shares are not those of this model.
    """
    held = {**shares.state_dict(), **dict(shares.named_buffers())}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = dict(_starts(model, parameters, seed, device))
    strays = []
    for name, parameter in parameters.items():
        if name in given:
            continue
        share: Any = held.get(_place(name))
        if not isinstance(share, DTensor) or share.shape != parameter.shape or _rows(share) != _rows(parameter):
            strays.append(name)
            continue
        copied = parameter.requires_grad  # beside a frozen original, where PEFT trains a copy of a module
        mine = share.to_local().detach().to(device=device, dtype=parameter.dtype, copy=copied)
        given[name] = _like(parameter, mine.view(_rows(parameter)))
    if strays:
        raise ModelError(f"the weights in pieces do not fit the model:\n{gathered(strays)}")
    model.load_state_dict(given, strict=False, assign=True)
    _fill_buffers(model, shares, held, device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # each name has been given a parameter of its own
    for module in shares.modules():  # some shares are held in a copy
        module._parameters.clear()
        module._buffers.clear()
    for name, config in getattr(model, "peft_config", {}).items():
        if isinstance(config, MaskConfig):
            remember_pieces(model, config, name)


def remember_pieces(model: nn.Module, config: MaskConfig, adapter_name: str) -> None:
    """Take the fingerprint of weights in pieces, joining one after the other; every process must call this.

    The first process keeps it, which is the one that saves.
    """
    weights = BaseWeights(model, adapter_name)
    if is_first_process():
        config.seen_fingerprint = fingerprint(weights)
        return
    for name in sorted(weights):  # the order in which `fingerprint` asks for them
        _ = weights[name]


def _starts(
    model: Any, parameters: dict[str, nn.Parameter], seed: int, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Scores by name, in the order in which they are made of a whole model."""
    layers = {base_name(name, m): (name, m) for name, m in model.named_modules() if isinstance(m, MaskLayer)}
    names = getattr(model, "peft_config", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for adapter, config in names.items():
            if not isinstance(config, MaskConfig):
                continue
            tuner = model.base_model
            for target in (*tuner.targeted_module_names, *tuner.targeted_parameter_names):
                place, layer = layers[target]
                yield from _layer_starts(place, layer, adapter, config, parameters, device)


def _layer_starts(
    place: str,
    layer: MaskLayer,
    adapter: str,
    config: MaskConfig,
    parameters: dict[str, nn.Parameter],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    layout, std = layer.mask_layout[adapter], config.start_std()
    names = [f"{place}.{kept}.{adapter}" for kept, _ in layer.named_scores(adapter)]
    if std == 0.0 and not isinstance(layout, LowRank):
        for name in names:
            mine = torch.zeros(_rows(parameters[name]), dtype=parameters[name].dtype, device=device)
            yield name, _like(parameters[name], mine)
        return
    drawn = layout.create(layer.matrix_shape(), std, device=torch.device("cpu"), dtype=config.torch_dtype())
    for name, whole in zip(names, drawn, strict=True):
        pieces: Any = parameters[name]
        cut = distribute_tensor(whole.to(device), pieces.device_mesh, pieces.placements, src_data_rank=None)
        yield name, _like(pieces, cut.to_local().to(pieces.dtype, copy=True))


def _rows(pieces: Any) -> torch.Size:
    """Shape of what this process holds; nothing has one shape."""
    held: Tensor = pieces.to_local()
    return held.shape if held.numel() else torch.Size([0, *pieces.shape[1:]])


def _like(parameter: Any, local: Tensor) -> Tensor:
    """A tensor in pieces as `parameter` is, of which this process holds `local`."""
    mesh, placements = parameter.device_mesh, parameter.placements
    pieces: Tensor = DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return pieces


def _fill_buffers(model: nn.Module, shares: nn.Module, held: dict[str, Any], device: torch.device) -> None:
    """Give buffers, and tensors that modules keep beside them, their values."""
    inner = dict(shares.named_modules())
    for module_name, module in model.named_modules():
        source = inner.get(_place(module_name))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = held[_place(f"{module_name}.{name}" if module_name else name)].to(device)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta and source is not None:
                setattr(module, name, getattr(source, name).to(device))


def _place(name: str) -> str:
    """A parameter's or module's place in the base model, also of PEFT's copies of modules that are trained whole."""
    return re.sub(r"\.base_layer|\.modules_to_save\.\w+|\.original_module", "", name.removeprefix("base_model.model."))
