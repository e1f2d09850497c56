"""How a family of models is described: its builder, and what a scope must find in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_TOKEN = 100
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**TEXT, "head_dim": 8}
MOE = {**WIDE, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = "mlp.experts.{gate_up,down}_proj"


@dataclass(frozen=True)
class Stack:
    """Numbered layers, and the weights in each: names in the layer, `{a,b}` for either, several apart by a space."""

    prefix: str
    layers: tuple[int, ...]
    attn: str
    mlp: str

    def names(self, kind: str, layers: Iterable[int] | None = None) -> list[str]:
        kinds = {"attn": [self.attn], "mlp": [self.mlp], "both": [self.attn, self.mlp]}[kind]
        leaves = [leaf for pattern in kinds for leaf in expanded(pattern)]
        wanted = self.layers if layers is None else layers
        return [f"{self.prefix}.{i}.{leaf}" for i in self.layers if i in wanted for leaf in leaves]


@dataclass(frozen=True)
class Family:
    """A model's builder, and where the parts of it are."""

    build: Callable[[], nn.Module]
    language: tuple[Stack, ...]
    vision: tuple[Stack, ...] = ()
    projector: str = ""
    image: Callable[[], dict[str, Tensor]] | None = None
    """Inputs that hold one image; None for a text model."""

    def names(self, part: str, kind: str = "both") -> list[str]:
        """What a scope of one part must find."""
        if part == "projector":
            return expanded(self.projector)
        stacks: tuple[Stack, ...] = getattr(self, part)
        return [name for stack in stacks for name in stack.names(kind)]


def expanded(pattern: str) -> list[str]:
    """Names that a pattern stands for."""
    names = []
    for piece in pattern.split():
        braces = re.search(r"\{(.*?)\}", piece)
        options = braces.group(1).split(",") if braces else [""]
        names += [re.sub(r"\{.*?\}", option, piece, count=1) for option in options]
    return [name for piece in names for name in (expanded(piece) if "{" in piece else [piece])]


def llama(prefix: str = "model.language_model.layers", depth: int = 3, **parts: str) -> tuple[Stack]:
    """The usual language model."""
    attn, mlp = "self_attn.{q,k,v,o}_proj", "mlp.{gate,up,down}_proj"
    return (Stack(prefix, tuple(range(depth)), parts.get("attn", attn), parts.get("mlp", mlp)),)


def clip(prefix: str = "model.vision_tower.encoder.layers", depth: int = 3, **parts: str) -> tuple[Stack]:
    """The usual vision encoder."""
    attn, mlp = "self_attn.{q,k,v,out}_proj", "mlp.{fc1,fc2}"
    return (Stack(prefix, tuple(range(depth)), parts.get("attn", attn), parts.get("mlp", mlp)),)


def pixels(*leading: int, size: int = 28, **others: Any) -> Callable[[], dict[str, Tensor]]:
    """One image, (*leading, 3, size, size)."""
    return lambda: {"pixel_values": torch.randn(*leading, 3, size, size), **others}


def patches(width: int) -> Callable[[], dict[str, Tensor]]:
    """One image of 4 x 4 patches, as the Qwen models take them."""
    return lambda: {"pixel_values": torch.randn(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def tokens() -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
