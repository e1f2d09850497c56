"""MaskConfig: everything that defines a mask adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from maskft.errors import UserError, did_you_mean
from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK
from maskft.scores import PUBLISHED_STD
from maskft.targets import MODULES, SCOPES
from maskft.tuner.register import mask_peft_type

GATES = ("soft", "normalized", "centered", "topk", "threshold")
STARTS = (True, False, "random")


@dataclass
class MaskConfig(PeftConfig):
    """Configuration of mask fine-tuning, used as LoraConfig is.

    Args:
        gate: "soft" (published S-MFT), "normalized", "centered", "topk" (published H-MFT), "threshold"; equations
            in `maskft.gates`.
        temperature: T > 0 of the sigmoid.
        init_gate: m0 in (0, 1), the soft gate's value at the start; for "threshold", how far a score must fall.
        straight_through: gradient dm/dS = 1 for the soft gates; the hard gates always use theirs.
        keep_ratio: share of each matrix that "topk" keeps, in (0, 1].
        scope: parts of the model to mask, any of "language", "projector", "vision".
        modules: "attn", "mlp" or "both", in the language model and the vision encoder.
        layers: "all", "first-third", "middle-third", "last-third", ranges such as "0-3,8", or indices.
        target_modules: names as PEFT matches them (list, regular expression or "all-linear"), in place of scope,
            modules and layers.
        exclude_modules: names not to mask.
        target_parameters: accepted for PEFT's sake; masking bare parameters is not supported.
        modules_to_save: modules that are trained whole and saved beside the mask.
        init_weights: True starts from the pre-trained model, as near as the gate allows ("topk" cuts the smallest
            weights first); "random" starts hard gates from N(0, 0.02) scores, as published; False draws offsets
            from N(0, 1), so that the adapter visibly changes the model (for tests).
        base_fingerprint: hash of the masked weights the adapter was trained on, set when it is saved and checked
            when it is loaded; None skips the check.
    """

    gate: str = "normalized"
    temperature: float = 1.0
    init_gate: float = 0.98
    straight_through: bool = False
    keep_ratio: float = 0.9
    scope: Sequence[str] = ("language", "projector")
    modules: str = "both"
    layers: str | Sequence[int] = "all"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool | str = field(default=True, repr=False)
    base_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = mask_peft_type()
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
        if not 0 < self.temperature < math.inf:
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
        if self.target_parameters:
            problems.append("target_parameters is set; only modules can be masked: use target_modules.")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets sorted, so that the same adapter is the same file."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def make_gate(self) -> Gate:
        """The gate these fields describe."""
        gates: dict[str, Any] = {
            "soft": lambda: Soft(self.init_gate, self.temperature, self.straight_through),
            "normalized": lambda: Normalized(self.init_gate, self.temperature, self.straight_through),
            "centered": lambda: Centered(self.temperature, self.straight_through),
            "topk": lambda: TopK(self.keep_ratio, magnitude_start=self.init_weights != "random"),
            "threshold": lambda: Threshold(self.init_gate, self.temperature),
        }
        gate: Gate = gates[self.gate]()
        return gate

    def start_std(self) -> float:
        """Spread of the offsets before training."""
        if self.init_weights is False:
            return 1.0
        return PUBLISHED_STD if self.init_weights == "random" else 0.0
