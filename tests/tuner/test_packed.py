"""Packed adapters through PEFT: frozen scores are written as `storage` says, and every reader gets them back."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from maskft import MaskConfig
from maskft.errors import AdapterError, UserError
from maskft.tuner import MaskLayer, attach_saved

from .models import batch, logits, masked, scores_of, tiny_llama, tiny_llava

WEIGHTS = "adapter_model.safetensors"
ONE = "base_model.model.model.layers.0.self_attn.q_proj.mask_scores"
TWO = "base_model.model.model.layers.0.mlp.up_proj.mask_scores"
THREE = "base_model.model.model.layers.1.mlp.up_proj.mask_scores"
HARD: dict[str, dict[str, Any]] = {
    "topk": {"gate": "topk", "keep_ratio": 0.7},
    "topk global": {"gate": "topk", "keep_ratio": 0.7, "ranking": "global"},
    "topk random": {"gate": "topk", "keep_ratio": 0.7, "init_weights": "random"},
    "topk keeps all": {"gate": "topk", "keep_ratio": 1.0},
    "threshold": {"gate": "threshold", "init_gate": 0.6},
    "threshold hot": {"gate": "threshold", "temperature": 1e6, "init_gate": 0.500001},
}


def frozen(build: Callable[[], nn.Module] = tiny_llama, **fields: Any) -> PeftModel:
    """A model with a scattered adapter that is not trained any more."""
    return masked(build(), **fields).requires_grad_(False)


def saved(folder: Path, **fields: Any) -> PeftModel:
    model = frozen(**fields)
    model.save_pretrained(folder)
    return model


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Every hard mask of the default adapter."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MaskLayer):
            weight = layer.pretrained_matrix()
            mask = layer.mask("default")
            found[name] = mask.gate.value(mask.offset(weight), weight)
    return found


class TestHardMasks:
    @pytest.mark.parametrize("name", HARD)
    @pytest.mark.parametrize("build", [tiny_llama, tiny_llava])
    def test_come_back_bit_for_bit(self, name: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
        model = frozen(build, storage="bits", **HARD[name])
        model.save_pretrained(tmp_path)
        parts = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS)}
        assert "shape" in parts
        assert parts <= {"bits", "deflate", "shape"}
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        before, after = masks(model), masks(loaded)
        assert before.keys() == after.keys()
        for layer, mask in before.items():
            assert torch.equal(after[layer], mask), layer
        assert torch.equal(logits(loaded), logits(model))

    @pytest.mark.parametrize("name", ["topk", "topk global"])
    def test_ties(self, name: str, tmp_path: Path) -> None:
        """Scores that are all the same leave the choice to the position, and it must be saved as it fell."""
        model = masked(tiny_llama(), storage="bits", init_weights="random", **HARD[name])
        for scores in scores_of(model).values():
            scores.data.fill_(1.0)
        model.requires_grad_(False).save_pretrained(tmp_path)
        before, after = masks(model), masks(PeftModel.from_pretrained(tiny_llama(), tmp_path))
        assert all(torch.equal(after[layer], mask) for layer, mask in before.items())

    def test_in_bf16(self, tmp_path: Path) -> None:
        model = frozen(lambda: tiny_llama(dtype=torch.bfloat16), storage="bits", score_dtype="bfloat16", **HARD["topk"])
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
        assert {p.dtype for p in scores_of(loaded).values()} == {torch.bfloat16}
        assert torch.equal(logits(loaded), logits(model))

    def test_saved_again_is_the_same_file(self, tmp_path: Path) -> None:
        saved(tmp_path / "one", storage="bits", **HARD["topk"])
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "one").save_pretrained(tmp_path / "two")
        one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_while_merged(self, tmp_path: Path) -> None:
        model = frozen(storage="bits", **HARD["topk"])
        output = logits(model)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), output)


class TestSoftMasks:
    @pytest.mark.parametrize("gate", ["soft", "normalized", "centered"])
    @pytest.mark.parametrize(("storage", "steps"), [("int8", 127), ("int4", 7)])
    def test_come_back_within_half_a_step(self, gate: str, storage: str, steps: int, tmp_path: Path) -> None:
        model = saved(tmp_path, gate=gate, storage=storage)
        assert {name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)} <= {storage, "scale", "shape"}
        loaded = scores_of(PeftModel.from_pretrained(tiny_llama(), tmp_path))
        for name, scores in scores_of(model).items():
            half = scores.abs().amax(-1, keepdim=True) / steps * 0.505
            assert ((loaded[name] - scores).abs() <= half).all(), name

    def test_a_mask_that_did_not_move_is_exact(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llama(), MaskConfig(storage="int4")).eval().requires_grad_(False)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))

    @pytest.mark.parametrize("layout", ["low-rank", "row", "column", "block"])
    def test_other_layouts_stay_in_full(self, layout: str, tmp_path: Path) -> None:
        model = saved(tmp_path, storage="int4", score_layout=layout, block_size=4, rank=2)
        content = load_file(tmp_path / WEIGHTS)
        assert all(tensor.dtype == torch.float32 for tensor in content.values())
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))

    @pytest.mark.parametrize("name", ["other", "int4", "scale", "mask_scores"])
    def test_under_any_name(self, name: str, tmp_path: Path) -> None:
        saved(tmp_path / "first", storage="int4")
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", adapter_name=name)
        expected = logits(loaded)
        loaded.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name="x")
        assert load_file(tmp_path / name / WEIGHTS).keys() == load_file(tmp_path / "first" / WEIGHTS).keys()
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=0.2)

    def test_modules_to_save_are_left_as_they_are(self, tmp_path: Path) -> None:
        model = masked(tiny_llama(), storage="int8", modules_to_save=["lm_head"])
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
        model.requires_grad_(False).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert torch.equal(loaded.base_model.model.lm_head.weight, model.base_model.model.lm_head.weight)

    def test_scores_that_are_not_finite_are_not_saved(self, tmp_path: Path) -> None:
        for gate, storage in (("soft", "int4"), ("threshold", "bits")):
            model = frozen(gate=gate, storage=storage)
            next(iter(scores_of(model).values())).data[0, 0] = math.nan
            with pytest.raises(AdapterError, match=r"cannot be saved: .*mask_scores.default has values that are not"):
                model.save_pretrained(tmp_path)


class TestReading:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_ways_of_loading(self, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert {(p.dtype, p.device.type) for p in scores_of(loaded).values()} == {(torch.float32, "cpu")}
        assert torch.equal(logits(loaded), logits(attach_saved(tiny_llama(), tmp_path)))
        assert pickle.loads(pickle.dumps(loaded.peft_config["default"])).storage == "int4"

    def test_whatever_the_configuration_says(self, tmp_path: Path) -> None:
        model = saved(tmp_path, storage="int4", gate="soft")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "storage": "float32"}))
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.3)
        save_file(
            {name.removesuffix(".default"): scores for name, scores in scores_of(model).items()}, tmp_path / WEIGHTS
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))

    def test_training_on_from_packed_scores_warns(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int8")
        with pytest.warns(UserWarning, match="training cannot go on"):
            model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
        assert all(p.requires_grad for p in scores_of(model).values())

    def test_into_an_injected_model(self, tmp_path: Path) -> None:
        model = saved(tmp_path, storage="int8")
        config = MaskConfig.from_pretrained(str(tmp_path))
        injected = inject_adapter_in_model(config, tiny_llama()).eval()
        assert not set_peft_model_state_dict(injected, load_file(tmp_path / WEIGHTS)).unexpected_keys
        torch.testing.assert_close(logits(injected), logits(model), rtol=0, atol=0.1)

    def test_transformers_own_loader_is_stopped(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")
        model = tiny_llama()
        model.load_adapter(str(tmp_path), "mine")
        with pytest.raises(AdapterError, match=r"'mine' have not been loaded.*PeftModel.from_pretrained"):
            logits(model)

    def test_transformers_own_loader_reads_scores_in_full(self, tmp_path: Path) -> None:
        model = masked(tiny_llama(), storage="int4")
        model.save_pretrained(tmp_path)  # still trained
        loaded = tiny_llama()
        loaded.load_adapter(str(tmp_path), "mine")
        assert torch.equal(logits(loaded.eval()), logits(model))
        assert not any(layer.awaited for layer in loaded.modules() if isinstance(layer, MaskLayer))

    def test_deleting_an_adapter_that_never_arrived(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")
        model = tiny_llama()
        model.load_adapter(str(tmp_path), "mine")
        with pytest.warns(UserWarning, match="Already found"):
            model.add_adapter(MaskConfig(gate="centered"), "other")
        model.delete_adapter("mine")
        assert torch.equal(logits(model.eval()), logits(tiny_llama()))

    def test_nothing_is_left_to_wait_for(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        layers = [layer for layer in loaded.modules() if isinstance(layer, MaskLayer)]
        assert len(layers) == 14
        assert not any(layer.awaited or layer._forward_pre_hooks for layer in layers)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    content = load_file(folder / WEIGHTS)
    change(content)
    save_file(content, folder / WEIGHTS)


class TestFlaws:
    def refusal(self, folder: Path) -> str:
        with pytest.raises(AdapterError) as caught:
            attach_saved(tiny_llama(), folder)
        return str(caught.value)

    def test_all_are_gathered(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")

        def change(content: dict[str, Tensor]) -> None:
            for part in ("int4", "scale", "shape"):
                del content[f"{ONE}.{part}"]
            content[f"{TWO}.scale"] = content[f"{TWO}.scale"].float()
            content[f"{THREE}.shape"] = torch.tensor([32, 15])
            content["base_model.model.model.layers.7.x.mask_scores.int8"] = torch.zeros(2, 2, dtype=torch.int8)
            content["base_model.model.model.layers.7.x.mask_scores.scale"] = torch.ones(2, 1, dtype=torch.bfloat16)
            other = THREE.replace("up", "down")
            content[f"{other}.scale"][0, 0] = math.inf

        edit(tmp_path, change)
        message = self.refusal(tmp_path)
        assert f"missing: {ONE}.default" in message
        assert f"{TWO}.default has a part scale of dtype torch.float32" in message
        assert f"{THREE}.default has shape (32, 15), the model's weight (32, 16)" in message
        assert "layers.7.x.mask_scores is not in the model" in message
        assert f"{THREE.replace('up', 'down')}.default has scales that are not finite" in message
        assert message.count("\n") == 5

    def test_both_packed_and_in_full(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")
        edit(tmp_path, lambda content: content.update({ONE: torch.zeros(16, 16)}))
        assert f"{ONE}.default is there both packed and in full" in self.refusal(tmp_path)

    def test_unknown_coding(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="int4")
        edit(tmp_path, lambda content: content.update({f"{ONE}.int3": content.pop(f"{ONE}.int4")}))
        assert f"{ONE}.default has the parts scale, shape" in self.refusal(tmp_path)

    def test_a_hard_mask_for_a_soft_gate(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="bits", gate="threshold")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "gate": "soft", "storage": "float32"}))
        assert "holds a hard mask, and the gate is 'soft'" in self.refusal(tmp_path)

    def test_another_base(self, tmp_path: Path) -> None:
        saved(tmp_path, storage="bits", **HARD["topk"])
        with pytest.raises(AdapterError, match="trained on another base"):
            attach_saved(tiny_llama(seed=9), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": "int5"}, "storage is 'int5'; allowed: float32, int8, int4, bits. Did you mean 'int4'|'int8'"),
        ({"storage": "bits"}, "storage is 'bits' with the gate 'centered'"),
        ({"storage": "int8", "gate": "topk"}, "storage is 'int8' with the gate 'topk'"),
        ({"storage": "int4", "gate": "threshold"}, "bits are for topk and threshold"),
    ],
)
def test_storage_must_suit_the_gate(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskConfig(**fields)


class TestTraining:
    def test_scores_that_are_trained_are_written_in_full(self, tmp_path: Path) -> None:
        model = masked(tiny_llama(), storage="int4")
        model.save_pretrained(tmp_path)
        assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
        assert len(load_file(tmp_path / WEIGHTS)) == 14

    @pytest.mark.parametrize(
        "fields", [{"storage": "int4"}, {"storage": "bits", "gate": "topk", "keep_ratio": 0.9}], ids=str
    )
    def test_a_run_resumes_from_its_checkpoint_exactly(self, fields: dict[str, Any], tmp_path: Path) -> None:
        def run(folder: Path, resume: Path | None = None, steps: int = 4) -> tuple[dict[str, Tensor], list[float]]:
            model = get_peft_model(tiny_llama(), MaskConfig(**fields))
            arguments = TrainingArguments(
                str(folder),
                max_steps=steps,
                save_steps=2,
                logging_steps=1,
                learning_rate=0.1,
                per_device_train_batch_size=2,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                lr_scheduler_type="constant",
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=rows)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return {name: p.detach().clone() for name, p in scores_of(model).items()}, losses

        ids = batch(tiny_llama())["input_ids"]
        rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids] * 4)
        whole, losses = run(tmp_path / "whole")
        content = load_file(tmp_path / "whole" / "checkpoint-2" / WEIGHTS)
        assert {tensor.dtype for tensor in content.values()} == {torch.float32}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.load.*")
            resumed, again = run(tmp_path / "again", tmp_path / "whole" / "checkpoint-2")
        assert again == losses
        assert all(torch.equal(resumed[name], scores) for name, scores in whole.items())
