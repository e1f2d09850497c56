"""Which entries are the largest: masks of exactly so many, ties to the first positions.

Tensors that can be looked at for nothing, in this process's memory and neither traced nor compiled, are ranked by
NumPy's partition, others by torch. Both find the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LONG = 1 << 22
"""Rows with more entries are not ranked as a whole."""


def largest(values: Tensor, keep: int) -> Tensor:
    """Boolean mask (..., n) of exactly `keep` largest entries of each row of `values`, ties to the first positions."""
    n = values.shape[-1]
    if keep <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if keep >= n:
        return torch.ones_like(values, dtype=torch.bool)
    cut = kth_smallest(values, n - keep + 1)
    if is_at_hand(values) and int(torch.count_nonzero(reached := values >= cut)) == values.numel() // n * keep:
        return reached  # no row has ties, as is usual
    above = values > cut
    return above | _first(values == cut, keep - above.sum(-1, keepdim=True))


def above_cut(values: Tensor, cut: Tensor, ties: int) -> Tensor:
    """Boolean mask (n,) of what is larger than `cut`, and of the first `ties` entries that equal it."""
    above = values > cut
    return above | _first(values == cut, ties) if ties else above


def clear_cut(values: Tensor, keep: int) -> Tensor | None:
    """The smallest of the `keep` largest entries, a scalar, where all others are smaller.

    None where they are not, where all or none are kept, or where values cannot be looked at for nothing.

    Args:
        values: a tensor of its own, whose entries are put into another order.
        keep: how many to keep.
    """
    dropped = values.numel() - keep
    if not is_at_hand(values) or values.dtype != torch.float32 or not 0 < dropped < values.numel():
        return None
    row = values.numpy().reshape(-1)
    row.partition(dropped)
    return torch.tensor(row[dropped]) if row[:dropped].max() < row[dropped] else None


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest entry of each row, (..., n) -> (..., 1)."""
    if not is_at_hand(values) or values.dtype != torch.float32:
        return values.kthvalue(k, dim=-1, keepdim=True).values
    if values.dim() == 1 and len(values) > _LONG and (found := _between(values, k)) is not None:
        return found
    row = values.detach().numpy().copy()  # whose partition takes a fourteenth of the time of torch's, on a CPU
    row.partition(k - 1)
    return torch.from_numpy(row[..., k - 1 : k].copy())


def _between(values: Tensor, k: int) -> Tensor | None:
    """The k-th smallest entry of a long row, (n,) -> (1,), looked for among the few that lie between two of a sample.

    None where it is not among them, or they are not few.
    """
    sample = values[:: len(values) >> 20].sort().values
    middle, margin = k * len(sample) // len(values), 4 * math.isqrt(len(sample))  # eight standard deviations or more
    low, high = sample[max(middle - margin, 0)], sample[min(middle + margin, len(sample) - 1)]
    near = values[(values >= low) & (values <= high)]
    place = k - int(torch.count_nonzero(values < low))
    if not 1 <= place <= len(near) or len(near) > len(values) // 8:
        return None
    return kth_smallest(near, place)


def is_at_hand(values: Tensor) -> bool:
    """Whether values can be looked at for nothing: in this process's memory, and neither traced nor compiled."""
    plain = type(values) in (Tensor, torch.nn.Parameter)
    return plain and values.device.type == "cpu" and not torch.compiler.is_compiling()


def _first(flags: Tensor, count: Tensor | int) -> Tensor:
    """Keep the first `count` True entries of each row."""
    if is_at_hand(flags) and bool((flags.sum(-1, keepdim=True) <= count).all()):  # seldom are there ties
        return flags
    return flags & (flags.cumsum(-1) <= count)
