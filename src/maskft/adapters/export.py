"""Export: what was learnt is merged into the weights and the model saved as an ordinary Transformers folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.errors import RunError
from maskft.folders import staged
from maskft.tuner import merge_adapter

SHARD_SIZE = "5GB"
_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the run's model.

    Attributes:
        difference: largest absolute difference of the probe's logits between the run's model, before merging, and
            the folder, after reloading. 0 is expected of masks, and of weights trained whole, without a cast and
            without quantisation: the masked weight is rounded to the base's dtype in the same way while training and
            when merging. (Quantised layers that carry no mask compute in their own way.) Other methods add to the
            output of a layer, and merging rounds their weights: theirs are of the order of the base's rounding.
        reload_difference: the same between the model that was written and the reloaded one. 0 is expected always.
        rounding: by how much of itself a cast moves a weight at most (beside what is below the dtype's smallest
            number); 0 where nothing was rounded.
        bytes: of all weight files.
    """

    difference: float
    reload_difference: float
    rounding: float
    bytes: int


def export_merged(
    model: Any,
    processor: Any,
    out: Path,
    *,
    probe: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
    quantize: Callable[[Path], Any] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Exported:
    """Merge the active adapter into the base, save model, processor and chat template, and check the result.

    A model without adapter, such as one that was trained whole, is saved as it is. A quantised base is written in full
    precision: a plain model, without another rounding, unless `quantize` is given.

    Args:
        model: with an adapter it is merged in place and cannot be unmerged afterwards.
        processor: saved beside the model.
        out: new or empty folder; it appears only once it is complete.
        probe: model inputs to compare logits on.
        dtype: of the weights written; None keeps the model's.
        max_shard_size: of a weight file, such as "5GB"; with more, there are several and an index.
        quantize: loads a plain folder as a quantised model, which is then saved instead of the plain one.
        beside: text files to write into the folder, by name.

    Raises:
        RunError: `out` exists and is not empty, `max_shard_size` is no size, or a weight is too large for `dtype`.
    """
    from transformers import AutoModelForImageTextToText

    require_size(max_shard_size)
    with staged(out) as staging:
        before = _logits(model, probe)
        written: Any = merge_adapter(model) if hasattr(model, "merge_and_unload") else model
        rounding = 0.0 if dtype is None else _cast(written, dtype)
        if quantize is not None:
            plain = staging / "plain"
            written.save_pretrained(plain)
            written = quantize(plain)
            shutil.rmtree(plain)
        written.save_pretrained(staging, max_shard_size=max_shard_size)
        processor.save_pretrained(staging)
        kept = _logits(written, probe)  # once it is saved: 4-bit layers repack their weights when they first run
        chosen = getattr(written.config, "_attn_implementation", None)
        reloaded = AutoModelForImageTextToText.from_pretrained(
            staging, dtype=written.dtype, attn_implementation=chosen
        ).eval()
        after = _logits(reloaded, probe)
        for name, text in (beside or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
        size = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
    return Exported(_largest(after - before), _largest(after - kept), rounding, size)


def require_size(text: str) -> None:
    """Raise RunError where the text is no size of a weight file."""
    if not _SIZE.fullmatch(text):
        raise RunError(
            f"max_shard_size is '{text}', but must be a whole number with KB, MB or GB, such as {SHARD_SIZE}."
        )


def _cast(model: Any, dtype: torch.dtype) -> float:
    """Cast all floating-point tensors that are saved; returns by how much of itself a tensor's value moves at most.

    Raises:
        RunError: a finite value becomes infinite.
    """
    rounding = 0.0
    saved = model.state_dict(keep_vars=True)  # without what modules compute from the config in float32
    for name, tensor in saved.items():
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            continue
        if torch.finfo(tensor.dtype).eps < torch.finfo(dtype).eps:
            rounding = torch.finfo(dtype).eps / 2
        cast = tensor.data.to(dtype)
        if not torch.isfinite(cast).all() and torch.isfinite(tensor.data).all():
            largest = tensor.data.abs().max().item()
            raise RunError(
                f"'{name}' holds {largest:g}, which is beyond {dtype}'s largest number, {torch.finfo(dtype).max:g}. "
                "Export in bfloat16 or float32."
            )
        tensor.data = cast
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.dtype = dtype
    return rounding


def _logits(model: Any, probe: Mapping[str, Any]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(**probe).logits.float()
    return logits


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max().item())
