"""Weights in pieces: DTensors of FSDP2, and the partitioned parameters of DeepSpeed's ZeRO-3.

Both put a layer's weights together around its forward and backward pass, where nothing here is needed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers.integrations import is_fsdp_enabled

from maskft.errors import ModelError


def full_shape(weight: Tensor) -> torch.Size:
    """Shape of the whole weight, also where this process holds a piece of it."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def is_sharded(weight: Tensor) -> bool:
    """Whether this process holds no more than a piece of the weight now."""
    return hasattr(weight, "full_tensor") or weight.shape != full_shape(weight)


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 partitions the weight, also while this process holds all of it."""
    return hasattr(weight, "ds_id")


def whole(weight: Tensor) -> Tensor:
    """The weight in full, detached. If it is in pieces, a copy, and every process must call this at the same time."""
    if not is_sharded(weight):
        return weight.detach()
    if hasattr(weight, "full_tensor"):
        pieces: Any = weight.detach()
        full: Tensor = pieces.full_tensor()
        return full
    partitioned: dict[str, object] = {"param_list": [weight]}
    weight.all_gather(**partitioned)  # type: ignore[attr-defined]
    try:
        return weight.detach().clone()
    finally:
        weight.partition(**partitioned)  # type: ignore[attr-defined]


def refuse_sharded(weight: Tensor, purpose: str) -> None:
    """Raise ModelError if the weight is in pieces, naming what would need it in full."""
    if is_sharded(weight):
        raise ModelError(
            f"{purpose} needs whole weights, but FSDP or DeepSpeed ZeRO-3 keeps them in pieces here. Save the adapter "
            "and load it in one process for that."
        )


def several_processes() -> bool:
    """Whether this is one process of several, even before they have been connected."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_initialized() and dist.get_world_size() > 1)


def weights_are_loaded() -> bool:
    """Whether this process has read the base's weights; FSDP can leave that to the first process of a machine."""
    return not is_fsdp_enabled() or int(os.environ.get("LOCAL_RANK", "0")) == 0


def is_first_process() -> bool:
    """Whether this process is the one that speaks and writes, also before processes have been connected."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return rank == 0


def part_together() -> None:
    """The last call of every process that was launched with others; nothing where there are none.

    A process that ends by itself may be aborted while threads of its group still speak to another, and the launcher
    takes the whole work as failed.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """Element by element; every process must call this."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
