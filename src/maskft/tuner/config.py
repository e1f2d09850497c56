"""MaskConfig: everything that defines a mask adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.config import PeftConfig

from maskft.errors import UserError, did_you_mean
from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK
from maskft.scores import PUBLISHED_STD, Block, Column, Dense, Layout, LowRank, Row
from maskft.targets import MODULES, SCOPES
from maskft.tuner.patterns import flaw_of
from maskft.tuner.register import mask_peft_type

STARTS = (True, False, "random")
RANKINGS = ("matrix", "global")
LAYOUTS = ("dense", "low-rank", "row", "column", "block")
SCORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORAGES = ("float32", "int8", "int4", "bits")
BIT_GATES = ("topk", "threshold")
"""Hard gates whose masks have offsets that give them back, so that they can be saved as bits."""


@dataclass
class MaskConfig(PeftConfig):
    """Configuration of mask fine-tuning, used as LoraConfig is.

    Args:
        gate: "soft" (published S-MFT), "normalized", "centered", "topk" (published H-MFT), "threshold"; equations
            in `maskft.gates`. The default starts exactly at the pre-trained model, as PEFT's methods do, and learns at
            rates usual for LoRA.
        temperature: T > 0 of the sigmoid.
        init_gate: m0 in (0, 1), the soft gate's value at the start; for "threshold", how far a score must fall.
        straight_through: gradient dm/dS = 1 in place of the exact one of the soft gates and of the sign(S) of "topk";
            "threshold" has no other.
        keep_ratio: share of the weights that "topk" keeps, in (0, 1].
        ranking: "matrix" lets "topk" keep that share of each matrix (of each of q, k, v where they are fused, and of
            each expert), "global" of all masked weights together.
        score_layout: "dense", "low-rank", "row", "column" or "block"; see `maskft.scores`.
        rank: of "low-rank" scores.
        block_size: side of the squares of "block" scores.
        score_dtype: "float32" or "bfloat16"; the latter needs an optimizer that rounds stochastically
            (`maskft.optim`), or small steps are lost. PEFT's autocast_adapter_dtype=False, which asks for adapters in
            the dtype of the base, goes before it.
        scope: parts of the model to mask, any of "language", "projector", "vision".
        modules: "attn", "mlp" or "both", in the language model and the vision encoder.
        layers: "all", "first-third", "middle-third", "last-third", ranges such as "0-3,8", or indices.
        target_modules: names as PEFT matches them (list, regular expression or "all-linear"), in place of scope,
            modules and layers.
        layers_to_transform: PEFT's name for indices of layers, for use with a list of target_modules; without any,
            the same as `layers`.
        layers_pattern: name of the module list that layers_to_transform counts in, where there are several.
        exclude_modules: names not to mask.
        target_parameters: names of parameters that are no layer's weight, such as the 3-D weights of a mixture of
            experts; None lets scope and modules find those of experts.
        modules_to_save: modules that are trained whole and saved beside the mask.
        init_weights: True starts from the pre-trained model, as near as the gate allows ("topk" cuts the smallest
            weights first); "random" starts hard gates from N(0, 0.02) scores, as published; False draws offsets
            from N(0, 1), so that the adapter visibly changes the model (for tests).
        storage: how `save_pretrained` writes dense scores once they are frozen: "float32" (as they are), "int8" or
            "int4" (soft gates), "bits" (hard gates); see `maskft.packing`. Scores that can still be trained are
            written in full, so that checkpoints resume exactly.
        base_fingerprint: hash of the masked weights the adapter was trained on, set when it is saved and checked
            when it is loaded; None skips the check.
    """

    gate: str = "centered"
    temperature: float = 1.0
    init_gate: float = 0.98
    straight_through: bool = False
    keep_ratio: float = 0.9
    ranking: str = "matrix"
    score_layout: str = "dense"
    rank: int = 8
    block_size: int = 16
    score_dtype: str = "float32"
    scope: Sequence[str] = ("language", "projector")
    modules: str = "both"
    layers: str | Sequence[int] = "all"
    target_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool | str = field(default=True, repr=False)
    storage: str = "float32"
    base_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = mask_peft_type()
        self.seen_fingerprint: str | None = None  # no field, so that it is not saved; see maskft.tuner.base
        self.scope = [self.scope] if isinstance(self.scope, str) else list(self.scope)
        self.layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        problems = list(self._problems())
        if problems:
            raise UserError("MaskConfig: " + " ".join(problems))

    def _problems(self) -> Sequence[str]:
        problems = []
        if self.gate not in GATES:
            problems.append(f"gate is '{self.gate}'; allowed: {', '.join(GATES)}.{did_you_mean(self.gate, GATES)}")
        if not 0 < self.temperature <= sys.float_info.max:
            problems.append(f"temperature is {self.temperature}; it must be above 0 and finite.")
        if not 0 < self.init_gate < 1:
            problems.append(f"init_gate is {self.init_gate}; it must lie between 0 and 1, both excluded.")
        elif self.gate == "threshold" and self.init_gate < 0.5:
            problems.append(f"init_gate is {self.init_gate}; below 0.5 the threshold gate would start by cutting all.")
        if not 0 < self.keep_ratio <= 1:
            problems.append(f"keep_ratio is {self.keep_ratio}; it must be above 0 and at most 1 (1 keeps everything).")
        if unknown := [part for part in self.scope if part not in SCOPES]:
            problems.append(f"scope has {unknown}; allowed: {', '.join(SCOPES)}.")
        if self.modules not in MODULES:
            problems.append(f"modules is '{self.modules}'; allowed: {', '.join(MODULES)}.")
        if self.init_weights not in STARTS:
            problems.append(f"init_weights is {self.init_weights!r}; allowed: True, False, 'random'.")
        if self.ranking not in RANKINGS:
            problems.append(f"ranking is '{self.ranking}'; allowed: {', '.join(RANKINGS)}.")
        elif self.ranking == "global" and self.gate != "topk":
            problems.append(f"ranking is 'global', which only the gate 'topk' has; the gate is '{self.gate}'.")
        if self.score_layout not in LAYOUTS:
            nearest = did_you_mean(self.score_layout, LAYOUTS)
            problems.append(f"score_layout is '{self.score_layout}'; allowed: {', '.join(LAYOUTS)}.{nearest}")
        if self.score_dtype not in SCORE_DTYPES:
            problems.append(f"score_dtype is '{self.score_dtype}'; allowed: {', '.join(SCORE_DTYPES)}.")
        if self.storage not in STORAGES:
            nearest = did_you_mean(str(self.storage), STORAGES)
            problems.append(f"storage is '{self.storage}'; allowed: {', '.join(STORAGES)}.{nearest}")
        elif self.storage != "float32" and (self.storage == "bits") != (self.gate in BIT_GATES):
            problems.append(
                f"storage is '{self.storage}' with the gate '{self.gate}'; bits are for {' and '.join(BIT_GATES)}, "
                "int8 and int4 for other gates."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                problems.append(f"`{name}` cannot be used when `target_modules` is a str. Give it a list of names.")
        if self.target_modules is None and self.layers_to_transform is not None and self.layers != "all":
            problems.append("layers and layers_to_transform both choose layers; give one of them.")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            given = getattr(self, name)
            patterns = [given] if isinstance(given, str) else given if name == "layers_pattern" else None
            flaws = [f"{name} {flaw}." for pattern in patterns or [] if (flaw := flaw_of(pattern))]
            problems.extend(flaws)
        for name in ("rank", "block_size"):
            if not 1 <= getattr(self, name) < 2**31:
                problems.append(f"{name} is {getattr(self, name)}; it must be 1 or more, and below 2^31.")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets sorted, so that the same adapter is the same file."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def make_gate(self) -> Gate:
        """The gate these fields describe."""
        return GATES[self.gate](self)

    def learning_rate(self, relative_step: float) -> float:
        """The learning rate at which Adam changes each gate by about `relative_step` of itself per step, at the start.

        Adam moves a score by about the learning rate, which changes the gate by its exact derivative, whichever
        derivative trains it: relative_step = lr m'(0) / m(0). For the published gate that is lr (1 - m0) / T.

        Raises:
            UserError: the gate is hard, or its start has no slope.
        """
        gate = self.make_gate()
        exact = replace(gate, straight_through=False) if hasattr(gate, "straight_through") else gate  # type: ignore[type-var]
        start = torch.zeros(1, 1, dtype=torch.float64)
        slope = 0.0
        if not getattr(gate, "hard", False):
            slope = float(exact.derivative(start, start) / exact.value(start, start))
        if not slope > 0:
            raise UserError(
                f"relative_step has no meaning for the gate '{self.gate}', which has no slope at its start. Set "
                "training.learning_rate."
            )
        return relative_step / slope

    def make_layout(self) -> Layout:
        """How the scores are kept."""
        layouts: dict[str, Layout] = {
            "dense": Dense(),
            "low-rank": LowRank(self.rank),
            "row": Row(),
            "column": Column(),
            "block": Block(self.block_size),
        }
        return layouts[self.score_layout]

    def resolve_layers(self) -> None:
        """Where scope and modules say what is masked, turn PEFT's names for a choice of layers into `layers`.

        Raises:
            UserError: layers_pattern is given, which needs names of modules.
        """
        if self.layers_pattern:
            raise UserError("MaskConfig: layers_pattern needs target_modules, a list of names; without it, use layers.")
        indices = self.layers_to_transform
        if indices is not None and indices != []:
            self.layers = [indices] if isinstance(indices, int) else list(indices)
        self.layers_to_transform = None

    def torch_dtype(self) -> torch.dtype:
        """The scores' dtype."""
        return SCORE_DTYPES[self.score_dtype]

    def start_std(self) -> float:
        """Spread of the offsets before training."""
        if self.init_weights is False:
            return 1.0
        return PUBLISHED_STD if self.init_weights == "random" else 0.0


GATES: dict[str, Callable[[MaskConfig], Gate]] = {
    "soft": lambda c: Soft(c.init_gate, c.temperature, c.straight_through),
    "normalized": lambda c: Normalized(c.init_gate, c.temperature, c.straight_through),
    "centered": lambda c: Centered(c.temperature, c.straight_through),
    "topk": lambda c: TopK(c.keep_ratio, c.init_weights != "random", straight_through=c.straight_through),
    "threshold": lambda c: Threshold(c.init_gate, c.temperature),
}
"""Gates by the name `MaskConfig.gate` knows them by."""


def register_gate(name: str, make: Callable[[MaskConfig], Gate]) -> None:
    """Make a gate of your own known as `MaskConfig(gate=name)`; adapters with it load where it is registered.

    Args:
        name: a new name.
        make: builds the gate from a configuration's fields.

    Raises:
        UserError: the name is taken.
    """
    if name in GATES:
        raise UserError(f"there is a gate '{name}' already; give yours another name.")
    GATES[name] = make
