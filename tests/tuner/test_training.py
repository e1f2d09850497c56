"""What an adapter does to a model: trainable scores, an untouched base, the start, gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from maskft import MaskConfig
from maskft.errors import ModelError
from maskft.tuner import Linear, MaskLayer, attach

from .models import GATES, base_hash, batch, logits, loss, masked, scatter, scores_of, tiny_llama, tiny_llava

MODELS = pytest.mark.parametrize(("build", "layers"), [(tiny_llama, 14), (tiny_llava, 16)], ids=["llama", "llava"])


@MODELS
class TestWrapping:
    def test_only_scores_are_trainable(self, build: Callable[[], nn.Module], layers: int) -> None:
        model = get_peft_model(build(), MaskConfig())
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trainable) == layers
        assert all(name.endswith(".mask_scores.default") for name in trainable)
        assert set(trainable) == set(scores_of(model))

    def test_scores_have_the_weights_shape_and_start_at_zero(self, build: Callable[[], nn.Module], layers: int) -> None:
        model = get_peft_model(build(), MaskConfig())
        found = [module for module in model.modules() if isinstance(module, MaskLayer)]
        assert len(found) == layers
        for module in found:
            scores = module.mask_scores["default"]
            assert scores.shape == module.frozen().weight.shape
            assert scores.dtype == torch.float32
            assert not scores.any()

    @pytest.mark.parametrize("gate", ["normalized", "centered", "threshold"])
    def test_start_is_bit_equal_to_the_base(self, build: Callable[[], nn.Module], layers: int, gate: str) -> None:
        model = build()
        before = logits(model)
        assert torch.equal(logits(get_peft_model(model, MaskConfig(gate=gate)).eval()), before)

    def test_soft_starts_near_the_base(self, build: Callable[[], nn.Module], layers: int) -> None:
        model = build()
        before = logits(model)
        near, off = (
            (logits(get_peft_model(copy.deepcopy(model), MaskConfig(gate="soft", init_gate=m0)).eval()) - before)
            .abs()
            .max()
            for m0 in (0.9999, 0.9)
        )
        # logits are of order 1; each of a handful of layers is scaled by 1 - 1e-4
        assert 0 < near < 1e-2
        assert near < off

    def test_init_weights_false_changes_the_model(self, build: Callable[[], nn.Module], layers: int) -> None:
        model = build()
        before = logits(model)
        wrapped = get_peft_model(model, MaskConfig(init_weights=False)).eval()
        assert not torch.allclose(logits(wrapped), before)

    def test_state_dict_keys(self, build: Callable[[], nn.Module], layers: int) -> None:
        model = build()
        plain = set(model.state_dict())
        wrapped = get_peft_model(model, MaskConfig())
        keys = set(wrapped.state_dict())
        scores = {key for key in keys if ".mask_scores." in key}
        assert len(scores) == layers
        bare = {key.removeprefix("base_model.model.").replace(".base_layer", "") for key in keys - scores}
        assert bare == plain
        for key in scores:
            assert key.replace("mask_scores.default", "base_layer.weight") in keys


@pytest.mark.parametrize("gate", GATES)
def test_one_step_changes_every_score_and_nothing_of_the_base(gate: str) -> None:
    model = tiny_llava()
    before = base_hash(model)
    wrapped = get_peft_model(model, MaskConfig(gate=gate)).train()
    assert base_hash(wrapped) == before
    start = {name: p.detach().clone() for name, p in scores_of(wrapped).items()}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    loss(wrapped).backward()
    optimizer.step()
    assert base_hash(wrapped) == before
    assert len(start) == 16
    for name, scores in scores_of(wrapped).items():
        assert not torch.equal(scores, start[name]), name
        assert torch.isfinite(scores).all()
    assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)


@pytest.mark.parametrize("gate", ["normalized", "centered", "soft"])
def test_training_lowers_the_loss(gate: str) -> None:
    wrapped = get_peft_model(tiny_llama(), MaskConfig(gate=gate)).train()
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(wrapped)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_gradient_checkpointing_gives_the_same_gradients(gate: str, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        wrapped = masked(model, gate=gate).train()
        if checkpointing:
            wrapped.enable_input_require_grads()
        loss(wrapped).backward()
        assert model.is_activation_checkpointing == checkpointing
        return {name: p.grad for name, p in scores_of(wrapped).items()}

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 14
    for name, gradient in plain.items():
        assert gradient.any()
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)  # the same operations again


class TestDtypes:
    def test_scores_stay_fp32_on_a_bf16_base(self) -> None:
        wrapped = get_peft_model(tiny_llama(dtype=torch.bfloat16), MaskConfig())
        assert {p.dtype for p in scores_of(wrapped).values()} == {torch.float32}
        assert {p.dtype for p in wrapped.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert logits(wrapped).dtype == torch.bfloat16
        loss(wrapped).backward()
        assert {p.grad.dtype for p in scores_of(wrapped).values()} == {torch.float32}

    def test_scores_have_the_base_s_dtype_where_peft_is_told_not_to_cast(self) -> None:
        model = tiny_llama(dtype=torch.bfloat16)
        wrapped = get_peft_model(model, MaskConfig(), autocast_adapter_dtype=False)
        assert {p.dtype for p in scores_of(wrapped).values()} == {torch.bfloat16}
        loss(wrapped).backward()
        assert {p.grad.dtype for p in scores_of(wrapped).values()} == {torch.bfloat16}

    @pytest.mark.parametrize("gate", ["normalized", "centered", "threshold"])
    def test_start_is_bit_equal_in_bf16(self, gate: str) -> None:
        model = tiny_llama(dtype=torch.bfloat16)
        before = logits(model)
        assert torch.equal(logits(get_peft_model(model, MaskConfig(gate=gate)).eval()), before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_under_autocast(self, dtype: torch.dtype) -> None:
        wrapped = masked(tiny_llama(dtype=dtype)).train()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(wrapped)
        value.backward()
        for scores in scores_of(wrapped).values():
            assert scores.grad is not None
            assert scores.grad.dtype == torch.float32
            assert torch.isfinite(scores.grad).all()
            assert scores.grad.any()

    def test_integer_weights_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ModelError, match=r"weight is of type torch.int8. Load the base in bf16, fp16 or fp32"):
            get_peft_model(model, MaskConfig(target_modules=["0"]))


class TestRefusals:
    def test_target_that_matches_nothing(self) -> None:
        for wrap in (get_peft_model, attach):
            with pytest.raises(ValueError, match=r"no_such_layer.* not found"):
                wrap(tiny_llama(), MaskConfig(target_modules=["no_such_layer"]))

    def test_attach_makes_peft_s_complaints_ours(self) -> None:
        with pytest.raises(ModelError, match=r"cannot put masks on LlamaForCausalLM: .*no_such_layer"):
            attach(tiny_llama(), MaskConfig(target_modules=["no_such_layer"]))

    def test_scope_that_matches_nothing(self) -> None:
        with pytest.raises(ModelError, match="match no linear layer of LlamaForCausalLM"):
            attach(tiny_llama(), MaskConfig(scope=["vision"]))

    def test_module_that_is_not_linear(self) -> None:
        with pytest.raises(ModelError, match="a LlamaRMSNorm has no masked layer"):
            get_peft_model(tiny_llama(), MaskConfig(target_modules=["input_layernorm"]))

    @pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ".*lm_head"])
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's own, before our error
    def test_head_that_is_tied_to_the_embedding(self, targets: Any) -> None:
        with pytest.raises(ModelError, match=r"'lm_head' .* shares its weight \(model.embed_tokens, lm_head\)"):
            get_peft_model(tiny_llama(tie_word_embeddings=True), MaskConfig(target_modules=targets))

    @pytest.mark.parametrize("targets", [["0", "1"], ["1"], ".*"])
    def test_two_layers_with_one_weight(self, targets: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        with pytest.raises(ModelError, match=r"shares its weight \(0, 1\)"):
            get_peft_model(model, MaskConfig(target_modules=targets))

    def test_one_layer_under_two_names(self) -> None:
        shared = nn.Linear(4, 4)
        with pytest.raises(ModelError, match=r"shares its weight \(0, 1\)"):
            get_peft_model(nn.Sequential(shared, shared), MaskConfig(target_modules=["0"]))

    def test_untied_head_can_be_masked(self) -> None:
        wrapped = get_peft_model(tiny_llama(), MaskConfig(target_modules=["lm_head"]))
        assert list(scores_of(wrapped)) == ["base_model.model.lm_head.mask_scores.default"]

    def test_tied_head_does_not_disturb_other_targets(self) -> None:
        for targets in (None, "all-linear"):
            wrapped = get_peft_model(tiny_llama(tie_word_embeddings=True), MaskConfig(target_modules=targets))
            assert len(scores_of(wrapped)) == 14

    def test_child_of_multihead_attention(self) -> None:
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
        with pytest.raises(ModelError, match=r"'0.out_proj' cannot be masked: nn.MultiheadAttention reads its weight"):
            get_peft_model(model, MaskConfig(target_modules=["out_proj"]))


class TestTargetModules:
    def test_all_linear(self) -> None:
        assert len(scores_of(get_peft_model(tiny_llama(), MaskConfig(target_modules="all-linear")))) == 14

    def test_list_and_exclusion(self) -> None:
        wrapped = get_peft_model(
            tiny_llama(), MaskConfig(target_modules=["q_proj", "v_proj"], exclude_modules=r".*0\..*")
        )
        assert [name.split("model.model.model.")[1] for name in scores_of(wrapped)] == [
            "layers.1.self_attn.q_proj.mask_scores.default",
            "layers.1.self_attn.v_proj.mask_scores.default",
        ]

    def test_scope_modules_layers(self) -> None:
        wrapped = get_peft_model(tiny_llava(), MaskConfig(scope="vision", modules="attn", layers="0"))
        names = list(scores_of(wrapped))
        assert len(names) == 4
        assert all("vision_tower.encoder.layers.0.self_attn" in name for name in names)

    def test_modules_to_save_are_trained_whole(self) -> None:
        wrapped = get_peft_model(tiny_llama(), MaskConfig(modules_to_save=["lm_head"]))
        others = [n for n, p in wrapped.named_parameters() if p.requires_grad and ".mask_scores." not in n]
        assert others == ["base_model.model.lm_head.modules_to_save.default.weight"]


@pytest.mark.parametrize("gate", GATES)
class TestCopies:
    def test_deepcopy(self, gate: str) -> None:
        wrapped = masked(tiny_llama(), gate=gate)
        other = copy.deepcopy(wrapped)
        expected = logits(wrapped)
        assert torch.equal(logits(other), expected)
        scatter(other, seed=5)
        assert torch.equal(logits(wrapped), expected)
        assert not torch.equal(logits(other), expected)

    def test_pickle(self, gate: str) -> None:
        wrapped = masked(tiny_llama(), gate=gate)
        other = pickle.loads(pickle.dumps(wrapped))
        assert torch.equal(logits(other), logits(wrapped))

    def test_deepcopy_of_a_merged_model_unmerges(self, gate: str) -> None:
        model = tiny_llama()
        before = base_hash(model)
        wrapped = masked(model, gate=gate)
        wrapped.merge_adapter()
        other = copy.deepcopy(wrapped)
        other.unmerge_adapter()
        assert base_hash(other) == before
        assert base_hash(wrapped) != before


def test_generate() -> None:
    model = tiny_llama()
    inputs = batch(model)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    before = model.generate(**inputs, **kwargs)
    wrapped = get_peft_model(model, MaskConfig()).eval()
    assert torch.equal(wrapped.generate(**inputs, **kwargs), before)


def test_repr_names_the_layer() -> None:
    layer = Linear(nn.Linear(3, 2), "default", MaskConfig())
    assert repr(layer).startswith("mask.Linear(")
    assert (layer.in_features, layer.out_features) == (3, 2)
    assert layer.supports_lora_conversion()
