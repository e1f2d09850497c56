"""How scores are kept: dense, one per weight, as offsets from the start, in fp32.

An offset of zero is the start. So weight decay pulls towards the pre-trained model, small updates keep their
resolution, and a mask that did not move is all zeros on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

PUBLISHED_STD = 0.02
"""Spread of the random scores a published hard mask starts from."""


def dense_offsets(shape: torch.Size, *, device: torch.device, std: float = 0.0) -> Tensor:
    """Offsets D of shape `shape`, fp32: zeros, or drawn from N(0, std) where a start off the pre-trained model is
    asked for."""
    if std == 0.0:
        return torch.zeros(shape, device=device, dtype=torch.float32)
    return torch.randn(shape, device=device, dtype=torch.float32) * std
