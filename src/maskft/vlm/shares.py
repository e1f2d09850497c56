"""Loading a base that no process can hold: each of several processes reads its share of every weight.

The share is the one that FSDP2 gives a process, so that the masked model takes it over as it is. Whole weights are
never read; a tensor that has to be cast is held twice for that long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import distributed as dist
from torch import nn

from maskft.errors import ModelError
from maskft.vlm.load import load_skeleton, source_of

_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def shares_are_read() -> bool:
    """Whether the launch is one in which each process reads its share: FSDP2 over all of several processes."""
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION", "1") == "2"
    flat = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false") != "true"
    return launched and flat and dist.is_initialized() and dist.get_world_size() > 1


def load_shares(
    base: str, *, dtype: str, attention: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A base whose weights are spread over all processes; every process must call this.

    Args:
        base, dtype, attention, trust_remote_code: as `maskft.vlm.load.load_model`.

    Returns:
        The model on the meta device, frozen, to put masks on; and a model of the same names that holds this process's
        share of each weight, for `maskft.tuner.pieces.spread`.

    Raises:
        ModelError: there is no such base, it has no safetensors files, or they don't fit its config.
    """
    skeleton = load_skeleton(base, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
    source = source_of(base)
    skeleton.config.name_or_path = source
    from transformers.distributed import DistributedConfig

    everyone = DistributedConfig(
        fsdp_size=dist.get_world_size(), fsdp_plan={_some_module(skeleton): "free_full_weight"}
    )
    chosen = {} if attention is None else {"attn_implementation": attention}
    with ExitStack() as stack, each_reads():
        try:
            slices = {
                name: _Slices(file.get_slice(name))
                for path in weight_files(source)
                for file in [stack.enter_context(safe_open(path, framework="pt", backend="pread"))]
                for name in file.keys()  # noqa: SIM118
            }
            shares = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                state_dict=slices,
                dtype=getattr(torch, dtype),
                distributed_config=everyone,
                **chosen,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load '{base}' in pieces: {error}") from error
    _take_dtypes(skeleton, shares)
    return skeleton, shares.requires_grad_(False)


class _Slices:
    """A tensor on the disk, of which safetensors reads a slice; also one without rows, which it does not give."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, key: Any) -> torch.Tensor:
        parts = key if isinstance(key, tuple) else (key,)
        empty = [isinstance(part, slice) and part.start is not None and part.start == part.stop for part in parts]
        if not any(empty):
            found: torch.Tensor = self._stored[key]
            return found
        first = self._stored[tuple(slice(0, 1) if none else part for part, none in zip(parts, empty, strict=True))]
        rest: torch.Tensor = first[tuple(slice(0, 0) if none else slice(None) for none in empty)]
        return rest


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a folder or a hub id.

    Raises:
        OSError: there are none.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        return [Path(path) for path in get_checkpoint_shard_files(source, index)[0]]
    return [Path(cached_file(source, SAFE_WEIGHTS_NAME))]


@contextmanager
def each_reads() -> Iterator[None]:
    """Inside, no process leaves reading or sharing out to the first one of its machine."""
    before = os.environ.get(_EFFICIENT)
    os.environ[_EFFICIENT] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_EFFICIENT]
        else:
            os.environ[_EFFICIENT] = before


def _some_module(model: nn.Module) -> str:
    """A module with weights of its own that no other shares, layer numbers as *.

    Transformers asks for one module at least to be taken to pieces by itself; all others are together.
    """
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    name = next(
        name
        for name, module in model.named_modules()
        if not list(module.children()) and (own := list(module.parameters())) and all(counts[id(p)] == 1 for p in own)
    )
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _take_dtypes(skeleton: nn.Module, shares: nn.Module) -> None:
    """Give parameters of the skeleton the dtypes of the loaded ones: some models keep a few in fp32."""
    kept = dict(shares.named_parameters())
    for module_name, module in skeleton.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            loaded = kept.get(f"{module_name}.{name}" if module_name else name)
            if loaded is not None and loaded.dtype != parameter.dtype:
                empty = torch.empty(parameter.shape, dtype=loaded.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
