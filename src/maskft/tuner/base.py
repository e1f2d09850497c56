"""What an adapter knows of the base it was trained on: the fingerprint of the weights under its masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from maskft.fingerprint import fingerprint
from maskft.tuner.config import MaskConfig
from maskft.tuner.kinds import ParamWrapper
from maskft.tuner.layer import MaskLayer
from maskft.tuner.sharding import is_sharded, several_processes, weights_are_loaded, whole


def base_fingerprint(model: nn.Module, config: MaskConfig, adapter_name: str) -> str | None:
    """Fingerprint of the frozen weights under the adapter's masks; None where this process cannot know it.

    Of weights in pieces it is the one that `remember_base` took, since the process that saves may be here alone.
    """
    weights = BaseWeights(model, adapter_name)
    if not weights_are_loaded() or any(weight.is_meta or is_sharded(weight) for weight in weights.stored()):
        return config.seen_fingerprint
    return fingerprint(weights)


def remember_base(model: nn.Module, config: MaskConfig, adapter_name: str) -> None:
    """On one of several processes, take the fingerprint while weights are whole or all processes can join them.

    Called when the adapter is put on, by every process. FSDP and ZeRO-3 may take the weights to pieces afterwards.
    """
    weights = BaseWeights(model, adapter_name)
    config.seen_fingerprint = None
    if several_processes() and weights_are_loaded() and not any(weight.is_meta for weight in weights.stored()):
        config.seen_fingerprint = fingerprint(weights)


def whole_weight(layer: MaskLayer) -> Tensor:
    """The layer's pre-trained weight in its own shape; every process must ask where it is in pieces."""
    weight = layer.frozen_parameter()
    return layer.decode(whole(weight)) if is_sharded(weight) else layer.pretrained_weight()


class BaseWeights(Mapping[str, Tensor]):
    """Frozen weights under an adapter's masks, by the name of their layer in the base model.

    Each is made whole and decoded when it is asked for, so that no more than one is held at a time.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self._layers = {
            base_name(name, module): module
            for name, module in model.named_modules()
            if isinstance(module, MaskLayer) and adapter_name in module.mask_layout
        }

    def stored(self) -> Iterator[Tensor]:
        """The parameters as the base keeps them."""
        return (layer.frozen_parameter() for layer in self._layers.values())

    def __getitem__(self, name: str) -> Tensor:
        return whole_weight(self._layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def base_name(name: str, module: MaskLayer) -> str:
    """The masked parameter's place in the base model; a layer's weight goes by the name of its layer."""
    bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{bare}.{module.parameter_name}" if isinstance(module, ParamWrapper) else bare
