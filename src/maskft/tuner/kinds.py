"""Masked layers of every kind, and which one a module gets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransposedLinear

from maskft.errors import ModelError
from maskft.targets import lies_transposed
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import Linear, MaskLayer
from maskft.tuner.quantized import quantized_kind
from maskft.tuner.sharding import full_shape


class OddLinear(Linear):
    """A linear layer with a forward pass of its own, which is run on the masked weight."""

    masked_forward = MaskLayer.masked_forward


class Conv1D(Linear):
    """GPT-2's linear layer, named so by Transformers, whose weight lies as (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT


class Conv(Linear):
    """A convolution in one to three dimensions, also grouped; its weight is (out, in / groups * kernel)."""

    masked_forward = MaskLayer.masked_forward

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.frozen_parameter().shape)


class Embedding(Linear):
    """A table of embeddings, (tokens, width)."""

    masked_forward = MaskLayer.masked_forward


class ParamWrapper(Linear):
    """A module with a masked parameter of its own, such as the weights (experts, out, in) of a mixture of experts.

    Several parameters of one module are masked by wrapping it several times.
    """

    masked_forward = MaskLayer.masked_forward

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, *, parameter_name: str, **kwargs: Any
    ) -> None:
        self.parameter_name = parameter_name
        self.transposed = lies_transposed(parameter_name, base_layer)
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def unmatrix(self, matrix: Tensor) -> Tensor:
        return self.matrix(matrix)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare module, with all wraps taken off; called by PEFT."""
        wrapper: nn.Module = self
        while isinstance(wrapper, ParamWrapper):
            if merge:
                wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            wrapper = wrapper.base_layer
        return wrapper

    def __repr__(self) -> str:
        kind, rest = super().__repr__().split("(", 1)
        return f"{kind}(\n  parameter_name='{self.parameter_name}',{rest}"


def make_layer(
    target: nn.Module, adapter_name: str, config: MaskConfig, *, name: str, parameter_name: str | None, **kwargs: Any
) -> MaskLayer:
    """The masked layer for a module.

    Args:
        target: the module to wrap.
        adapter_name: name of its first adapter.
        config: the adapter's configuration.
        name: the module's name, for messages.
        parameter_name: the parameter to mask where it is not the module's `weight`.

    Raises:
        ModelError: there is no masked layer for a module of this kind.
    """
    base = target
    while isinstance(base, MaskLayer):
        base = base.frozen()
    if quantized := quantized_kind(base, name, parameter_name):
        return quantized(target, adapter_name, config, **kwargs)
    if hasattr(base, parameter_name or "weight") and (parameter_name or "weight") not in base._parameters:
        raise ModelError(
            f"'{name}' cannot be masked: its weight is computed from other parameters, as by weight_norm. Make it a "
            "parameter of its own (torch.nn.utils.parametrize.remove_parametrizations), or take it out of the targets."
        )
    if parameter_name is not None:
        dimensions = len(full_shape(getattr(base, parameter_name)))
        if dimensions < 2:
            raise ModelError(f"'{name}' cannot be masked: it has {dimensions} dimension, and a mask needs 2 or more.")
        return ParamWrapper(target, adapter_name, config, parameter_name=parameter_name, **kwargs)
    kind = _kind(base)
    weight = getattr(base, "weight", None)
    if kind is None or not isinstance(weight, Tensor):
        raise ModelError(
            f"'{name}' cannot be masked: a {type(base).__name__} has no masked layer. Linear, Conv1D, Conv1d, Conv2d, "
            "Conv3d and Embedding have one; name other parameters in target_parameters. Take it out of target_modules."
        )
    if not weight.is_floating_point():
        raise ModelError(
            f"'{name}' cannot be masked: its weight is of type {weight.dtype}. Load the base in bf16, fp16 or fp32."
        )
    return kind(target, adapter_name, config, **kwargs)


def _kind(base: nn.Module) -> type[Linear] | None:
    if isinstance(base, nn.Linear):
        return Linear if type(base).forward is nn.Linear.forward else OddLinear
    if isinstance(base, TransposedLinear):
        return Conv1D
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Conv
    return Embedding if isinstance(base, nn.Embedding) else None
