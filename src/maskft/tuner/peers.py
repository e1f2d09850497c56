"""LoRA, Uni-LoRA and HiRA of PEFT on the layers that masks would be put on, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import HiraConfig, LoraConfig, UniLoraConfig
from peft.config import PeftConfig
from torch import nn

from maskft.errors import ModelError, UserError
from maskft.targets import MODULES, SCOPES, resolve_parameters, resolve_targets
from maskft.tuner.patterns import flaw_of

KINDS = ("lora", "unilora", "hira")
VARIANTS = ("lora", "rslora", "dora")


@dataclass(frozen=True)
class Targets:
    """What is adapted, in the words of `maskft.targets.resolve_targets`; or names as PEFT matches them.

    Raises:
        UserError: the pattern in target_modules cannot be used.
    """

    scope: Sequence[str] = ("language", "projector")
    modules: str = "both"
    layers: str | Sequence[int] = "all"
    target_modules: Sequence[str] | str | None = None
    parameters: Sequence[str] = ()
    """Beside target_modules: names of parameters that are no layer's weight."""

    def __post_init__(self) -> None:
        if unknown := [part for part in self.scope if part not in SCOPES]:
            raise UserError(f"scope has {unknown}; allowed: {', '.join(SCOPES)}.")
        if self.modules not in (*MODULES, "all"):
            raise UserError(f"modules is '{self.modules}'; allowed: {', '.join(MODULES)}.")
        if isinstance(self.target_modules, str) and (flaw := flaw_of(self.target_modules)):
            raise UserError(f"target_modules {flaw}.")

    def names(self, model: nn.Module) -> tuple[list[str] | str, list[str]]:
        """Names of layers, or a pattern of them, and of parameters that are no layer's weight.

        Raises:
            ModelError: nothing in the model matches.
        """
        if self.target_modules is not None:
            given = self.target_modules
            return given if isinstance(given, str) else list(given), list(self.parameters)
        where: dict[str, Any] = {"scope": self.scope, "modules": self.modules, "layers": self.layers}
        return resolve_targets(model, **where), resolve_parameters(model, **where)


@dataclass(frozen=True)
class Peer:
    """An adapter of another method.

    Attributes:
        kind: "lora", "unilora" or "hira".
        targets: what it lies on.
        rank: of the two factors.
        dropout: share of a layer's inputs that is dropped on the adapter's path in training.
        alpha: of LoRA: the factors' product is scaled by alpha / rank, with "rslora" by alpha / sqrt(rank).
        variant: of LoRA: "lora", "rslora" or "dora".
        vector_length: of Uni-LoRA: numbers in the trained vector.
    """

    kind: str
    targets: Targets
    rank: int
    dropout: float = 0.0
    alpha: float = 32
    variant: str = "lora"
    vector_length: int = 1 << 19

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind is '{self.kind}'; allowed: {', '.join(KINDS)}.")
        if self.variant not in VARIANTS:
            raise UserError(f"variant is '{self.variant}'; allowed: {', '.join(VARIANTS)}.")

    def config(self, model: nn.Module) -> PeftConfig:
        """PEFT's configuration for this model.

        Raises:
            ModelError: nothing matches, or weights match that the method cannot lie on.
        """
        modules, parameters = self.targets.names(model)
        if parameters and (self.kind != "lora" or self.variant == "dora" or self.dropout):
            raise ModelError(
                f"{parameters[0]} holds weights of experts, which only LoRA without dropout can be put on, not "
                f"{self.variant if self.kind == 'lora' else self.kind}. Set method.modules to attn, or target_modules."
            )
        if self.kind == "unilora":
            return UniLoraConfig(
                r=self.rank,
                theta_d_length=self.vector_length,
                unilora_dropout=self.dropout,
                target_modules=modules,
            )
        if self.kind == "hira":
            return HiraConfig(r=self.rank, hira_dropout=self.dropout, target_modules=modules)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            target_modules=modules,
            target_parameters=parameters or None,
        )
