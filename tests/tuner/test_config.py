"""Registration with PEFT, and MaskConfig."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from maskft import MaskConfig
from maskft.errors import UserError
from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK
from maskft.tuner import MaskModel, register_gate
from maskft.tuner import config as config_module
from maskft.tuner.register import mask_peft_type, register


class TestRegistration:
    def test_tables(self) -> None:
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MASK] is MaskConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MASK] is MaskModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MASK] == "mask_"

    def test_twice_is_once(self) -> None:
        members = list(PeftType)
        tables = dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
        register(MaskConfig, MaskModel)
        assert mask_peft_type() is PeftType.MASK
        assert list(PeftType) == members
        assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == tables

    def test_member_behaves_like_peft_s_own(self) -> None:
        member = PeftType.MASK
        assert PeftType("MASK") is PeftType["MASK"] is member
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.copy(member) is copy.deepcopy(member) is member
        assert isinstance(member, PeftType)
        assert (member.name, member.value) == ("MASK", "MASK")
        assert member == "MASK"
        assert repr(member) == "<PeftType.MASK: 'MASK'>"
        assert {member: 1}["MASK"] == 1
        assert member in PeftType
        assert [m.name for m in PeftType].count("MASK") == 1
        assert member != PeftType.LORA


class TestGates:
    @pytest.mark.parametrize(
        ("fields", "gate"),
        [
            ({"gate": "soft", "init_gate": 0.9, "temperature": 2.0}, Soft(0.9, 2.0)),
            ({"gate": "soft", "init_gate": 0.9, "straight_through": True}, Soft(0.9, 1.0, True)),
            ({}, Centered(1.0)),
            ({"gate": "normalized", "straight_through": True, "temperature": 0.5}, Normalized(0.98, 0.5, True)),
            ({"gate": "centered", "temperature": 0.5}, Centered(0.5)),
            ({"gate": "topk", "keep_ratio": 0.3}, TopK(0.3)),
            ({"gate": "topk", "init_weights": "random"}, TopK(0.9, magnitude_start=False)),
            ({"gate": "topk", "straight_through": True}, TopK(0.9, straight_through=True)),
            ({"gate": "threshold", "init_gate": 0.7}, Threshold(0.7, 1.0)),
        ],
    )
    def test_fields_make_the_gate(self, fields: dict[str, Any], gate: Gate) -> None:
        assert MaskConfig(**fields).make_gate() == gate

    @pytest.mark.parametrize(("init_weights", "std"), [(True, 0.0), (False, 1.0), ("random", 0.02)])
    def test_start(self, init_weights: Any, std: float) -> None:
        assert MaskConfig(init_weights=init_weights).start_std() == std


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"gate": "normalised"}, "gate is 'normalised'; allowed: soft, .* Did you mean 'normalized'?"),
            ({"temperature": 0}, "temperature is 0; it must be above 0"),
            ({"temperature": -1.0}, "temperature is -1.0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": float("inf")}, "temperature is inf; it must be above 0 and finite"),
            ({"init_gate": 0}, "init_gate is 0; it must lie between 0 and 1"),
            ({"init_gate": 1.0}, "init_gate is 1.0"),
            ({"init_gate": float("nan")}, "init_gate is nan"),
            ({"gate": "threshold", "init_gate": 0.4}, "init_gate is 0.4; below 0.5 the threshold gate"),
            ({"keep_ratio": 0}, "keep_ratio is 0; it must be above 0 and at most 1"),
            ({"keep_ratio": 1.01}, "keep_ratio is 1.01"),
            ({"scope": ["language", "audio"]}, r"scope has \['audio'\]; allowed: language, projector, vision"),
            ({"modules": "all"}, "modules is 'all'; allowed: attn, mlp, both"),
            ({"init_weights": "zeros"}, "init_weights is 'zeros'; allowed: True, False, 'random'"),
            ({"ranking": "layer"}, "ranking is 'layer'; allowed: matrix, global"),
            ({"ranking": "global"}, "ranking is 'global', which only the gate 'topk' has"),
            ({"score_layout": "rows"}, "score_layout is 'rows'; allowed: dense, .*Did you mean 'row'"),
            ({"score_dtype": "float16"}, "score_dtype is 'float16'; allowed: float32, bfloat16"),
            ({"rank": 0}, "rank is 0; it must be 1 or more"),
            ({"block_size": 0}, "block_size is 0; it must be 1 or more"),
        ],
    )
    def test_say_what_is_allowed(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            MaskConfig(**fields)

    def test_are_gathered(self) -> None:
        with pytest.raises(UserError) as caught:
            MaskConfig(gate="x", temperature=0, keep_ratio=2, scope="y")
        for name in ("gate", "temperature", "keep_ratio"):
            assert str(caught.value).count(f"{name} is ") == 1
        assert "scope has ['y']" in str(caught.value)


FULL: dict[str, Any] = {
    "gate": "topk",
    "temperature": 0.5,
    "init_gate": 0.9,
    "straight_through": True,
    "keep_ratio": 0.25,
    "scope": ["vision"],
    "modules": "mlp",
    "layers": [0, 2],
    "target_modules": ["q_proj", "k_proj"],
    "exclude_modules": ["x"],
    "modules_to_save": ["lm_head"],
    "init_weights": "random",
    "base_fingerprint": "abc",
}


class TestStoring:
    @pytest.mark.parametrize("fields", [{}, FULL, {"target_modules": "all-linear", "layers": "0-3"}])
    def test_round_trip(self, fields: dict[str, Any], tmp_path: Path) -> None:
        config = MaskConfig(**fields)
        config.save_pretrained(tmp_path)
        for cls in (MaskConfig, PeftConfig):
            again = cls.from_pretrained(tmp_path)
            assert type(again) is MaskConfig
            assert again.to_dict() == config.to_dict()
            assert again.make_gate() == config.make_gate()

    def test_json_is_plain(self, tmp_path: Path) -> None:
        MaskConfig(layers=range(2), scope=("language",)).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "adapter_config.json").read_text())
        assert stored["peft_type"] == "MASK"
        assert (stored["layers"], stored["scope"]) == ([0, 1], ["language"])

    def test_forms_of_the_fields(self) -> None:
        config = MaskConfig(scope="language", target_modules=["a", "a"], exclude_modules=["b"])
        assert config.scope == ["language"]
        assert config.target_modules == {"a"}
        assert config.exclude_modules == {"b"}
        assert config.peft_type is PeftType.MASK

    def test_copies(self) -> None:
        config = MaskConfig(**FULL)
        assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


class TestRegisteringAGate:
    @pytest.fixture(autouse=True)
    def _registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(config_module, "GATES", dict(config_module.GATES))
        register_gate("warm", lambda config: Centered(10 * config.temperature))

    def test_is_known_by_its_name(self) -> None:
        assert MaskConfig(gate="warm", temperature=2.0).make_gate() == Centered(20.0)

    def test_is_named_in_errors(self) -> None:
        with pytest.raises(UserError, match="allowed: soft, normalized, centered, topk, threshold, warm"):
            MaskConfig(gate="wram")

    def test_a_taken_name_is_refused(self) -> None:
        with pytest.raises(UserError, match="there is a gate 'warm' already"):
            register_gate("warm", lambda config: Centered())
