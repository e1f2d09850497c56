"""Training with FSDP2 where no process can hold the model: it is taken to pieces on the meta device, each process
gets its share of the values, and checkpoints hold one share a process.

    checkpoints/checkpoint-N/values/*.safetensors    what is trained
    checkpoints/checkpoint-N/moments/*.safetensors   the optimizer's tensors
    checkpoints/checkpoint-N/progress.json           the optimizer's settings, and the learning rate's schedule

`torch.distributed.checkpoint` (DCP) has two formats. Its own keeps an index, `.metadata`, as a pickle; this one is
safetensors alone, and what DCP has to know stands in the header of each file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from maskft.errors import RunError
from maskft.methods import FullMethod, MaskMethod, Method, ProjectorMethod, is_fixed
from maskft.recipe import ModelSection
from maskft.tuner.sharding import is_first_process
from maskft.tuner.spread import spread
from maskft.vlm.load import load_model
from maskft.vlm.shares import load_shares, shares_are_read

VALUES = "values"
MOMENTS = "moments"
PROGRESS = "progress.json"
FILE_BYTES = 1 << 29
"""Of one process in one file of a checkpoint, about: a file is put together in memory."""


class ShardedTrainer:
    """Goes before a Trainer among the bases of a class; without FSDP2 it changes nothing.

    Attributes:
        shares: of the base, where the model has no values yet; see `maskft.vlm.shares.load_shares`.
    """

    shares: nn.Module | None = None
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    _order: list[list[Tensor]] | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, after the model has been taken to pieces and given its values."""
        if self.shares is not None:
            take_to_pieces(self.accelerator, self.model, self.shares, self.args.seed)
            self.shares = None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        return optimizer

    def keep_order(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called with the optimizer as it is made, before accelerate has it; see `create_scheduler`."""
        if self.accelerator.is_fsdp2 and isinstance(self.model, FSDPModule):
            self._order = [list(group["params"]) for group in optimizer.param_groups]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. It comes right after accelerate, which tells an optimizer's parameters apart by the addresses
        of their values; shares without values have none, so the parameters are put back."""
        if self._order is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._order, strict=True):
                group["params"] = parameters
            self._order = None
        return super().create_scheduler(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, but a checkpoint gets what is trained in pieces, and nothing of the base."""
        if _internal_call and output_dir is not None and self.accelerator.is_fsdp2:
            save_values(Path(output_dir), self.model)
        else:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.accelerator.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        settings = save_moments(Path(output_dir), self.model, self.optimizer)
        if is_first_process():
            progress = {"optimizer": settings, "scheduler": self.lr_scheduler.state_dict()}
            (Path(output_dir) / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.accelerator.is_fsdp2:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_values(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.accelerator.is_fsdp2 or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        progress = json.loads((Path(checkpoint) / PROGRESS).read_text(encoding="utf-8"))
        load_moments(Path(checkpoint), self.model, self.optimizer, progress["optimizer"])
        self.lr_scheduler.load_state_dict(progress["scheduler"])

    def _load_best_model(self) -> None:
        if not self.accelerator.is_fsdp2:
            super()._load_best_model()  # type: ignore[misc]
            return
        state: Any = self.state  # type: ignore[attr-defined]
        load_values(Path(state.best_model_checkpoint), self.model)


def load_base(section: ModelSection, method: Method, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The base of a recipe, and None; where the launch spreads it over processes, the base without values, and a model
    with this process's share of them.

    Adapters that start at random values of their own, fixed masks, and quantised bases need all of the base.

    Raises:
        ModelError, MissingExtraError: as `maskft.vlm.load.load_model`.
    """
    source: dict[str, Any] = {
        "dtype": section.dtype,
        "attention": section.attention,
        "trust_remote_code": section.trust_remote_code,
    }
    spreads = isinstance(method, MaskMethod | FullMethod | ProjectorMethod) and not is_fixed(method)
    if spreads and section.quantization == "none" and shares_are_read():
        say(f"each of {dist.get_world_size()} processes reads its share of the base")
        return load_shares(section.base, **source)
    return load_model(section.base, quantization=section.quantization, **source), None


def take_to_pieces(accelerator: Any, model: Any, shares: nn.Module, seed: int) -> None:
    """Apply FSDP2 as accelerate does to a model on the meta device, then give each process its values.

    Accelerate's own way to fill such a model starts from a process that holds all of it.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:  # goes on before, and accelerate would put it on again
        model = fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False
    plugin.cpu_ram_efficient_loading = False
    fsdp2_prepare_model(accelerator, model)
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    spread(model, shares, seed=seed, device=torch.device("cpu") if offloaded else accelerator.device)


def save_values(folder: Path, model: nn.Module) -> None:
    """Write this process's share of what is trained into a checkpoint; every process must call this."""
    _write(folder / VALUES, _values(model))


def load_values(folder: Path, model: nn.Module) -> None:
    """Read this process's share of what is trained from a checkpoint, in place; every process must call this.

    Raises:
        RunError: the checkpoint is not one in pieces.
    """
    _read(folder / VALUES, _values(model))


def save_moments(folder: Path, model: nn.Module, optimizer: Any) -> list[dict[str, Any]]:
    """Write this process's share of the optimizer's tensors into a checkpoint; every process must call this.

    Returns:
        The optimizer's settings by group of parameters, for JSON.
    """
    state: Any = get_optimizer_state_dict(model, _plain(optimizer))
    _write(folder / MOMENTS, _flat(state))
    return [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]


def load_moments(folder: Path, model: nn.Module, optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Read this process's share of the optimizer's tensors from a checkpoint; every process must call this.

    Args:
        folder: the checkpoint's.
        model, optimizer: ready to train.
        settings: as `save_moments` returned them.

    Raises:
        RunError: the checkpoint is not one in pieces.
    """
    state: Any = get_optimizer_state_dict(model, _plain(optimizer))
    tensors = _flat(state)
    _read(folder / MOMENTS, tensors)
    for name, own in state["state"].items():
        own.update({key: tensors[f"{key}.{name}"].view(tensor.shape) for key, tensor in own.items()})
    for group, values in zip(state["param_groups"], settings, strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    set_optimizer_state_dict(model, _plain(optimizer), state)


def _write(folder: Path, state: dict[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(state), save_distributed=True)
    save(state, storage_writer=writer)


def _read(folder: Path, state: dict[str, Tensor]) -> None:
    if not folder.is_dir():
        raise RunError(
            f"{folder} is missing, so {folder.parent} is no checkpoint of FSDP2. Resume as the run was launched, or "
            "give a new --output."
        )
    load(state, storage_reader=HuggingFaceStorageReader(str(folder)))


def _values(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name; the tensors themselves."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, by "moment.parameter", with one dimension at least, as DCP's reader of
    safetensors asks for."""
    named = ((f"{key}.{name}", tensor) for name, own in state["state"].items() for key, tensor in own.items())
    return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in named}


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate wraps."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _files(state: dict[str, Tensor]) -> dict[str, int]:
    """Number of the file for each tensor, so that a process's share of a file has about `FILE_BYTES`."""
    numbers, number, size = {}, 1, 0
    for name, tensor in state.items():
        share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        own = share.numel() * share.element_size()
        if size and size + own > FILE_BYTES:
            number, size = number + 1, 0
        size += own
        numbers[name] = number
    return numbers
