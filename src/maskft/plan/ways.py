"""Ways to train a base, and what each keeps for a trained number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskft.linear import Mask, masked_and_gradient
from maskft.memory import MODES, Mode, use_kernels
from maskft.optim import SMALL
from maskft.plan.skeleton import Skeleton
from maskft.scores import Dense
from maskft.tuner import MaskConfig, Peer, Targets, attach
from maskft.tuner.layer import MaskLayer
from maskft.whole import train_whole

PLAIN = Mode("float32", "float32", step_in_backward=False)
"""AdamW as Trainer makes it."""
SAME = Mode("float32", "same", step_in_backward=False)
"""AdamW on weights in bf16, whose moments are bf16."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: for tables.
        kind: "mask", "lora" (which stands for all adapters of other methods), "full" or "projector".
        mode: what is kept for each trained number: see `maskft.memory`, and below for what is no mask.
        config: of the masks, for "mask"; for "lora" its layers are those that get factors.
        rank: of LoRA.
        quantization: of the frozen language model, as `ModelSection.quantization` has it.
        dtype: of all weights, where it isn't the recipe's.
        compiled: masks are computed by compiled code.
        clipped: gradients are clipped, for which they are written down.
        peer: an adapter of another method; default: LoRA of `rank`.
        whole: names of modules that are trained whole beside an adapter.
        trained: names of the parameters that "full" trains, in fp32; default: all outside the vision encoder.
    """

    name: str
    kind: str
    mode: Mode
    config: MaskConfig
    rank: int = 0
    quantization: str = "none"
    dtype: torch.dtype | None = None
    compiled: bool = True
    clipped: bool = False
    peer: Peer | None = None
    whole: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    def key(self) -> Any:
        """What a pass through the model depends on; ways that share it differ in bytes per trained number alone."""
        described = tuple(sorted((k, str(v)) for k, v in self.config.to_dict().items()))
        own = self.peer, self.whole, self.trained
        return self.kind, described, self.rank, self.quantization, self.dtype, self.compiled, self.fused, own

    @property
    def fused(self) -> bool:
        """Whether layers with dense scores make their step without writing down a gradient."""
        return self.kind == "mask" and self.compiled and self.mode.step_in_backward and not self.clipped

    @property
    def adds_up(self) -> bool:
        """Whether gradients of masked weights are added up over the passes of a step, in place of the scores'."""
        return self.fused and self.config.score_layout == "dense"

    @property
    def caches(self) -> bool:
        """Whether masked weights are kept from one forward pass of a step to the next."""
        return self.kind == "mask" and self.compiled and self.mode == MODES["fast"]

    def in_pieces(self) -> Way:
        """The same where several processes share the training state: it is kept in fp32 and changed after backward."""
        moments = "float32" if self.mode.moments == "int8" else self.mode.moments
        return replace(self, mode=replace(self.mode, moments=moments, step_in_backward=False), compiled=False)

    def attached(self, skeleton: Skeleton, depth: int | None) -> Any:
        """A copy of the base, of `depth` layers, ready to train but for its values, on the meta device."""
        model = skeleton.shortened(depth)
        names = _present(model, self.config.target_modules or ())
        parameters = _present(model, self.config.target_parameters or ())
        if self.dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.dtype)
        if self.kind == "mask":
            named: dict[str, Any] = {"target_modules": set(names), "target_parameters": parameters or None}
            masked = attach(model, replace(self.config, **named), whole=self.whole)
            if self.compiled:
                use_kernels(masked)
            for layer in masked.modules() if self.fused else ():
                if isinstance(layer, MaskLayer):
                    dense = [name for name, layout in layer.mask_layout.items() if isinstance(layout, Dense)]
                    layer.score_steps.update(dict.fromkeys(dense, _Step()))
            return masked
        if self.kind == "lora":
            targets = Targets(target_modules=tuple(names), parameters=tuple(parameters))
            peer = replace(self.peer, targets=targets) if self.peer else Peer("lora", targets, self.rank)
            return attach(model, peer, whole=self.whole)
        if self.trained:
            train_whole(model, _present(model, self.trained))
            return model
        if self.kind == "full":
            frozen = skeleton.vision()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen is None or not name.startswith(f"{frozen}."))
            return model
        for name in names:
            model.get_submodule(name).float().requires_grad_(True)
        return model


def with_mode(name: str, config: MaskConfig, mode: Mode, quantization: str) -> Way:
    """Dense or other scores, in a memory mode."""
    return Way(name, "mask", mode, replace(config, score_dtype=mode.score_dtype), quantization=quantization)


def moment_bytes(mode: Mode, trained: Tensor) -> int:
    """Both of Adam's moments of one trained tensor."""
    n = trained.numel()
    if mode.moments == "int8" and n >= SMALL:  # codes, and a scale in fp32 for each row
        return 2 * n + 2 * 4 * (n // trained.shape[-1] if trained.dim() > 1 else 1)
    return 2 * n * (trained.element_size() if mode.moments == "same" else 4)


def pack(model: nn.Module, names: Iterable[str], quantization: str) -> None:
    """Make linear layers as large as quantised ones, and let them unpack their weight as those do.

    Called on a model with adapters, whose values don't matter.

    Args:
        model: holds the layers, under adapters or not.
        names: of the layers in the base.
        quantization: "nf4", "fp4", "int8" or "int8-torchao".
    """
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    base = unwrap()
    for name in names:
        outer: Any = base.get_submodule(name)
        layer: Any = outer.get_base_layer() if hasattr(outer, "get_base_layer") else outer
        weight, dtype = layer.weight, layer.weight.dtype
        wide = torch.float32 if quantization == "int8" else dtype
        unpack = partial(torch.empty, weight.shape, dtype=wide)
        packed = weight.new_empty(packed_bytes(weight, quantization), dtype=torch.uint8)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.forward = partial(_unpacked_linear, unpack=unpack, bias=layer.bias)
        if isinstance(outer, MaskLayer):
            outer.weight_source = partial(_source, unpack)  # type: ignore[method-assign]
            outer.weight_dtype = partial(_source, dtype)  # type: ignore[method-assign]


def packed_bytes(weight: Tensor, quantization: str) -> int:
    """Codes and scales of a quantised weight (out, in)."""
    n, rows = weight.numel(), weight.shape[0]
    if quantization in ("nf4", "fp4"):  # a scale in fp32 for 64 values
        return math.ceil(n / 2) + 4 * math.ceil(n / 64)
    return n + (4 if quantization == "int8" else weight.element_size()) * rows


def _present(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that are in the model."""
    there = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    return sorted(name for name in names if name in there)


def _source(value: Any) -> Any:
    return value


class _Step:
    """What `maskft.memory.FusedStep` makes, without the values."""

    def takes(self) -> bool:
        return True

    def __call__(self, mask: Mask, weight: Tensor, dmasked: Tensor) -> Tensor:
        if mask.fused:
            return torch.empty_like(dmasked)
        return masked_and_gradient(dmasked, weight, mask.raw_offset(weight), mask.gate)[0]


class _Unpacked(torch.autograd.Function):
    """x W^T + b with a W that is unpacked in either direction and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Any, bias: Tensor | None) -> Tensor:
        ctx.unpack = unpack
        return F.linear(x, unpack().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.unpack().to(grads[0].dtype), None, None


def _unpacked_linear(x: Tensor, *, unpack: Any, bias: Tensor | None) -> Tensor:
    y: Tensor = _Unpacked.apply(x, unpack, bias)  # type: ignore[no-untyped-call]
    return y
