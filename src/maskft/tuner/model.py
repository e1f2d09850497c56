"""The tuner: puts masked layers in place of the targets, saves and loads with the base's fingerprint."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from maskft.errors import AdapterError, ModelError, gathered
from maskft.fingerprint import fingerprint
from maskft.targets import resolve_targets
from maskft.tuner.config import MaskConfig
from maskft.tuner.layer import Linear, MaskLayer


class MaskModel(BaseTuner):
    """A model whose targeted linear layers carry masks. Made by `peft.get_peft_model(model, MaskConfig(...))`."""

    prefix = "mask_"
    tuner_layer_cls = MaskLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # targets are resolved from the model's structure in _prepare_model

    def _prepare_model(self, peft_config: MaskConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(
                resolve_targets(model, scope=peft_config.scope, modules=peft_config.modules, layers=peft_config.layers)
            )
        self._shared = _shared_weights(model)

    def _create_and_replace(
        self,
        peft_config: MaskConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ModelError(
                f"'{current_key}' cannot be masked: nn.MultiheadAttention reads its weight without calling it. "
                "Take it out of target_modules."
            )
        weight = target.get_base_layer().weight if isinstance(target, MaskLayer) else getattr(target, "weight", None)
        if owners := self._shared.get(id(weight)):
            raise ModelError(
                f"'{current_key}' cannot be masked: it shares its weight ({', '.join(owners)}), and merging the mask "
                "would change all of them. Take it out of target_modules."
            )
        if isinstance(target, MaskLayer):
            target.update_layer(adapter_name, peft_config)
            return
        masked = Linear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            masked.requires_grad_(False)
        self._replace_module(parent, target_name, masked, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        config.base_fingerprint = fingerprint(_masked_base_weights(model, adapter_name))
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        if config.base_fingerprint is not None:
            found = fingerprint(_masked_base_weights(model, adapter_name))
            if found != config.base_fingerprint:
                raise AdapterError(
                    f"this adapter was trained on another base: its masked weights have the fingerprint "
                    f"{config.base_fingerprint[:12]}, the model's have {found[:12]}. Load the base named in its "
                    f"adapter_config.json ({config.base_model_name_or_path}); to use it all the same, set "
                    "base_fingerprint to null there."
                )
        expected = {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if name.endswith(f".mask_scores.{adapter_name}")
        }
        _check_scores(expected, {k: v for k, v in remapped.items() if ".mask_scores" in k})
        return remapped


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that own one parameter together, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for _, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    return {key: names for key, names in owners.items() if len(names) > 1}


def _masked_base_weights(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Frozen weights under the adapter's masks, by the name of their layer in the base model."""
    return {
        name.removeprefix("base_model.model."): module.pretrained_weight()
        for name, module in model.named_modules()
        if isinstance(module, MaskLayer) and adapter_name in module.mask_scores
    }


def _check_scores(expected: dict[str, torch.Size], given: dict[str, Tensor]) -> None:
    """Gather every flaw of the given scores into one error."""
    problems = [f"missing: {name}" for name in expected if name not in given]
    problems += [f"not in the model: {name}" for name in given if name not in expected]
    for name, tensor in given.items():
        if name in expected and tensor.shape != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model's weight {tuple(expected[name])}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise AdapterError(f"the adapter does not fit this model:\n{gathered(problems)}")
