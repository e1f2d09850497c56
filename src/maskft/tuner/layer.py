"""The masked layers, as PEFT wants its layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransposedLinear

from maskft.errors import ModelError
from maskft.gates import Gate, TopK
from maskft.linear import Mask, ScoreStep, Weight, WeightCache, masked_linear, masked_weight
from maskft.scores import Layout
from maskft.tuner.config import MaskConfig
from maskft.tuner.ranking import GlobalRanking
from maskft.tuner.sharding import full_shape, is_partitioned, refuse_sharded


class MaskLayer(BaseTunerLayer):
    """What every masked layer keeps: per adapter one gate, one layout of scores, and the scores.

    Scores are kept for the frozen weight seen as a matrix (..., out, in), whatever shape the layer keeps it in;
    `matrix` and `unmatrix` go from one to the other. Row-wise scores belong to outputs in every kind of layer.
    """

    adapter_layer_names: tuple[str, ...] = ("mask_scores", "mask_left", "mask_right")
    other_param_names: tuple[str, ...] = ("mask_gate", "mask_layout", "mask_ranking")
    parameter_name = "weight"
    """The base layer's parameter that is masked."""

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.mask_scores = nn.ParameterDict({})
        self.mask_left = nn.ParameterDict({})
        self.mask_right = nn.ParameterDict({})
        self.mask_gate: dict[str, Gate] = {}
        self.mask_layout: dict[str, Layout] = {}
        self.mask_ranking: dict[str, GlobalRanking] = {}
        self.compiled = False
        self.weight_cache: WeightCache | None = None
        self.score_steps: dict[str, ScoreStep] = {}
        self.awaited: dict[str, Any] = {}  # hooks; see maskft.tuner.packed.await_scores
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Any = None  # the weight before it was merged, as `save_weight` gives it
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.out_features, self.in_features = self.matrix_shape()[-2:]

    # -- the frozen weight ------------------------------------------------------------------------------------------

    def frozen(self) -> nn.Module:
        """The pre-trained layer under the mask."""
        base: nn.Module = self.get_base_layer()
        return base

    def frozen_parameter(self) -> nn.Parameter:
        """The pre-trained parameter itself, in whatever form the base keeps it."""
        parameter: nn.Parameter = getattr(self.frozen(), self.parameter_name)
        return parameter

    def matrix(self, weight: Tensor) -> Tensor:
        """View of a weight as (..., out, in)."""
        return weight

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The way back from `matrix`."""
        return matrix

    def matrix_shape(self) -> torch.Size:
        """(..., out, in), also where DeepSpeed keeps the weight in pieces."""
        return self.matrix(torch.empty(full_shape(self.frozen_parameter()), device="meta")).shape

    def weight_dtype(self) -> torch.dtype:
        """The dtype to compute in outside autocast."""
        return self.frozen_parameter().dtype

    def decode(self, stored: Any) -> Tensor:
        """The weight in full, in the layer's own shape, from the form the base keeps it in."""
        weight: Tensor = stored.detach()
        return weight

    def write_weight(self, weight: Tensor) -> None:
        """Replace the weight's values, in the form the base keeps it in."""
        self.frozen_parameter().data.copy_(weight)

    def save_weight(self) -> Any:
        """A copy of the weight as it is stored, from which `restore_weight` puts back every bit."""
        return self.frozen_parameter().detach().clone()

    def restore_weight(self, saved: Any) -> None:
        """Put a copy made by `save_weight` back."""
        self.frozen_parameter().data.copy_(saved)

    def weight_source(self) -> Weight:
        """W as (..., out, in) for the forward pass: itself, or where it is quantised what returns it in full."""
        return self.matrix(self.frozen_parameter())

    def pretrained_weight(self) -> Tensor:
        """W as it was before any merge, in the layer's own shape.

        Raises:
            ModelError: it is in pieces on several processes.
        """
        stored = self.frozen_parameter() if self._unmerged is None else self._unmerged
        refuse_sharded(stored, "merging a mask or reading what it covers")
        return self.decode(stored)

    def pretrained_matrix(self) -> Tensor:
        """W as it was before any merge, (..., out, in)."""
        return self.matrix(self.pretrained_weight())

    # -- adapters ---------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: MaskConfig, slices: tuple[int, ...] = ()) -> None:
        """Add an adapter with scores at their start.

        Args:
            adapter_name: its name.
            config: gate and layout.
            slices: heights of the matrices stacked in this one, see `maskft.gates.TopK`.
        """
        gate, layout = config.make_gate(), config.make_layout()
        self.mask_gate[adapter_name] = replace(gate, slices=slices) if isinstance(gate, TopK) else gate
        self.mask_layout[adapter_name] = layout
        parameters = layout.create(
            self.matrix_shape(), config.start_std(), device=self.frozen_parameter().device, dtype=config.torch_dtype()
        )
        for name, parameter in zip(layout.names, parameters, strict=True):
            getattr(self, f"mask_{name}")[adapter_name] = nn.Parameter(parameter)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but the scores keep their own dtype: bf16 could not hold small steps."""
        target = device if device is not None else self.frozen_parameter().device
        for name in self.adapter_layer_names:
            kept = getattr(self, name)
            if adapter_name not in kept:
                continue
            scores = kept[adapter_name]
            if "meta" not in (scores.device.type, target.type) and scores.device != target:
                kept[adapter_name] = nn.Parameter(scores.detach().to(target), requires_grad=scores.requires_grad)

    def cast_scores(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Give one adapter's scores a dtype, as new parameters where they have another."""
        for name, scores in self.named_scores(adapter_name):
            if scores.dtype != dtype:
                cast = nn.Parameter(scores.detach().to(dtype), requires_grad=scores.requires_grad)
                getattr(self, name)[adapter_name] = cast

    def named_scores(self, adapter_name: str) -> list[tuple[str, nn.Parameter]]:
        """The adapter's scores and where they are kept, in the order of its layout."""
        names = [f"mask_{name}" for name in self.mask_layout[adapter_name].names]
        return [(name, getattr(self, name)[adapter_name]) for name in names]

    def scores(self) -> Iterator[nn.Parameter]:
        """Scores of all adapters."""
        for name in self.mask_layout:
            yield from self.parameters_of(name)

    def parameters_of(self, adapter_name: str) -> tuple[nn.Parameter, ...]:
        """The adapter's scores, in the order of its layout."""
        return tuple(scores for _, scores in self.named_scores(adapter_name))

    def mask(self, adapter_name: str, gate: Gate | None = None) -> Mask:
        """One adapter's mask; with another gate where one is given."""
        if gate is None:
            ranking = self.mask_ranking.get(adapter_name)
            gate = self.mask_gate[adapter_name] if ranking is None else ranking.gate(self)
        parameters, layout = self.parameters_of(adapter_name), self.mask_layout[adapter_name]
        step = self.score_steps.get(adapter_name)
        return Mask(gate, parameters, layout, self.compiled, self.weight_cache, step)

    def masks(self, adapter_names: list[str]) -> list[Mask]:
        """Masks of several adapters, of those this layer has."""
        return [self.mask(name) for name in adapter_names if name in self.mask_layout]

    def active_masks(self) -> list[Mask]:
        """Masks that the forward pass applies; none where adapters are disabled or merged."""
        return [] if self.disable_adapters or self.merged else self.masks(self.active_adapters)

    # -- merging ----------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W * (m - 1) of one adapter, in the weight's shape and the dtype of the gates (at least fp32)."""
        weight = self.pretrained_matrix()
        with torch.no_grad():
            masked = masked_weight(weight, self.masks([adapter]))
        return self.unmatrix(masked - weight.to(masked.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """W * (m - 1) is an additive update; PEFT can factor that of a linear layer."""
        return self.parameter_name == "weight" and isinstance(self.frozen(), nn.Linear | TransposedLinear)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W by its masked value; masks of several adapters multiply.

        Args:
            safe_merge: check that scores and result are finite before anything is changed.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            ValueError: with `safe_merge`, when a score or a merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mask_layout]
        if not names:
            return
        original = self.pretrained_weight()
        everything = [*self.merged_adapters, *names]
        with torch.no_grad():
            merged = self.unmatrix(masked_weight(self.matrix(original), self.masks(everything))).to(original.dtype)
        # a score that is not a number can hide behind a hard gate, so the scores are looked at as well
        scores = [parameter for name in names for parameter in self.parameters_of(name)]
        if safe_merge and not all(torch.isfinite(t).all() for t in (merged, *scores)):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if self._unmerged is None:
            self._unmerged = self.save_weight()
        self.write_weight(merged)
        self.merged_adapters = everything

    def unmerge(self) -> None:
        """Put the saved pre-trained weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._unmerged is not None
        self.restore_weight(self._unmerged)
        self._unmerged = None
        self.merged_adapters = []

    # -- forward ----------------------------------------------------------------------------------------------------

    def _prepare_input(self, x: Tensor) -> Tensor:
        """x in the dtype to compute in: autocast's where it is on, else the frozen weight's."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight_dtype()
        cast: Tensor = self._cast_input_dtype(x, dtype)
        return cast

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with its weight masked.

        Raises:
            ModelError: the weight is offloaded.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        masks = self.active_masks()
        if not masks:
            return self.base_layer(x, *args, **kwargs)
        if self.frozen_parameter().is_meta and not x.is_meta:
            raise ModelError(
                "a masked layer's weight is on no device: accelerate has offloaded it, and would fetch it for the base "
                "layer alone. Load the model with a device_map that holds it whole, or merge the mask first."
            )
        return self.masked_forward(x, masks, *args, **kwargs)

    def masked_forward(self, x: Tensor, masks: list[Mask], *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward pass, run on the masked weight in the dtype of the weight."""
        masked = self.unmatrix(masked_weight(self.weight_source(), masks)).contiguous()
        # DeepSpeed's hooks on the base layer would take the masked weight for one of their partitioned parameters
        run = self.base_layer.forward if is_partitioned(self.frozen_parameter()) else self.base_layer
        with _replaced(self.frozen(), self.parameter_name, masked.to(self.weight_dtype())):
            return run(x, *args, **kwargs)


class Linear(nn.Module, MaskLayer):
    """A frozen linear layer whose weight is multiplied by learnt gates: y = x (W * m)^T + b."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MaskConfig, **kwargs: Any) -> None:
        super().__init__()
        MaskLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, kwargs.get("slices", ()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (..., in) -> (..., out)."""
        return MaskLayer.forward(self, x, *args, **kwargs)

    def masked_forward(self, x: Tensor, masks: list[Mask], *args: Any, **kwargs: Any) -> Any:
        bias = getattr(self.frozen(), "bias", None)
        return masked_linear(self._prepare_input(x), self.weight_source(), bias, masks)

    def __repr__(self) -> str:
        return "mask." + super().__repr__()


@contextmanager
def _replaced(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Inside, `module` has another tensor for a parameter, also where FSDP puts a plain attribute before that."""
    kept: dict[str, Any] = module.__dict__ if name in module.__dict__ else module._parameters
    before = kept[name]
    kept[name] = value
    try:
        yield
    finally:
        kept[name] = before
