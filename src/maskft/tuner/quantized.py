"""Masks on quantised linear layers: bitsandbytes in 8 and in 4 bits, torchao.

The frozen weight stays as its library packs it. The forward and the backward pass each unpack it into a full W, mask
that like any other weight, and drop it. The layer's own forward pass is never run: in bitsandbytes' 4-bit layers it
repacks the weight for some CPUs, in the 8-bit ones it rounds the activations as well, and the model with and without
its masks is to be computed alike.

Merging packs W * m in the scheme of W, which rounds it: by at most half the widest gap of the code, times the largest
|W * m| among the weights that share a scale. docs/quantised.md has the numbers.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from maskft.errors import ModelError
from maskft.linear import Mask, Weight, masked_linear, masked_weight
from maskft.tuner.foreign import foreign_layers, refuse_foreign
from maskft.tuner.formats import BITS4, BITS8, TORCHAO, Format, Stored, format_of
from maskft.tuner.layer import Linear, MaskLayer


class QuantizedLinear(Linear):
    """A quantised linear layer whose weight is unpacked, multiplied by learnt gates, and dropped again."""

    quantization_backend: ClassVar[Format]

    def matrix_shape(self) -> torch.Size:
        """(out, in), whatever the shape of the packed weight."""
        frozen: Any = self.frozen()
        return torch.Size((frozen.out_features, frozen.in_features))

    def weight_source(self) -> Weight:
        return self.get_base_weight

    def get_base_weight(self) -> Tensor:
        """W in full as it is now, merged or not."""
        return self.decode(self.save_weight())

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Pack and store W, as PEFT's method of that name."""
        self.write_weight(weight_data)

    def pretrained_weight(self) -> Tensor:
        return self.decode(self.save_weight() if self._unmerged is None else self._unmerged)

    @torch.no_grad()
    def decode(self, stored: Any) -> Tensor:
        return self.quantization_backend.unpack(stored)

    def save_weight(self) -> Stored:
        """The packed weight itself; merging puts another in its place."""
        return self.quantization_backend.read(self.frozen())

    def restore_weight(self, saved: Any) -> None:
        with torch.inference_mode(False):  # a parameter made in inference mode could never be trained through
            self.quantization_backend.write(self.frozen(), saved)

    def write_weight(self, weight: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.restore_weight(self.quantization_backend.pack(weight, self.save_weight()))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As for a weight in full precision, but W * m is quantised again, which changes outputs a little.

        Raises:
            ModelError: the weight is of a kind that cannot be quantised again.
        """
        before = self.merged_adapters
        super().merge(safe_merge, adapter_names)
        if self.merged_adapters is not before:
            warnings.warn(
                f"Merging a mask into a quantised weight ({self.quantization_backend.backend_name}) rounds the "
                "result, which undoes part of the mask; unmerging takes that back. "
                "maskft.tuner.merge_in_full_precision rounds nothing.",
                stacklevel=2,
            )

    @torch.no_grad()
    def dense_layer(self, dtype: torch.dtype | None, safe_merge: bool, adapter_names: list[str] | None) -> nn.Linear:
        """A plain linear layer with the merged weight in full; arguments are those of `merge`."""
        names: Any = self.active_adapters if adapter_names is None else adapter_names
        masks = self.masks([*self.merged_adapters, *(name for name in names if name not in self.merged_adapters)])
        weight = masked_weight(self.pretrained_matrix(), masks)
        scores = [parameter for mask in masks for parameter in mask.parameters]
        if safe_merge and not all(torch.isfinite(t).all() for t in (weight, *scores)):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        return dense_linear(weight, self.frozen(), dtype)

    def _prepare_input(self, x: Tensor) -> Tensor:
        """x in the dtype to compute in: autocast's where it is on, else the layer's, if it has one, else its own."""
        device = x.device.type
        dtype = getattr(self.frozen(), "compute_dtype", None) or x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        cast: Tensor = MaskLayer._cast_input_dtype(self, x, dtype)
        return cast

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (..., in) -> (..., out) in the dtype of x, as bitsandbytes' layers have it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.masked_forward(self._prepare_input(x), self.active_masks()).to(x.dtype)

    def masked_forward(self, x: Tensor, masks: list[Mask], *args: Any, **kwargs: Any) -> Any:
        bias = getattr(self.frozen(), "bias", None)
        if masks:
            return masked_linear(x, self.weight_source(), bias, masks)
        return _Unpacked.apply(x, self.get_base_weight, None if bias is None else bias.to(x.dtype))  # type: ignore[no-untyped-call]


class Linear4bit(QuantizedLinear):
    """On bitsandbytes' Linear4bit."""

    quantization_backend = BITS4


class Linear8bitLt(QuantizedLinear):
    """On bitsandbytes' Linear8bitLt."""

    quantization_backend = BITS8


class TorchaoLinear(QuantizedLinear):
    """On a linear layer whose weight is one of torchao's tensor subclasses."""

    quantization_backend = TORCHAO


LAYERS = {BITS4: Linear4bit, BITS8: Linear8bitLt, TORCHAO: TorchaoLinear}


class _Unpacked(torch.autograd.Function):
    """x W^T + b, all but x frozen, with a W that is unpacked in either direction and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Any, bias: Tensor | None) -> Tensor:
        ctx.source = source
        return F.linear(x, source().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.source().to(grads[0].dtype), None, None


def quantized_kind(base: nn.Module, name: str, parameter_name: str | None = None) -> type[QuantizedLinear] | None:
    """The masked layer for a quantised module; None for one in full precision.

    Args:
        base: the module.
        name: its name, for messages.
        parameter_name: the parameter to mask, where it is not the module's weight.

    Raises:
        ModelError: it is quantised in a way that masks cannot be put on.
    """
    refuse_foreign(base, name)
    kept = format_of(base, parameter_name or "weight")
    if kept is None:
        return None
    if parameter_name is not None or not isinstance(base, nn.Linear):
        raise ModelError(
            f"'{name}' cannot be masked: it is quantised ({kept.backend_name}), and of quantised modules only linear "
            "layers can carry masks. Take it out of the targets, or leave it out when the base is quantised."
        )
    try:
        kept.read(base)
    except ModelError as error:
        raise ModelError(f"'{name}' cannot be masked: {error}") from error
    return LAYERS[kept]


def merge_in_full_precision(
    model: PeftModel,
    *,
    dtype: torch.dtype | None = None,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """The bare model with masks merged and every quantised linear layer, masked or not, made a plain one.

    Nothing is quantised again, so no rounding comes on top of that of the base. The model is changed in place and
    forgets that it was quantised; its masks cannot be unmerged afterwards.

    Args:
        model: with mask adapters.
        dtype: of the new layers' weights; default: the model's, if it has one.
        safe_merge: check that scores and merged weights are finite, as in `merge_and_unload`.
        adapter_names: adapters to merge; None merges the active ones.

    Raises:
        ModelError: a layer is quantised in a way that gives no full weight.
        ValueError: with `safe_merge`, a score or a merged weight is not finite.
    """
    bare: Any = model.get_base_model()
    wanted = dtype or getattr(bare, "dtype", None)
    for name, scheme in foreign_layers(bare):
        raise ModelError(f"'{name}' is quantised with {scheme}, which gives no full weight. Use merge_and_unload.")
    for name, module in list(bare.named_modules()):
        if isinstance(module, QuantizedLinear):
            bare.set_submodule(name, module.dense_layer(wanted, safe_merge, adapter_names))
        elif isinstance(module, nn.Linear) and not name.endswith(".base_layer") and (kept := format_of(module)):
            bare.set_submodule(name, dense_linear(kept.unpack(kept.read(module, exact=False)), module, wanted))
    _forget_quantization(bare)
    merged: nn.Module = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    return merged


def dense_linear(weight: Tensor, like: nn.Module, dtype: torch.dtype | None) -> nn.Linear:
    """A frozen plain linear layer with a weight (out, in) and the bias of another layer."""
    bias: Any = like.bias
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return layer.train(like.training)


def _forget_quantization(model: nn.Module) -> None:
    """Take away what Transformers notes on a quantised model and in its configuration."""
    for module in model.modules():
        for note in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            module.__dict__.pop(note, None)
        config = getattr(module, "config", None)
        for note in ("quantization_config", "_is_quantized"):
            if note in getattr(config, "__dict__", {}):
                delattr(config, note)
