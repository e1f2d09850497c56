"""An adapter in pieces becomes one file: tensors are joined one after the other, and no process holds two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from maskft.tuner.settings import WEIGHTS
from maskft.tuner.sharding import full_shape, is_first_process, whole

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_in_pieces(model: Any, folder: Path) -> None:
    """Save a PEFT model's adapter in full, as its `save_pretrained` does; every process must call this.

    Scores are written as they are, whatever the configuration's `storage`. The first process writes.
    """
    if is_first_process():
        model.save_pretrained(folder, state_dict={})  # the configuration, and a file without tensors
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved_as = _saved_names(model, trained)
    write_joined(folder / WEIGHTS, {saved_as[name]: parameter for name, parameter in trained.items()})


def write_joined(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors in pieces whole into a safetensors file, cast where a dtype is given.

    Every process must call this, and the first writes.

    The format: eight bytes with the header's length, the header as JSON, then the tensors without gaps. They go by
    size of entry, the largest first, so that each lies where its dtype may, and then by name.
    """
    kinds = {name: (dtype or tensor.dtype, full_shape(tensor)) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name][0].itemsize, name))
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb")) if is_first_process() else None
        if file is not None:
            header = _header({name: kinds[name] for name in order})
            file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            joined = whole(tensors[name])
            if file is not None:
                file.write(joined.to("cpu", kinds[name][0]).contiguous().flatten().view(torch.uint8).numpy().data)


def _header(kinds: Mapping[str, tuple[torch.dtype, torch.Size]]) -> bytes:
    """The header of a safetensors file, of a length that eight divides."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in kinds.items():
        end = begin + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(entries, separators=(",", ":")).encode()
    return content + b" " * (-len(content) % 8)


def _saved_names(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """What PEFT calls each parameter in a file."""
    empty = {name: torch.empty(full_shape(p), dtype=p.dtype, device="meta") for name, p in parameters.items()}
    found = {id(tensor): name for name, tensor in get_peft_model_state_dict(model, state_dict=empty).items()}
    return {name: found[id(tensor)] for name, tensor in empty.items()}
