"""Saving and loading: bit-equal round trips, refusals, transformers' own adapter methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from maskft import MaskConfig
from maskft.errors import AdapterError
from maskft.fingerprint import fingerprint
from maskft.tuner import MaskLayer, attach_saved

from .models import GATES, base_hash, logits, loss, masked, scatter, scores_of, tiny_llama, tiny_llava

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ONE = "base_model.model.model.layers.0.self_attn.q_proj.mask_scores"
TWO = "base_model.model.model.layers.0.mlp.up_proj.mask_scores"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of `tiny_llama()`."""
    masked(tiny_llama()).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **fields}))


def edit_scores(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    scores = load_file(folder / WEIGHTS)
    change(scores)
    save_file(scores, folder / WEIGHTS)


class TestRoundTrip:
    @pytest.mark.parametrize("gate", GATES)
    @pytest.mark.parametrize("build", [tiny_llama, tiny_llava])
    def test_logits_are_bit_equal(self, gate: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
        model = masked(
            build(), gate=gate, scope=("language", "projector", "vision") if build is tiny_llava else "language"
        )
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path)), logits(model))

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_ways_of_loading(self, low_cpu_mem_usage: bool, dtype: torch.dtype, tmp_path: Path) -> None:
        model = masked(tiny_llama(dtype=dtype))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert {p.dtype for p in scores_of(loaded).values()} == {torch.float32}
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}
        for name, scores in scores_of(model).items():
            assert torch.equal(scores_of(loaded)[name], scores), name
        assert torch.equal(logits(loaded), logits(model))

    def test_files(self, saved: Path) -> None:
        assert {path.name for path in saved.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
        scores = load_file(saved / WEIGHTS)
        assert len(scores) == 14
        assert {ONE, TWO} <= set(scores)
        assert all(name.endswith(".mask_scores") for name in scores)
        assert all(tensor.dtype == torch.float32 for tensor in scores.values())

    def test_saving_and_loading_leave_the_base_alone(self, saved: Path) -> None:
        model = tiny_llama()
        before = base_hash(model)
        assert base_hash(PeftModel.from_pretrained(model, saved)) == before

    def test_loaded_adapters_are_frozen_unless_asked(self, saved: Path) -> None:
        assert not any(p.requires_grad for p in PeftModel.from_pretrained(tiny_llama(), saved).parameters())
        trainable = PeftModel.from_pretrained(tiny_llama(), saved, is_trainable=True)
        assert all(p.requires_grad for p in scores_of(trainable).values())
        loss(trainable).backward()
        assert all(p.grad is not None for p in scores_of(trainable).values())

    def test_under_another_name(self, saved: Path) -> None:
        expected = logits(PeftModel.from_pretrained(tiny_llama(), saved))
        loaded = PeftModel.from_pretrained(tiny_llama(), saved, adapter_name="other")
        assert len(scores_of(loaded, "other")) == 14
        assert torch.equal(logits(loaded), expected)
        loaded.load_adapter(saved, "second")
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded), expected)

    def test_selected_adapter(self, tmp_path: Path) -> None:
        model = masked(tiny_llama())
        model.add_adapter("other", MaskConfig(gate="centered", modules="attn"))
        scatter(model, "other", seed=3)
        model.set_adapter("other")
        model.eval().save_pretrained(tmp_path, selected_adapters=["other"])
        assert len(load_file(tmp_path / "other" / WEIGHTS)) == 8
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "other")), logits(model))

    def test_while_merged(self, tmp_path: Path) -> None:
        model = masked(tiny_llama())
        output = logits(model)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), output)

    def test_beside_a_merged_adapter(self, saved: Path) -> None:
        model = PeftModel.from_pretrained(tiny_llama(), saved)
        output = logits(model)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.load_adapter(saved, "second")
        model.set_adapter("second")
        assert torch.equal(logits(model), output)

    def test_modules_to_save(self, tmp_path: Path) -> None:
        model = masked(tiny_llama(), modules_to_save=["lm_head"])
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))

    def test_attach_saved(self, saved: Path) -> None:
        loaded = attach_saved(tiny_llama(), saved)
        assert torch.equal(logits(loaded), logits(masked(tiny_llama())))
        assert not any(p.requires_grad for p in loaded.parameters())


class TestFingerprint:
    def test_is_that_of_the_masked_weights(self, saved: Path) -> None:
        stored = json.loads((saved / CONFIG).read_text())["base_fingerprint"]
        weights = {
            name.removesuffix(".weight"): p
            for name, p in tiny_llama().named_parameters()
            if p.dim() == 2 and "layers" in name
        }
        assert len(weights) == 14
        assert stored == fingerprint(weights)

    def test_another_base_is_refused(self, saved: Path) -> None:
        for load in (PeftModel.from_pretrained, attach_saved):
            model = tiny_llama()
            model.model.layers[1].mlp.down_proj.weight.data[3, 2] += 1
            with pytest.raises(AdapterError, match=r"trained on another base.*set base_fingerprint to null"):
                load(model, saved)

    def test_change_of_a_weight_that_is_not_masked_is_accepted(self, saved: Path) -> None:
        model = tiny_llama()
        model.lm_head.weight.data[0, 0] += 1
        assert len(scores_of(attach_saved(model, saved))) == 14

    def test_the_same_base_in_another_dtype_is_accepted(self, saved: Path) -> None:
        assert logits(attach_saved(tiny_llama(dtype=torch.bfloat16), saved)).dtype == torch.bfloat16

    def test_none_skips_the_check(self, saved: Path) -> None:
        edit_config(saved, base_fingerprint=None)
        loaded = attach_saved(tiny_llama(seed=9), saved)
        assert torch.equal(logits(loaded), logits(masked(tiny_llama(seed=9))))

    def test_second_adapter_of_another_base_is_refused(self, saved: Path) -> None:
        model = masked(tiny_llama(seed=9))
        with pytest.raises(AdapterError, match="trained on another base"):
            model.load_adapter(saved, "second")


class TestScoresThatDoNotFit:
    def refusal(self, folder: Path) -> str:
        messages = []
        for load in (PeftModel.from_pretrained, attach_saved):
            with pytest.raises(AdapterError) as caught:
                load(tiny_llama(), folder)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        return messages[0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_all_flaws_are_gathered(self, saved: Path, value: float) -> None:
        def change(scores: dict[str, torch.Tensor]) -> None:
            del scores[ONE]
            scores["base_model.model.model.layers.7.mlp.up_proj.mask_scores"] = torch.zeros(2, 2)
            scores[TWO] = torch.zeros(3, 3)
            scores[TWO.replace("layers.0", "layers.1")][0, 0] = value

        edit_scores(saved, change)
        message = self.refusal(saved)
        assert f"missing: {ONE}" in message
        assert "not in the model: base_model.model.model.layers.7.mlp.up_proj.mask_scores" in message
        assert f"{TWO}.default has shape (3, 3), the model's weight (32, 16)" in message
        assert f"{TWO.replace('layers.0', 'layers.1')}.default has values that are not finite" in message

    def test_many_flaws_are_counted(self, saved: Path) -> None:
        edit_scores(saved, lambda scores: [scores.pop(name) for name in list(scores)[:12]])
        message = self.refusal(saved)
        assert message.count("missing: ") == 10
        assert "... and 2 more" in message


class TestBrokenFolders:
    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_missing_file(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(AdapterError, match=f"holds no adapter: {name} is missing"):
            attach_saved(tiny_llama(), saved)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=r"none holds no adapter: adapter_config.json is missing"):
            attach_saved(tiny_llama(), tmp_path / "none")

    @pytest.mark.parametrize("size", [0, 5, 100, -1])
    def test_truncated_weights(self, saved: Path, size: int) -> None:
        content = (saved / WEIGHTS).read_bytes()
        (saved / WEIGHTS).write_bytes(content[:size])
        with pytest.raises(AdapterError, match=r"adapter_model.safetensors cannot be read: .*damaged"):
            attach_saved(tiny_llama(), saved)

    @pytest.mark.parametrize("text", ["{", "", "[]", "3", "\xff"])
    def test_config_that_is_no_json_object(self, saved: Path, text: str) -> None:
        (saved / CONFIG).write_text(text, encoding="latin-1")
        with pytest.raises(AdapterError, match=r"adapter_config.json is not a JSON object"):
            attach_saved(tiny_llama(), saved)

    def test_adapter_of_another_method(self, tmp_path: Path) -> None:
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="holds an adapter of method LORA, not MASK"):
            attach_saved(tiny_llama(), tmp_path)

    def test_config_without_a_method(self, saved: Path) -> None:
        (saved / CONFIG).write_text("{}")
        with pytest.raises(AdapterError, match="holds an adapter of method None, not MASK"):
            attach_saved(tiny_llama(), saved)


class TestTransformersOwnMethods:
    def test_add_adapter(self) -> None:
        model = tiny_llama()
        before = logits(model)
        model.add_adapter(MaskConfig(gate="centered"), "mine")
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trainable) == 14
        assert all(name.endswith(".mask_scores.mine") for name in trainable)
        assert torch.equal(logits(model.eval()), before)
        loss(model).backward()
        assert all(p.grad.any() for p in scores_of(model, "mine").values())

    def test_disable_and_enable(self) -> None:
        model = tiny_llama()
        before = logits(model)
        model.add_adapter(MaskConfig(init_weights=False))
        output = logits(model.eval())
        model.disable_adapters()
        assert torch.equal(logits(model), before)
        model.enable_adapters()
        assert torch.equal(logits(model), output)

    def test_round_trip_between_the_two(self, tmp_path: Path) -> None:
        model = tiny_llama()
        model.add_adapter(MaskConfig(gate="centered"), "mine")
        scatter(model, "mine")
        output = logits(model.eval())
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), output)
        loaded = tiny_llama()
        loaded.load_adapter(str(tmp_path), "other")
        assert torch.equal(logits(loaded.eval()), output)

    def test_injection_and_state_dicts(self) -> None:
        source = masked(tiny_llama(), gate="centered")
        state = get_peft_model_state_dict(source)
        assert ONE in state
        model = inject_adapter_in_model(MaskConfig(gate="centered"), tiny_llama()).eval()
        assert len([m for m in model.modules() if isinstance(m, MaskLayer)]) == 14
        result = set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys
        assert torch.equal(logits(model), logits(source))

    def test_injected_state_dict_of_another_base_is_refused(self) -> None:
        source = masked(tiny_llama())
        state = get_peft_model_state_dict(source)
        config = MaskConfig(base_fingerprint=source.peft_config["default"].base_fingerprint)
        model = inject_adapter_in_model(config, tiny_llama(seed=9))
        with pytest.raises(AdapterError, match="trained on another base"):
            set_peft_model_state_dict(model, state)
