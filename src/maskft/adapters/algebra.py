"""Algebra of saved adapters on one base: what is combined are the gates' values m, one matrix at a time.

    union         m = 1 where any mask keeps the weight                 hard masks
    intersection  m = 1 where all masks keep it                         hard masks
    interpolate   m = sum_i w_i m_i, weights w_i >= 0 that sum to 1
    product       m = prod_i m_i^(w_i), weights w_i >= 0

A layer that an adapter does not mask has m = 1 there. Hard results are saved with the gate "threshold", whose offsets
alone make the mask. Soft results are turned back into offsets of a soft gate; values outside its range are clipped to
it and counted. No base is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.adapters.files import write_adapter
from maskft.adapters.operands import Operands
from maskft.errors import UserError, did_you_mean
from maskft.folders import refuse_existing, staged
from maskft.gates import Centered, Gate, Normalized, Soft
from maskft.packing import pack_bits
from maskft.tuner import MaskConfig
from maskft.tuner.packed import mask_offsets

OPERATIONS = ("union", "intersection", "interpolate", "product")
SOFT_GATES = ("soft", "normalized", "centered")
EDGE = 1 / (1 + math.exp(30))
"""How near to an end of its range a gate is put that should lie there or beyond, as a share of the range."""
VISIBLE = 1e-6
"""A change of m by clipping above this is counted."""


@dataclass(frozen=True)
class Combined:
    """What was made.

    Attributes:
        gate: the result's gate.
        layers: masked layers.
        scores: how many scores the result has; with dense ones, the masked weights.
        clipped: how many of them lay outside the gate's range.
        base_fingerprint: of the base the result belongs to; None where it is not known, see `combine`.
    """

    gate: str
    layers: int
    scores: int
    clipped: int
    base_fingerprint: str | None


def combine(
    operation: str,
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    gate: str | None = None,
) -> Combined:
    """Combine saved adapters into a new one.

    Adapters that mask the same layers must have the same fingerprint of their base, unless it was left out. Those
    that mask different layers cannot be compared so: they must name the same base, and the result has no fingerprint.

    Args:
        operation: one of OPERATIONS.
        folders: two or more adapters.
        out: new or empty folder; it appears only once it is complete.
        weights: one for each adapter; default: equal ones that sum to 1 for interpolate, 1 for product.
        gate: soft gate of the result; default: that of the first adapter with one, with its temperature and
            init_gate. Between hard masks alone "centered" for interpolate, and for product a hard mask.

    Raises:
        UserError: an operation, weight or gate that is not allowed.
        RunError: `out` exists and is not empty.
        AdapterError: an adapter is damaged, or they do not belong together.
    """
    if operation not in OPERATIONS:
        nearest = did_you_mean(operation, OPERATIONS)
        raise UserError(f"the operation is '{operation}'; allowed: {', '.join(OPERATIONS)}.{nearest}")
    if len(folders) < 2:
        raise UserError("combining takes two adapters or more.")
    powers = _weights(operation, len(folders), weights)
    refuse_existing(out)
    operands = Operands(folders)
    hard = all(operands.hard(i) for i in range(len(folders)))
    if operation in ("union", "intersection") and not hard:
        soft = ", ".join(str(a.folder) for i, a in enumerate(operands.adapters) if not operands.hard(i))
        raise UserError(f"{operation} is for hard masks; soft: {soft}. Use interpolate or product.")
    if gate is not None and (gate not in SOFT_GATES or operation in ("union", "intersection")):
        raise UserError(
            f"the result's gate is '{gate}'; {', '.join(SOFT_GATES)} are allowed, with interpolate or product."
        )
    binary = hard and operation != "interpolate" and gate is None
    settings = _settings(operands, gate, binary=binary)
    result = MaskConfig(**{name: settings[name] for name in ("gate", "temperature", "init_gate")}).make_gate()
    merge = _OPERATIONS[operation]
    tensors: dict[str, Tensor] = {}
    clipped = 0
    for layer in operands.layers:
        m = merge([operands.gates(i, layer, operands.offset(i, layer)) for i in range(len(folders))], powers)
        name = f"{layer}.mask_scores"
        if not binary:
            offset, outside = inverse(result, m)
            tensors[name], clipped = offset.float(), clipped + outside
        elif settings["storage"] == "bits":
            tensors.update({f"{name}.{part}": tensor for part, tensor in pack_bits(m > 0).items()})
        else:
            tensors[name] = mask_offsets(m > 0, "threshold")
    with staged(out) as staging:
        write_adapter(staging, tensors, settings)
    scores = sum(operands.shape(layer).numel() for layer in operands.layers)
    return Combined(settings["gate"], len(operands.layers), scores, clipped, operands.fingerprint)


def inverse(gate: Gate, m: Tensor) -> tuple[Tensor, int]:
    """The offsets D at which a soft gate has the values m (fp64), and how many m it cannot reach.

    Raises:
        UserError: the gate is not one of `maskft.gates`' soft ones.
    """
    if isinstance(gate, Soft):
        share, start = 1.0, gate.init_gate
    elif isinstance(gate, Normalized):
        share, start = gate.init_gate, gate.init_gate
    elif isinstance(gate, Centered):
        share, start = 0.5, 0.5
    else:
        raise UserError(
            f"the gate {type(gate).__name__} has no inverse; give the result one of {', '.join(SOFT_GATES)}."
        )
    p = m * share  # of the sigmoid's range
    near = p.clamp(EDGE, 1 - EDGE)
    clipped = int(((p - near).abs() > VISIBLE * share).sum())
    return (torch.logit(near) - torch.logit(torch.tensor(start, dtype=m.dtype))).mul_(gate.temperature), clipped


def _weights(operation: str, count: int, weights: Sequence[float] | None) -> list[float]:
    if operation in ("union", "intersection"):
        if weights is not None:
            raise UserError(f"{operation} takes no weights.")
        return [1.0] * count
    if weights is None:
        return [1 / count if operation == "interpolate" else 1.0] * count
    given = ", ".join(f"{w:g}" for w in weights)
    if len(weights) != count:
        raise UserError(f"there are {len(weights)} weights ({given}) for {count} adapters.")
    if not all(0 <= w < math.inf for w in weights):
        raise UserError(f"the weights are {given}; each must be 0 or more.")
    if operation == "interpolate" and abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"the weights are {given}, which sum to {sum(weights):g}; to interpolate they must sum to 1.")
    return list(weights)


_OPERATIONS: dict[str, Callable[[list[Tensor], list[float]], Tensor]] = {
    "union": lambda ms, _: torch.stack(ms).amax(0),
    "intersection": lambda ms, _: torch.stack(ms).amin(0),
    "interpolate": lambda ms, weights: sum((m * w for m, w in zip(ms, weights, strict=True)), torch.zeros(())),
    "product": lambda ms, weights: torch.stack([m.pow(w) for m, w in zip(ms, weights, strict=True)]).prod(0),
}


def _settings(operands: Operands, gate: str | None, *, binary: bool) -> dict[str, Any]:
    """The configuration of the result."""
    first = operands.adapters[0].settings
    soft = [a.config for i, a in enumerate(operands.adapters) if not operands.hard(i)]
    like = soft[0] if soft else MaskConfig(gate="centered")
    targets = {name: first.get(name) for name in ("target_modules", "target_parameters", "exclude_modules")}
    if not operands.same_layers:
        names = [layer.removeprefix("base_model.model.") for layer in operands.layers]
        targets = {"target_modules": names, "target_parameters": None, "exclude_modules": None}
    return {
        **first,
        **targets,
        "gate": "threshold" if binary else gate or like.gate,
        "temperature": 1.0 if binary else like.temperature,
        "init_gate": MaskConfig.init_gate if binary else like.init_gate,
        "straight_through": False,
        "ranking": "matrix",
        "init_weights": True,
        "score_layout": operands.layout,
        "score_dtype": "float32",
        "storage": "bits" if binary and operands.layout == "dense" else "float32",
        "base_fingerprint": operands.fingerprint,
    }
