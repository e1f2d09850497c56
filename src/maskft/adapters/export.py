"""Export: what was learnt is merged into the weights and the model saved as an ordinary Transformers folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from maskft.folders import refuse_existing
from maskft.tuner import merge_adapter


def export_merged(model: Any, processor: Any, out: Path, *, probe: Mapping[str, Any]) -> float:
    """Merge the active adapter into the base, save model, processor and chat template, and check the result.

    A model without adapter, such as one that was trained whole, is saved as it is.

    A quantised base is written in full precision: a plain model, without another rounding.

    Args:
        model: with an adapter it is merged in place and cannot be unmerged afterwards.
        processor: saved beside the model.
        out: new or empty folder; it appears only once it is complete.
        probe: model inputs to compare logits on.

    Returns:
        The largest absolute difference of the probe's logits before merging and after reloading from `out`. The
        masked weight is rounded to the base's dtype in the same way while training and when merging, so 0 is
        expected on one machine, if no quantised layer was left without a mask: those compute in their own way. Other
        methods add to the output of a layer, and merging rounds their weights: their differences are of the order of
        the base's rounding.

    Raises:
        RunError: `out` exists and is not empty.
    """
    from transformers import AutoModelForImageTextToText

    refuse_existing(out)
    with torch.inference_mode():
        before = model(**probe).logits.float()
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        merged: Any = merge_adapter(model) if hasattr(model, "merge_and_unload") else model
        merged.save_pretrained(staging)
        processor.save_pretrained(staging)
        reloaded = AutoModelForImageTextToText.from_pretrained(staging, dtype=merged.dtype).eval()
        with torch.inference_mode():
            difference = (reloaded(**probe).logits.float() - before).abs().max().item()
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return float(difference)
