"""The tuner: puts masked layers in place of the targets, saves and loads with the base's fingerprint."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from maskft.errors import AdapterError, ModelError, gathered
from maskft.fingerprint import fingerprint
from maskft.targets import fused_heights, resolve_parameters, resolve_targets
from maskft.tuner.config import MaskConfig
from maskft.tuner.kinds import ParamWrapper, make_layer
from maskft.tuner.layer import MaskLayer
from maskft.tuner.ranking import GlobalRanking


class MaskModel(BaseTuner):
    """A model whose targeted linear layers carry masks. Made by `peft.get_peft_model(model, MaskConfig(...))`."""

    prefix = "mask_"
    tuner_layer_cls = MaskLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # targets are resolved from the model's structure in _prepare_model

    def _prepare_model(self, peft_config: MaskConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None and peft_config.target_parameters is None:
            where: dict[str, Any] = {"scope": peft_config.scope, "modules": peft_config.modules, "layers": peft_config.layers}
            peft_config.target_modules = set(resolve_targets(model, **where))
            peft_config.target_parameters = resolve_parameters(model, **where) or None
        self._shared = _shared_weights(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then ranks the layers together where the configuration asks for it."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        layers = [m for m in model.modules() if isinstance(m, MaskLayer) and adapter_name in m.mask_layout]
        if config.ranking == "global":
            ranking = GlobalRanking(adapter_name, config.keep_ratio, config.init_weights != "random")
            ranking.add(layers)
            for layer in layers:
                layer.mask_ranking[adapter_name] = ranking

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
        base = target.get_base_layer() if isinstance(target, MaskLayer) else target
        weight = getattr(base, parameter_name or "weight", None)
        self._refuse_unsafe(weight, parent, current_key)
        heights = fused_heights(target_name, weight, parent)
        nested = isinstance(target, ParamWrapper) and parameter_name not in (None, target.parameter_name)
        if isinstance(target, MaskLayer) and not nested:
            target.update_layer(adapter_name, peft_config, heights)
            return
        masked = make_layer(
            target, adapter_name, peft_config, name=current_key, parameter_name=parameter_name, slices=heights
        )
        if adapter_name not in self.active_adapters:
            masked.requires_grad_(False)
        self._replace_module(parent, target_name, masked, target)

    def _refuse_unsafe(self, weight: Any, parent: nn.Module, name: str) -> None:
        """Raise ModelError where a mask would be without effect, or would change other modules."""
        if isinstance(parent, nn.MultiheadAttention):
            raise ModelError(
                f"'{name}' cannot be masked: nn.MultiheadAttention reads its weight without calling it. "
                "Take it out of target_modules."
            )
        if owners := self._shared.get(id(weight)):
            raise ModelError(
                f"'{name}' cannot be masked: it shares its weight ({', '.join(owners)}), and merging the mask "
                "would change all of them. Take it out of target_modules."
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Scores have the dtype that their configuration names, whatever PEFT casts adapters to."""

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
            if _is_score(name) and name.endswith(f".{adapter_name}")
        }
        _check_scores(expected, {name: tensor for name, tensor in remapped.items() if _is_score(name)})
        return remapped


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that own one parameter together, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for _, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    return {key: names for key, names in owners.items() if len(names) > 1}


def _is_score(name: str) -> bool:
    return any(f".{kept}." in name or name.endswith(f".{kept}") for kept in MaskLayer.adapter_layer_names)


def _masked_base_weights(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Frozen weights under the adapter's masks, by the name of their layer in the base model."""
    return {
        _base_name(name, module): module.pretrained_weight()
        for name, module in model.named_modules()
        if isinstance(module, MaskLayer) and adapter_name in module.mask_layout
    }


def _base_name(name: str, module: MaskLayer) -> str:
    """The masked parameter's place in the base model; a layer's weight goes by the name of its layer."""
    bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{bare}.{module.parameter_name}" if isinstance(module, ParamWrapper) else bare


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
