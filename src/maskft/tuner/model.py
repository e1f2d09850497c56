"""The tuner: puts masked layers in place of the targets, saves and loads with the base's fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from maskft.errors import AdapterError, ModelError, UserError, gathered
from maskft.targets import fused_heights, resolve_parameters, resolve_targets
from maskft.tuner.base import base_fingerprint, remember_base
from maskft.tuner.checks import check_when_run, checked_on_loading, refuse_other_base, refuse_other_parameters
from maskft.tuner.config import MaskConfig
from maskft.tuner.foreign import refuse_foreign_layers
from maskft.tuner.formats import keep_from_repacking, unpacked_shape
from maskft.tuner.kinds import ParamWrapper, make_layer
from maskft.tuner.layer import MaskLayer
from maskft.tuner.packed import await_scores, packed_state, scores_arrived, unpacked_state
from maskft.tuner.precision import restore_score_dtype
from maskft.tuner.ranking import GlobalRanking
from maskft.tuner.sharding import full_shape


class MaskModel(BaseTuner):
    """A model whose targeted linear layers carry masks. Made by `peft.get_peft_model(model, MaskConfig(...))`."""

    prefix = "mask_"
    tuner_layer_cls = MaskLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # targets are resolved from the model's structure in _prepare_model

    def _prepare_model(self, peft_config: MaskConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None and peft_config.target_parameters is None:
            peft_config.resolve_layers()
            where: dict[str, Any] = {
                "scope": peft_config.scope,
                "modules": peft_config.modules,
                "layers": peft_config.layers,
            }
            try:
                targets = resolve_targets(model, **where)
            except ModelError:
                refuse_foreign_layers(model)  # which may be all the layers there are
                raise
            refuse_foreign_layers(model, beside=targets)
            peft_config.target_modules = set(targets)
            peft_config.target_parameters = resolve_parameters(model, **where) or None
        self._shared = _shared_weights(model)
        refuse_other_parameters(model, peft_config.target_parameters or [])

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then ranks the layers together where the configuration asks for it."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        keep_from_repacking(model)
        config = self.peft_config[adapter_name]
        layers = [m for m in model.modules() if isinstance(m, MaskLayer) and adapter_name in m.mask_layout]
        if config.ranking == "global":
            ranking = GlobalRanking(adapter_name, config.make_gate())
            ranking.add(layers)
            for layer in layers:
                layer.mask_ranking[adapter_name] = ranking
        if config.storage != "float32" and config.inference_mode:
            await_scores(model, adapter_name)
        if config.base_fingerprint is not None and config.inference_mode:
            check_when_run(model, adapter_name)
        remember_base(model, config, adapter_name)

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
        around = base if parameter_name else parent
        heights = fused_heights(parameter_name or target_name, unpacked_shape(base, weight), around)
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
        if isinstance(weight, Tensor) and hasattr(weight, "full_tensor"):
            raise ModelError(
                f"'{name}' cannot be masked: its weight is in pieces already (a DTensor). Put the masks on before "
                "fully_shard, and load the model without a tensor-parallel plan."
            )
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

    def train(self, mode: bool = True) -> MaskModel:
        """As any module's; scores get back the dtype that a trainer took from them, see `maskft.tuner.precision`."""
        self._restore_score_dtype()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> MaskModel:
        self._restore_score_dtype()
        super()._apply(fn, recurse)
        return self

    def _restore_score_dtype(self) -> None:
        for name, config in self.peft_config.items():
            restore_score_dtype(self.model, name, config.torch_dtype())

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Give scores the dtype that their configuration names, or that of the base where PEFT is asked for it."""
        config = self.peft_config[adapter_name]
        for layer in self.modules():
            if isinstance(layer, MaskLayer) and adapter_name in layer.mask_layout:
                follows = not autocast_adapter_dtype and layer.quantization_backend is None
                layer.cast_scores(adapter_name, layer.frozen_parameter().dtype if follows else config.torch_dtype())

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, which passes over layers inside modules of the base that are called mask_something."""
        super().delete_adapter(adapter_name)
        for layer in self.modules():
            if isinstance(layer, MaskLayer) and adapter_name in layer.mask_layout:
                layer.delete_adapter(adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # scores are made where the weight is, and experts have no `weight`

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around forward passes; refuses what it would leave out without a word."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names: a batch cannot mix masks, since each row would need a weight of its own. Run the rows "
                "of each adapter by themselves, after set_adapter."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        config.base_fingerprint = base_fingerprint(model, config, adapter_name)
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        _refuse_pieces(model, selected)
        return packed_state(model, config, adapter_name, selected)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        restore_score_dtype(model, adapter_name, config.torch_dtype())
        expected = {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if _is_score(name) and name.endswith(f".{adapter_name}")
        }
        bare = {name: cls._remove_adapter_name_from_key(name, adapter_name) for name in expected}
        saved = {s: name for name in expected for s in _saved_names(bare[name])}
        plain, flaws = unpacked_state(config, state_dict, {s: expected[name] for s, name in saved.items()})
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain)
        scores = {name: tensor for name, tensor in remapped.items() if _is_score(name)}
        refuse_other_base(model, config, adapter_name, scores)
        _check_scores(expected, scores, {saved.get(name, name): flaw for name, flaw in flaws.items()})
        scores_arrived(model, adapter_name)
        checked_on_loading(model, adapter_name)
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


def _refuse_pieces(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise AdapterError where a state holds what ZeRO-3 leaves of a score that is partitioned."""
    parameters = dict(model.named_parameters())
    if any(name in parameters and tensor.shape != full_shape(parameters[name]) for name, tensor in state.items()):
        raise AdapterError(
            "the adapter cannot be saved so: DeepSpeed ZeRO-3 keeps its scores in pieces. Call trainer.save_model, or "
            "save_pretrained with state_dict=accelerator.get_state_dict(model), which every process must call."
        )


def _saved_names(name: str) -> tuple[str, str]:
    """What a score may be called in a file: models without PEFT's wrapper have no such prefix."""
    bare = name.removeprefix("base_model.model.")
    return bare, f"base_model.model.{bare}"


def _check_scores(expected: dict[str, torch.Size], given: dict[str, Tensor], flaws: dict[str, str]) -> None:
    """Gather every flaw of the given scores, and of those that could not be unpacked, into one error."""
    problems = [f"missing: {name}" for name in expected if name not in given and name not in flaws]
    problems += [f"{name} {flaw}" for name, flaw in flaws.items()]
    problems += [f"not in the model: {name}" for name in given if name not in expected]
    for name, tensor in given.items():
        if name in expected and tensor.shape != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model's weight {tuple(expected[name])}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise AdapterError(f"the adapter does not fit this model:\n{gathered(problems)}")
