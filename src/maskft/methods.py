"""The ways to train that a recipe knows: masks, LoRA, Uni-LoRA, HiRA, full fine-tuning, the projector alone.

All of them find what they train by the same words (scope, modules, layers, target_modules), so that LoRA's factors lie
beside the weights that masks would lie on.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from maskft.errors import UserError
from maskft.tuner import MaskConfig, Peer, Targets

Scope = list[Literal["language", "projector", "vision"]]
Modules = Literal["attn", "mlp", "both"]
PROJECTOR_LEARNING_RATE = 2e-5
"""Of a projector that is trained whole beside an adapter: that of LLaVA-1.5's LoRA recipe."""


class Section(BaseModel):
    """Part of a recipe: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MaskMethod(Section):
    """Mask fine-tuning; the fields are those of `maskft.MaskConfig`, and so are the defaults, but for the gate: the
    published one was ahead on validation (docs/log.md)."""

    name: Literal["mask"] = "mask"
    gate: Literal["soft", "normalized", "centered", "topk", "threshold"] = "soft"
    temperature: float = MaskConfig.temperature
    init_gate: float = MaskConfig.init_gate
    straight_through: bool = MaskConfig.straight_through
    keep_ratio: float = MaskConfig.keep_ratio
    ranking: Literal["matrix", "global"] = MaskConfig.ranking  # type: ignore[assignment]
    score_layout: Literal["dense", "low-rank", "row", "column", "block"] = MaskConfig.score_layout  # type: ignore[assignment]
    rank: int = MaskConfig.rank
    block_size: int = MaskConfig.block_size
    score_dtype: Literal["float32", "bfloat16"] = MaskConfig.score_dtype  # type: ignore[assignment]
    memory: Literal["fast", "balanced", "tight"] = "fast"
    """How much memory training takes: docs/performance.md. The last two keep scores in bfloat16."""
    relative_step: Annotated[float, Field(gt=0)] | None = None
    """How much of itself a gate changes per step at the start; sets training.learning_rate."""
    scope: Scope = ["language", "projector"]
    modules: Modules = MaskConfig.modules  # type: ignore[assignment]
    layers: str | list[int] = "all"
    target_modules: list[str] | str | None = None
    init_weights: bool | Literal["random"] = True
    storage: Literal["float32", "int8", "int4", "bits"] = MaskConfig.storage  # type: ignore[assignment]
    fixed: Literal["none", "random", "magnitude"] = "none"
    """A hard mask that is not trained: it keeps a share `keep_ratio` of each matrix, drawn or by |W|."""
    train_projector: bool = False
    projector_learning_rate: Annotated[float, Field(gt=0)] = PROJECTOR_LEARNING_RATE

    @model_validator(mode="before")
    @classmethod
    def _fixed_is_hard(cls, given: Any) -> Any:
        """A fixed mask's gate and start follow from `fixed`, where they are not given."""
        if isinstance(given, dict) and given.get("fixed", "none") != "none":
            return {"gate": "topk", "init_weights": _START.get(str(given["fixed"]), True), **given}
        return given

    def config(self) -> MaskConfig:
        """The adapter's configuration."""
        own = {"name", "memory", "relative_step", "fixed", "train_projector", "projector_learning_rate"}
        fields = self.model_dump(exclude=own)
        if self.memory != "fast":
            fields["score_dtype"] = "bfloat16"
        return MaskConfig(**fields)

    def check(self) -> None:
        """Raise UserError where values do not go together."""
        self.config()
        _check_projector(self)
        if self.fixed == "none":
            return
        if self.gate != "topk" or self.init_weights != _START[self.fixed]:
            raise UserError(
                f"method.fixed is '{self.fixed}', a mask with the gate topk and init_weights {_START[self.fixed]}, but "
                f"method.gate is '{self.gate}' and method.init_weights {self.init_weights}. Leave those two out."
            )
        if self.train_projector:
            raise UserError("method.fixed trains nothing, but method.train_projector is true. Give one of them.")


_START: dict[str, bool | str] = {"random": "random", "magnitude": True}
"""MaskConfig.init_weights of a fixed mask."""


class PeerMethod(Section):
    """What the methods of PEFT that are compared with masks have in common."""

    kind: ClassVar[str]
    name: str
    rank: Annotated[int, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scope: Scope = ["language", "projector"]
    modules: Modules = "both"
    layers: str | list[int] = "all"
    target_modules: list[str] | str | None = None
    train_projector: bool = False
    """Train the projector whole, beside the adapter."""
    projector_learning_rate: Annotated[float, Field(gt=0)] = PROJECTOR_LEARNING_RATE

    def peer(self) -> Peer:
        """The adapter's settings."""
        own = set(PeerMethod.model_fields) - {"rank", "dropout"}
        return Peer(self.kind, _targets(self), **self.model_dump(exclude=own))

    def check(self) -> None:
        """Raise UserError where values do not go together."""
        self.peer()
        _check_projector(self)


class LoraMethod(PeerMethod):
    """LoRA, rsLoRA or DoRA; QLoRA where `model.quantization` is nf4."""

    kind: ClassVar[str] = "lora"
    name: Literal["lora"]
    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The product of the factors is scaled by alpha / rank, with rslora by alpha / sqrt(rank)."""
    variant: Literal["lora", "rslora", "dora"] = "lora"


class UniLoraMethod(PeerMethod):
    """Uni-LoRA: the entries of all of LoRA's factors are drawn from one trained vector (arXiv 2506.00799)."""

    kind: ClassVar[str] = "unilora"
    name: Literal["unilora"]
    rank: Annotated[int, Field(gt=0)] = 4
    vector_length: Annotated[int, Field(gt=0)] = 1 << 19
    """Numbers that are trained. Rank and length are those of its authors' runs on 7 billion weights."""


class HiraMethod(PeerMethod):
    """HiRA: weights are multiplied by 1 + B A (ICLR 2025)."""

    kind: ClassVar[str] = "hira"
    name: Literal["hira"]
    rank: Annotated[int, Field(gt=0)] = 16


class FullMethod(Section):
    """Full fine-tuning: the weights themselves, in float32."""

    name: Literal["full"]
    scope: Scope = ["language", "projector"]
    modules: Literal["all", "attn", "mlp", "both"] = "all"
    """"all" is every parameter of the parts: embeddings, norms and biases too; the others are the weights that masks
    would be put on."""
    layers: str | list[int] = "all"
    target_modules: list[str] | str | None = None

    def check(self) -> None:
        """Raise UserError where values do not go together."""
        _targets(self)
        if self.modules == "all" and self.layers != "all" and self.target_modules is None:
            raise UserError(
                f"method.layers is {self.layers!r}, but method.modules is 'all', which trains whole parts of the "
                "model. Set method.modules to attn, mlp or both."
            )


class ProjectorMethod(Section):
    """Stage 1: train the projector whole, everything else frozen."""

    name: Literal["projector"]

    def check(self) -> None:
        """There is nothing that could contradict itself."""


Method = MaskMethod | LoraMethod | UniLoraMethod | HiraMethod | FullMethod | ProjectorMethod
QUANTIZABLE = ("mask", "lora")
"""Methods that train beside frozen weights in 4 or 8 bits."""


def is_fixed(method: Method) -> bool:
    """Whether the method trains nothing, since its mask is fixed."""
    return isinstance(method, MaskMethod) and method.fixed != "none"


def trains_projector(method: Method) -> bool:
    """Whether the projector is trained whole beside an adapter."""
    return bool(getattr(method, "train_projector", False))


def _targets(method: Any) -> Targets:
    layers, names = (
        tuple(given) if isinstance(given, list) else given for given in (method.layers, method.target_modules)
    )
    return Targets(tuple(method.scope), method.modules, layers, names)


def _check_projector(method: Any) -> None:
    if method.train_projector and method.target_modules is None and "projector" in method.scope:
        raise UserError(
            "method.train_projector is true, but method.scope has the projector too, which puts an adapter on it. "
            "Set method.scope to [language], or leave train_projector out."
        )
