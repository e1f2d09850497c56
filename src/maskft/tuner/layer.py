"""The masked linear layer, as PEFT wants its layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from maskft.errors import ModelError
from maskft.gates import Gate
from maskft.linear import Mask, masked_linear, masked_weight, plain_masked_linear
from maskft.scores import dense_offsets
from maskft.tuner.config import MaskConfig


class MaskLayer(BaseTunerLayer):
    """What every masked layer keeps: one score tensor and one gate per adapter."""

    adapter_layer_names: tuple[str, ...] = ("mask_scores",)
    other_param_names: tuple[str, ...] = ("mask_gate",)

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.mask_scores = nn.ParameterDict({})
        self.mask_gate: dict[str, Gate] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise ModelError(
                f"a mask cannot be put on a {type(base).__name__}: only linear layers are supported. "
                "Take it out of target_modules."
            )
        self.in_features, self.out_features = base.in_features, base.out_features

    def update_layer(self, adapter_name: str, config: MaskConfig) -> None:
        """Add an adapter whose offsets D have the weight's shape (out, in), fp32, on the weight's device."""
        weight = self.frozen().weight
        if not weight.is_floating_point():
            raise ModelError(
                f"a mask cannot be put on a weight of type {weight.dtype}: load the base in bf16, fp16 or fp32."
            )
        self.mask_gate[adapter_name] = config.make_gate()
        offsets = dense_offsets(weight.shape, device=weight.device, std=config.start_std())
        self.mask_scores[adapter_name] = nn.Parameter(offsets)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but the offsets keep their own dtype: bf16 could not hold small steps."""
        if adapter_name not in self.mask_scores:
            return
        scores = self.mask_scores[adapter_name]
        target = device if device is not None else self.frozen().weight.device
        if "meta" not in (scores.device.type, target.type) and scores.device != target:
            self.mask_scores[adapter_name] = nn.Parameter(
                scores.detach().to(target), requires_grad=scores.requires_grad
            )

    def frozen(self) -> nn.Linear:
        """The pre-trained layer under the mask."""
        base: nn.Linear = self.get_base_layer()
        return base

    def pretrained_weight(self) -> Tensor:
        """W as it was before any merge, (out, in)."""
        return self.frozen().weight.detach() if self._unmerged_weight is None else self._unmerged_weight

    def active_masks(self) -> list[Mask]:
        """Masks that the forward pass applies; none where adapters are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return self.masks([name for name in self.active_adapters if name in self.mask_scores])

    def _prepare_input(self, x: Tensor) -> Tensor:
        """x in the dtype to compute in: autocast's where it is on, else the frozen weight's."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.frozen().weight.dtype
        cast: Tensor = self._cast_input_dtype(x, dtype)
        return cast

    def masks(self, adapter_names: list[str]) -> list[Mask]:
        """Offsets and gate of each adapter."""
        return [(self.mask_scores[name], self.mask_gate[name]) for name in adapter_names]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W * (m - 1) of one adapter, (out, in), in the dtype of the offsets (at least fp32)."""
        weight = self.pretrained_weight()
        with torch.no_grad():
            masked = masked_weight(weight, self.masks([adapter]))
        return masked - weight.to(masked.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """W * (m - 1) is an additive update."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W by its masked value; masks of several adapters multiply.

        Args:
            safe_merge: check that scores and result are finite before anything is changed.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: with `safe_merge`, when a score or a merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mask_scores]
        if not names:
            return
        base = self.frozen()
        original = self.pretrained_weight()
        everything = [*self.merged_adapters, *names]
        with torch.no_grad():
            merged = masked_weight(original, self.masks(everything)).to(original.dtype)
        # a score that is not a number can hide behind a hard gate, so the scores are looked at as well
        if safe_merge and not all(torch.isfinite(t).all() for t in (merged, *(self.mask_scores[n] for n in names))):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if self._unmerged_weight is None:
            self._unmerged_weight = original.clone()
        base.weight.data.copy_(merged)
        self.merged_adapters = everything

    def unmerge(self) -> None:
        """Put the saved pre-trained weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._unmerged_weight is not None
        self.frozen().weight.data.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters = []


class Linear(nn.Module, MaskLayer):
    """A frozen linear layer whose weight is multiplied by learnt gates: y = x (W * m)^T + b."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, **kwargs: Any) -> None:
        super().__init__()
        MaskLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        masks = self.active_masks()
        if not masks:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        x, base = self._prepare_input(x), self.frozen()
        if len(masks) == 1:
            return masked_linear(x, base.weight, base.bias, masks[0])
        return plain_masked_linear(x, base.weight, base.bias, masks)

    def __repr__(self) -> str:
        return "mask." + super().__repr__()
