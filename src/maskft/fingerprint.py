"""A fingerprint of weights: masks mean nothing on another base, so an adapter remembers which one it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, as a hexadecimal string.

    Values are rounded to bf16 first, so that one checkpoint has one fingerprint whether it is loaded in fp32 or bf16.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        rounded = weight.to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()
