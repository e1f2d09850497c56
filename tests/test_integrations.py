"""The plugins for other trainers, against stand-ins of the interfaces that those define.

The trainers themselves do not install beside the pinned versions; integrations/*/check.py runs against them, by hand.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from maskft import MaskConfig
from maskft.errors import UserError
from tests.tuner.models import logits, scatter, tiny_llama

FOLDER = Path(__file__).parents[1] / "integrations"


class PeftTuner:
    """As ms-swift calls it to save and load."""

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: Any = None, safe_serialization: bool = True
    ) -> None:
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, selected_adapters=["default"])

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        return PeftModel.from_pretrained(model, model_id, **kwargs)


@dataclasses.dataclass(frozen=True)
class AdapterCapabilities:
    """What an Axolotl plugin says of an adapter."""

    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """Axolotl calls many more hooks, which do nothing."""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, dict[str, Any]]], Any]:
    """Imports a plugin's file with stand-ins, given as modules and their names, in place of the trainer."""

    def load(path: str, stand_ins: dict[str, dict[str, Any]]) -> Any:
        for name, content in stand_ins.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        file = FOLDER / path
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def swift(plugin: Any) -> Any:
    stand_ins: dict[str, dict[str, Any]] = {
        "swift": {},
        "swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": {}},
    }
    return plugin("ms_swift/maskft_swift.py", stand_ins)


@pytest.fixture
def axolotl(plugin: Any) -> Any:
    base = {"BasePlugin": BasePlugin, "AdapterCapabilities": AdapterCapabilities}
    stand_ins: dict[str, dict[str, Any]] = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": base,
    }
    return plugin("axolotl/maskft_axolotl.py", stand_ins)


def saved(folder: Path, model: Any) -> Path:
    scatter(model)
    model.save_pretrained(folder)
    return folder


def test_swift_finds_the_tuner_and_trains_masks(swift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKFT", '{"gate": "centered", "modules": "attn"}')
    tuner = swift.tuners_map["mask"]
    model = tuner.prepare_model(None, tiny_llama())
    assert (model.peft_config["default"].gate, len(model.targeted_module_names)) == ("centered", 8)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8
    assert all("mask_scores" in name for name in trained)
    scatter(model)
    tuner.save_pretrained(model, str(tmp_path), safe_serialization=True)
    again = tuner.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained


def test_swift_without_settings_takes_the_defaults(swift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKFT", raising=False)
    assert swift.config() == MaskConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gate: soft", "MASKFT is 'gate: soft': Expecting value"),
        ("[1]", "It must be a JSON object with fields of maskft.MaskConfig"),
        ('{"gaet": "soft"}', "unexpected keyword argument 'gaet'"),
        ('{"gate": "sotf"}', "Did you mean 'soft'"),
    ],
)
def test_swift_settings_that_are_none(text: str, expected: str, swift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKFT", text)
    with pytest.raises(UserError) as error:
        swift.MaskTuner.prepare_model(None, tiny_llama())
    assert expected in str(error.value)


def configuration(**fields: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"adapter": "mask", "mask": {}, "lora_model_dir": None, **fields})


def test_axolotl_puts_masks_on(axolotl: Any) -> None:
    plugin = axolotl.MaskPlugin()
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == ["mask"]
    assert plugin.get_input_args() == "maskft_axolotl.MaskArgs"
    cfg = configuration(mask={"gate": "topk", "keep_ratio": 0.8, "modules": "mlp"})
    model, config = plugin.load_adapter(tiny_llama(), cfg)
    assert (config.gate, config.keep_ratio, len(model.targeted_module_names)) == ("topk", 0.8, 6)
    assert plugin.load_adapter(tiny_llama(), cfg, config_only=True) == (None, MaskConfig(**cfg.mask))
    assert plugin.load_adapter(tiny_llama(), configuration(adapter="lora")) is None


@pytest.mark.parametrize("inference", [True, False])
def test_axolotl_loads_a_saved_adapter(inference: bool, axolotl: Any, tmp_path: Path) -> None:
    plugin = axolotl.MaskPlugin()
    first, _ = plugin.load_adapter(tiny_llama(), configuration(mask={"gate": "normalized"}))
    cfg = configuration(lora_model_dir=str(saved(tmp_path, first)))
    again, config = plugin.load_adapter(tiny_llama(), cfg, inference=inference)
    assert config.gate == "normalized"
    assert torch.equal(logits(again), logits(first))
    assert any(parameter.requires_grad for parameter in again.parameters()) is not inference


@pytest.mark.parametrize("fields", [{"gaet": "soft"}, {"gate": "sotf"}, {"keep_ratio": 7}])
def test_axolotl_settings_that_are_none(fields: dict[str, Any], axolotl: Any) -> None:
    assert axolotl.MaskArgs().mask == {}
    with pytest.raises(ValidationError):
        axolotl.MaskArgs(mask=fields)
