"""How quantised linear layers keep their weight.

Layers are known by the names of their classes, so that no library is imported before one of its layers is met.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskft.errors import ModelError
from maskft.tuner.foreign import MASKABLE


@dataclass(frozen=True)
class Stored:
    """A quantised weight as its library keeps it.

    Attributes:
        data: the codes; for torchao the tensor subclass that holds everything.
        scales: bitsandbytes' QuantState (4 bits) or the rows' largest absolute values (8 bits).
    """

    data: Tensor
    scales: Any = None


class Format(ABC):
    """How a library keeps the weight of a linear layer.

    Attributes:
        backend_name: what PEFT's `get_layer_status` calls it.
    """

    backend_name: ClassVar[str]
    layer_type = "linear"
    supports_merge = True

    @abstractmethod
    def read(self, module: Any, *, exact: bool = True) -> Stored:
        """The module's packed weight, not a copy of it.

        Args:
            module: the layer.
            exact: refuse a weight that the layer's own forward pass may have rounded.

        Raises:
            ModelError: it cannot be unpacked, or not exactly.
        """

    @abstractmethod
    def unpack(self, packed: Stored) -> Tensor:
        """W (out, in)."""

    @abstractmethod
    def pack(self, weight: Tensor, like: Stored) -> Stored:
        """W (out, in) in the scheme of another packed weight.

        Raises:
            ModelError: weights of this kind cannot be packed.
        """

    @abstractmethod
    def write(self, module: Any, packed: Stored) -> None:
        """Give the module a packed weight in place of its own, which stays as it is."""


class Bits4(Format):
    """bitsandbytes' nf4 and fp4: a code of 16 values, scaled by the largest absolute value of each block."""

    backend_name = "bnb 4bit"

    def read(self, module: Any, *, exact: bool = True) -> Stored:
        parameter = module.weight
        state = getattr(parameter, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            raise ModelError("it is not quantised yet. Move the model to its device before putting masks on it.")
        if getattr(state, "packing_format_for_cpu", False):
            state = _undo_repacking(parameter, state, exact)
        return Stored(parameter.data, state)

    def unpack(self, packed: Stored) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = packed.scales
        shape = state.shape
        if shape[-1] % state.blocksize:  # bitsandbytes packs without regard to rows, and unpacks row by row on a CPU
            state = copy(state)
            state.shape = torch.Size((1, shape.numel()))
        weight: Tensor = dequantize_4bit(packed.data, state)
        return weight.view(shape)

    def pack(self, weight: Tensor, like: Stored) -> Stored:
        from bitsandbytes.functional import quantize_4bit

        scheme = like.scales
        codes, state = quantize_4bit(
            weight.to(scheme.dtype).contiguous(),
            blocksize=scheme.blocksize,
            compress_statistics=scheme.nested,
            quant_type=scheme.quant_type,
            quant_storage=like.data.dtype,
        )
        return Stored(codes, state)

    def write(self, module: Any, packed: Stored) -> None:
        parameter = module.weight
        packed.scales.to(parameter.device)
        parameter.data = packed.data.to(parameter.device)
        parameter.quant_state = packed.scales
        module.quant_state = packed.scales


class Bits8(Format):
    """bitsandbytes' LLM.int8: 127 steps to either side, up to the largest absolute value of each row."""

    backend_name = "bnb 8bit"

    def read(self, module: Any, *, exact: bool = True) -> Stored:
        parameter = module.weight
        scales = getattr(parameter, "SCB", None)
        if scales is None:
            scales = module.state.SCB  # where the layer's own forward pass puts it
        if scales is None or parameter.dtype != torch.int8:
            raise ModelError(
                "it is not quantised, or keeps its weights in fp16. Load the base with has_fp16_weights=False, and "
                "move it to its device before putting masks on it."
            )
        return Stored(parameter.data, scales)

    def unpack(self, packed: Stored) -> Tensor:
        scales = packed.scales.to(device=packed.data.device, dtype=torch.float32)
        return packed.data.float().mul_(scales.view(-1, 1) / 127)

    def pack(self, weight: Tensor, like: Stored) -> Stored:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return Stored(codes, scales)

    def write(self, module: Any, packed: Stored) -> None:
        parameter = module.weight
        parameter.data = parameter.CB = packed.data.to(parameter.device)
        parameter.SCB = packed.scales.to(parameter.device)
        module.state.reset_grads()  # so that the layer's own forward pass takes both from the parameter


class Torchao(Format):
    """torchao's tensor subclasses that can be turned back into a full weight."""

    backend_name = "torchao"

    def read(self, module: Any, *, exact: bool = True) -> Stored:
        weight = module.weight
        if not hasattr(weight, "dequantize") or getattr(weight, "act_pre_scale", None) is not None:
            raise ModelError(
                f"its weight is torchao's {type(weight).__name__}, which gives no full weight. {MASKABLE}."
            )
        return Stored(weight)

    def unpack(self, packed: Stored) -> Tensor:
        weight: Tensor = packed.data.dequantize()
        return weight

    def pack(self, weight: Tensor, like: Stored) -> Stored:
        data: Any = like.data
        kind = type(data).__name__
        weight = weight.to(data.dtype)
        if kind == "Int8Tensor":
            kept = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
            rest = {name: getattr(data, name) for name in kept}
            return Stored(type(data).from_hp(weight, _granularity(data), mapping_type=_mapping(data), **rest))
        if kind == "IntxUnpackedToInt8Tensor":
            rest = {"activation_quantization": data.activation_quantization, "mapping_type": _mapping(data)}
            return Stored(type(data).from_hp(weight, data.block_size, data.target_dtype, **rest))
        raise ModelError(
            f"a mask cannot be merged into torchao's {kind}, since the result cannot be quantised again. Use "
            "maskft.tuner.merge_in_full_precision or `maskft export`."
        )

    def write(self, module: Any, packed: Stored) -> None:
        module.weight = nn.Parameter(packed.data.to(module.weight.device), requires_grad=False)


BITS4, BITS8, TORCHAO = Bits4(), Bits8(), Torchao()


def format_of(module: nn.Module, parameter_name: str = "weight") -> Format | None:
    """How a module keeps its weight, or another parameter; None for a plain tensor and for schemes not known."""
    kind = type(getattr(module, parameter_name, None))
    if kind.__name__ == "Params4bit" or "Linear4bit" in {base.__name__ for base in type(module).__mro__}:
        return BITS4
    if kind.__name__ == "Int8Params":
        return BITS8
    return TORCHAO if kind.__module__.startswith("torchao.") else None


def keep_from_repacking(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers, with masks or without, keep their weight as it is, and undo what was done.

    In evaluation mode they repack it for CPUs with AVX512-BF16. What they compute from then on has no gradient, so
    that one evaluation would spoil all training after it.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                BITS4.read(layer, exact=False)


def unpacked_shape(module: Any, weight: Any) -> Any:
    """Something with the shape of a module's weight in full: the weight, or for 4-bit codes a tensor without values."""
    if format_of(module) is not BITS4:
        return weight
    return torch.empty((module.out_features, module.in_features), device="meta")


def _undo_repacking(parameter: Any, state: Any, exact: bool) -> Any:
    """Put back the order of a 4-bit weight that its layer's forward pass has repacked for this CPU; returns its state.

    The scales stay rounded to bf16, in which those of a bf16 weight without double quantisation are exact.
    """
    if exact and (state.original_nested or state.original_dtype != torch.bfloat16):
        raise ModelError(
            "bitsandbytes has repacked its weight for this CPU, which rounds the scales. Load the base anew and put "
            "the masks on it before it is run, or load it in bf16 without double quantisation, where nothing is lost."
        )
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False
    parameter.data, state = _convert_weight_packed_for_cpu_inverse(parameter.data, state)
    if state.absmax.dim() == 2:  # left as (blocks of a row, rows)
        state.absmax = state.absmax.T.reshape(-1).float()
    parameter.quant_state = state
    return state


def _granularity(data: Any) -> Any:
    """What of an int8 weight shares a scale, as torchao's configurations say it."""
    from torchao.quantization import PerGroup, PerRow, PerTensor

    width = data.block_size[-1]
    if data.scale.numel() == 1:
        return PerTensor()
    return PerRow() if width == data.shape[-1] else PerGroup(width)


def _mapping(data: Any) -> Any:
    """Whether the codes of a weight have a zero point of their own."""
    from torchao.quantization.quant_primitives import MappingType

    zeros = data.zero_point
    return MappingType.SYMMETRIC if zeros is None or not zeros.any() else MappingType.ASYMMETRIC
