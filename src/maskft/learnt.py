"""What a run learnt: the file it is in, how it is written, put on a base and taken off again.

adapter_model.safetensors    an adapter (mask, lora, unilora, hira), beside adapter_config.json
projector.safetensors        the projector, in bf16
trained_weights.safetensors  the weights that full fine-tuning trained, by their names in the base and in its dtype
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskft.errors import AdapterError, gathered
from maskft.methods import FullMethod, MaskMethod, Method, ProjectorMethod, is_fixed
from maskft.tuner import attach_adapter, take_off
from maskft.tuner.sharding import is_first_process, is_sharded, whole
from maskft.whole import find_projector

ADAPTER = "adapter_model.safetensors"
PROJECTOR = "projector.safetensors"
TRAINED = "trained_weights.safetensors"


def result_name(method: Method) -> str:
    """Name of the file that a run of this method ends with."""
    if isinstance(method, ProjectorMethod):
        return PROJECTOR
    return TRAINED if isinstance(method, FullMethod) else ADAPTER


def put_on(model: Any, folder: Path, learnt: str) -> tuple[Any, Mapping[str, Tensor] | None]:
    """The base with what a run learnt, and what it had in those places; None for an adapter, which leaves it there.

    Args:
        model: the bare base; changed in place where the run trained its own weights.
        folder: of the run, or of a saved adapter.
        learnt: the file's name, as `result_name` gives it.

    Raises:
        AdapterError: it is damaged, or does not fit the base.
    """
    if learnt == ADAPTER:
        return attach_adapter(model, folder).eval(), None
    return model, exchange(_home(model, learnt), _read(model, folder / learnt))


@contextlib.contextmanager
def worn(model: Any, folder: Path, learnt: str) -> Iterator[Any]:
    """The base with what a run learnt, for the duration of the block; afterwards it is bare again. As `put_on`."""
    wearing, before = put_on(model, folder, learnt)
    try:
        yield wearing
    finally:
        if before is None:
            take_off(wearing)
        else:
            exchange(_home(model, learnt), before)


@contextlib.contextmanager
def before_training(model: Any, before: Mapping[str, Tensor] | None, learnt: str) -> Iterator[Any]:
    """What `put_on` returned, as it was before training, for the duration of the block."""
    if before is None:
        with model.disable_adapter():
            yield model
        return
    home = _home(model, learnt)
    tuned = exchange(home, before)
    try:
        yield model
    finally:
        exchange(home, tuned)


def exchange(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values over those of parameters and buffers of the same names; returns what was there."""
    own = module.state_dict()
    before = {name: own[name].clone() for name in tensors}
    overwrite(module, tensors)
    return before


def overwrite(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write values over those of parameters and buffers of the same names."""
    own = module.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def save_result(method: Method, model: Any, output: Path, *, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """Write what was learnt beside the recipe, through a file or folder of its own so that it is whole.

    Every process calls this, since what was trained may be in pieces; the first one writes.

    Args:
        method: how it was trained.
        model: the trainer's.
        output: the run's folder.
        dtype: of the base.
        say: for remarks.
    """
    home = find_projector(model) if isinstance(method, ProjectorMethod) else model
    parameters = dict(home.named_parameters(remove_duplicate=False))
    made = {p: _kept(whole(p)) for p in home.parameters() if p.requires_grad}
    state = {name: made[p] for name, p in parameters.items() if p in made}
    if not is_first_process():
        return
    learnt = result_name(method)
    if learnt != ADAPTER:
        buffers = {name: tensor for name, tensor in home.state_dict().items() if name not in parameters}
        kept = {**buffers, **state} if learnt == PROJECTOR else state
        saved = torch.bfloat16 if learnt == PROJECTOR else dtype
        once = {id(tensor): name for name, tensor in reversed(kept.items())}  # tied weights by their first name
        part = output / f"{learnt}.part"
        save_file({name: kept[name].to(saved).contiguous() for name in reversed(once.values())}, part)
        part.replace(output / learnt)
        return
    staging = output / ".adapter"
    shutil.rmtree(staging, ignore_errors=True)
    packed = isinstance(method, MaskMethod) and method.storage == "bits"
    if packed and any(map(is_sharded, parameters.values())):
        say(
            f"scores are saved in full, since a mask needs whole weights. Next: maskft pack {output} NEW --storage bits"
        )
    else:
        model.requires_grad_(False)  # training is over: scores are written as method.storage says
    model.save_pretrained(staging, **({} if is_fixed(method) else {"state_dict": state}))
    for name in ("adapter_config.json", ADAPTER):  # the weights last: they mark a finished run
        (staging / name).replace(output / name)
    shutil.rmtree(staging)


def _home(model: Any, learnt: str) -> Any:
    return find_projector(model) if learnt == PROJECTOR else model


def _read(model: Any, file: Path) -> dict[str, Tensor]:
    """Tensors of a file, each of which has its place in the model."""
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} does not fit the base: it cannot be read ({error}). Train again.") from error
    own = _home(model, file.name).state_dict()
    problems = [f"not in the model: {name}" for name in tensors if name not in own]
    if file.name == PROJECTOR:
        problems += [f"missing: {name}" for name in own if name not in tensors]
    for name, tensor in tensors.items():
        if name in own and tensor.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise AdapterError(f"{file} does not fit the base:\n{gathered(problems)}")
    return tensors


def _kept(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in the process that writes; in others nothing, since they share the machine's memory."""
    return tensor.cpu() if is_first_process() else tensor.new_empty(0)
