"""How scores are kept: as offsets D from the start, one per weight or fewer.

    dense     one per weight                     D (out, in)
    low-rank  as large as LoRA's adapter         D = L R,  L (out, rank), R (rank, in)
    row       one per output                     D[i, j] = s[i]
    column    one per input                      D[i, j] = s[j]
    block     one per square of weights          D[i, j] = s[i // size, j // size]

A layout turns a few parameters into the offsets of a weight matrix (..., out, in), and the offsets' gradient into the
parameters'. Leading dimensions are matrices of their own (experts). An offset of zero is the start. So weight decay
pulls towards the pre-trained model, small updates keep their resolution, and a mask that did not move is all zeros
on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PUBLISHED_STD = 0.02
"""Spread of the random scores a published hard mask starts from."""

Parameters = tuple[Tensor, ...]


class Layout(Protocol):
    """How the offsets of one matrix are made of parameters."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the parameters are called, in order."""
        ...

    def create(self, shape: torch.Size, std: float, **placement: Any) -> Parameters:
        """Parameters for a weight of `shape`, whose offsets are zeros or, with `std`, spread about as N(0, std)."""
        ...

    def offset(self, parameters: Parameters, shape: torch.Size) -> Tensor:
        """D of `shape`; not to be changed in place."""
        ...

    def gradients(self, doffset: Tensor, parameters: Parameters) -> Parameters:
        """The parameters' gradients, from that of D."""
        ...


@dataclass(frozen=True)
class Dense:
    """One score per weight."""

    names = ("scores",)

    def create(self, shape: torch.Size, std: float, **placement: Any) -> Parameters:
        return (_normal(shape, std, **placement),)

    def offset(self, parameters: Parameters, shape: torch.Size) -> Tensor:
        return parameters[0]

    def gradients(self, doffset: Tensor, parameters: Parameters) -> Parameters:
        return (doffset,)


@dataclass(frozen=True)
class LowRank:
    """D = L R. L starts at zero and R at N(0, 1/rank), so that a step of L by the learning rate moves an offset by
    about the learning rate, as it does a dense score."""

    rank: int
    names = ("left", "right")

    def create(self, shape: torch.Size, std: float, **placement: Any) -> Parameters:
        *experts, out, width = shape
        left = _normal(torch.Size([*experts, out, self.rank]), std, **placement)
        return left, _normal(torch.Size([*experts, self.rank, width]), 1 / math.sqrt(self.rank), **placement)

    def offset(self, parameters: Parameters, shape: torch.Size) -> Tensor:
        left, right = parameters
        return left @ right

    def gradients(self, doffset: Tensor, parameters: Parameters) -> Parameters:
        left, right = parameters
        return doffset @ right.mT.to(doffset.dtype), left.mT.to(doffset.dtype) @ doffset


@dataclass(frozen=True)
class Row:
    """One score per output: whole rows of the matrix share their gate."""

    names = ("scores",)

    def create(self, shape: torch.Size, std: float, **placement: Any) -> Parameters:
        return (_normal(torch.Size([*shape[:-1], 1]), std, **placement),)

    def offset(self, parameters: Parameters, shape: torch.Size) -> Tensor:
        return parameters[0].expand(shape)

    def gradients(self, doffset: Tensor, parameters: Parameters) -> Parameters:
        return (doffset.sum(-1, keepdim=True),)


@dataclass(frozen=True)
class Column:
    """One score per input: whole columns of the matrix share their gate."""

    names = ("scores",)

    def create(self, shape: torch.Size, std: float, **placement: Any) -> Parameters:
        return (_normal(torch.Size([*shape[:-2], 1, shape[-1]]), std, **placement),)

    def offset(self, parameters: Parameters, shape: torch.Size) -> Tensor:
        return parameters[0].expand(shape)

    def gradients(self, doffset: Tensor, parameters: Parameters) -> Parameters:
        return (doffset.sum(-2, keepdim=True),)


@dataclass(frozen=True)
class Block:
    """One score per `size` x `size` square of weights; the last row and column of squares may be cut."""

    size: int
    names = ("scores",)

    def create(self, shape: torch.Size, std: float, **placement: Any) -> Parameters:
        *experts, out, width = shape
        squares = torch.Size([*experts, math.ceil(out / self.size), math.ceil(width / self.size)])
        return (_normal(squares, std, **placement),)

    def offset(self, parameters: Parameters, shape: torch.Size) -> Tensor:
        wide = parameters[0].repeat_interleave(self.size, dim=-2).repeat_interleave(self.size, dim=-1)
        return wide[..., : shape[-2], : shape[-1]]

    def gradients(self, doffset: Tensor, parameters: Parameters) -> Parameters:
        rows, columns = parameters[0].shape[-2:]
        margin = (0, columns * self.size - doffset.shape[-1], 0, rows * self.size - doffset.shape[-2])
        padded = torch.nn.functional.pad(doffset, margin)
        squares = padded.view(*doffset.shape[:-2], rows, self.size, columns, self.size)
        return (squares.sum((-3, -1)),)


def _normal(shape: torch.Size, std: float, **placement: Any) -> Tensor:
    if std == 0.0:
        return torch.zeros(shape, **placement)
    return torch.randn(shape, **placement) * std
