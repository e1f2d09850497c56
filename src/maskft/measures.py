"""Measures of gates, and where in the model a gate lies. Of tensors and names alone: no model, no files.

mean, spread    of the gates m
distance        mean |m - start|, where start is the gate at offset 0
moved           share of gates with |m - start| > MOVED
saturated       share of a soft gate's values in the lowest or highest hundredth of its range (EDGE)
kept            share of a hard mask's weights that stay
change          ||W' - W|| / ||W||, Frobenius norms, W' = W * m
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskft.gates import Gate
from maskft.targets import layer_index, named_part

MOVED = 1e-3
"""A gate farther than this from its start counts as moved: about the spacing of bf16 weights, relative to them."""
EDGE = 0.01
"""A soft gate this near to an end of its range, in units of the range, counts as saturated."""
NAMES = ("mean", "spread", "distance", "moved", "saturated", "kept", "change")
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five colours of viridis, whose lightness rises evenly; red, green, blue of 255."""


def measure(m: Tensor, start: Tensor | None, top: float | None, weight: Tensor | None = None) -> dict[str, Tensor]:
    """The measures of the module's docstring, over the last dimension; those that do not apply are left out.

    Args:
        m: gates (..., n).
        start: m at offset 0, likewise; None where it is not known.
        top: upper end of a soft gate's range (the lower one is 0); None for hard gates.
        weight: the weights under the gates (..., n).
    """
    found = {"mean": m.mean(-1), "spread": m.std(-1, correction=0)}
    if start is not None:
        far = (m - start).abs()
        found |= {"distance": far.mean(-1), "moved": _share(far > MOVED)}
    if top is None:
        found["kept"] = _share(m > 0)
    else:
        found["saturated"] = _share((m < EDGE * top) | (m > (1 - EDGE) * top))
    if weight is not None:
        norm = weight.norm(dim=-1)
        found["change"] = (weight * (m - 1)).norm(dim=-1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return found


def top_of(gate: Gate) -> float | None:
    """Upper end of a soft gate's range; None for hard gates."""
    if getattr(gate, "hard", False):
        return None
    return float(gate.value(torch.full((1, 1), math.inf), torch.ones(1, 1)))


@dataclass(frozen=True, order=True)
class Place:
    """Where a masked matrix lies.

    Attributes:
        part: "language", "projector", "vision" or "other".
        module: its path inside its layer, such as "self_attn.q_proj", without the numbers of experts.
        layer: number of the layer in its stack; -1 outside layers.
    """

    part: str
    module: str
    layer: int


def place(name: str) -> Place:
    """The place of a layer of an adapter, read from its name."""
    bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
    layer, part = layer_index(bare), named_part(bare)
    if layer is None:
        return Place(part, bare.rpartition(".")[2], -1)
    path = bare.split(".")
    inside = path[next(i for i, piece in enumerate(path) if piece.isdigit()) + 1 :]
    module = ".".join(piece for piece in inside if not piece.isdigit())
    return Place("language" if part == "other" else part, module, layer)


def colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue of 255 for a share from 0 (dark) to 1 (light); beyond is cut off."""
    at = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(at), len(COLOURS) - 2)
    pairs = zip(COLOURS[low], COLOURS[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in pairs)
    return red, green, blue


def heat_image(values: Mapping[Place, float], side: int = 8) -> Tensor:
    """A picture of values by place: a row for each module, a column for each layer, `side` pixels a cell.

    Colours run from 0 to the largest value. Cells without value are white.

    Returns:
        uint8 (3, rows * side, columns * side).
    """
    rows = {key: i for i, key in enumerate(dict.fromkeys((where.part, where.module) for where in values))}
    columns = max((where.layer for where in values), default=0) + 1
    scale = max(values.values(), default=0.0) or 1.0
    image = torch.full((max(len(rows), 1), max(columns, 1), 3), 255, dtype=torch.uint8)
    for where, value in values.items():
        image[rows[where.part, where.module], max(where.layer, 0)] = torch.tensor(colour(value / scale)).byte()
    return image.repeat_interleave(side, 0).repeat_interleave(side, 1).permute(2, 0, 1)


def _share(flags: Tensor) -> Tensor:
    return flags.double().mean(-1)
