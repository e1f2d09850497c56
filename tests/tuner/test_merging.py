"""Merging, disabling, several adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from maskft import MaskConfig
from maskft.linear import masked_weight
from maskft.tuner import MaskLayer

from .models import GATES, base_hash, logits, masked, scatter, scores_of, tiny_llama, tiny_llava

each_gate = pytest.mark.parametrize("gate", GATES)


def layers(model: nn.Module) -> dict[str, MaskLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskLayer)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.frozen().weight.detach().clone() for name, layer in layers(model).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def two_adapters(first: str = "normalized", second: str = "centered", **fields: object) -> PeftModel:
    model = masked(tiny_llama(), gate=first)
    model.add_adapter("other", MaskConfig(gate=second, **fields))
    scatter(model, "other", seed=2)
    return model.eval()


@each_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestMerging:
    def test_merged_weights_and_outputs_equal_the_masked_ones(self, gate: str, dtype: torch.dtype) -> None:
        model = masked(tiny_llama(dtype=dtype), gate=gate)
        output = logits(model)
        expected = {
            name: masked_weight(layer.frozen().weight, layer.masks(["default"])).to(dtype).detach()
            for name, layer in layers(model).items()
        }
        model.merge_adapter()
        assert_equal(weights(model), expected)
        assert torch.equal(logits(model), output)
        assert all(layer.merged_adapters == ["default"] for layer in layers(model).values())

    def test_unmerge_restores_every_bit(self, gate: str, dtype: torch.dtype) -> None:
        model = tiny_llama(dtype=dtype)
        before = base_hash(model)
        wrapped = masked(model, gate=gate)
        output = logits(wrapped)
        for _ in range(2):
            wrapped.merge_adapter(safe_merge=True)
            assert base_hash(wrapped) != before
            wrapped.unmerge_adapter()
            assert base_hash(wrapped) == before
            assert torch.equal(logits(wrapped), output)

    @pytest.mark.parametrize("safe_merge", [True, False])
    def test_merge_and_unload(self, gate: str, dtype: torch.dtype, safe_merge: bool) -> None:
        model = tiny_llama(dtype=dtype)
        keys = set(model.state_dict())
        wrapped = masked(model, gate=gate)
        output = logits(wrapped)
        merged = wrapped.merge_and_unload(safe_merge=safe_merge)
        assert set(merged.state_dict()) == keys
        assert not layers(merged)
        assert torch.equal(logits(merged), output)

    def test_unload_gives_the_base_back(self, gate: str, dtype: torch.dtype) -> None:
        model = tiny_llama(dtype=dtype)
        before = base_hash(model)
        assert base_hash(masked(model, gate=gate).unload()) == before

    def test_delta_is_what_merging_adds(self, gate: str, dtype: torch.dtype) -> None:
        model = masked(tiny_llama(dtype=dtype), gate=gate)
        base = weights(model)
        deltas = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
        for name, layer in layers(model).items():
            m = layer.mask_gate["default"].value(layer.mask_scores["default"].detach(), base[name])
            assert deltas[name].dtype == torch.float32
            # W m - W against W (m - 1): one rounding of W m, in fp32
            torch.testing.assert_close(deltas[name], base[name].float() * (m - 1), rtol=1e-5, atol=1e-6)
        model.merge_adapter()
        for name, layer in layers(model).items():
            assert torch.equal(layer.get_delta_weight("default"), deltas[name])


@each_gate
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_safe_merge_refuses_broken_scores_and_changes_nothing(gate: str, value: float) -> None:
    model = masked(tiny_llama(), gate=gate)
    scores = next(iter(scores_of(model).values()))
    scores.data[0, 0] = value
    before = base_hash(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert base_hash(model) == before
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_merging_twice_warns_and_unmerging_twice_warns() -> None:
    model = masked(tiny_llama())
    model.merge_adapter()
    once = weights(model)
    with pytest.warns(UserWarning, match="(Already|already).*merged"):
        model.merge_adapter()
    assert_equal(weights(model), once)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@each_gate
class TestDisabling:
    def test_context_gives_the_base_and_comes_back(self, gate: str) -> None:
        model = tiny_llava()
        before = logits(model)
        wrapped = masked(model, gate=gate)
        output = logits(wrapped)
        assert not torch.equal(output, before)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped), before)
        assert torch.equal(logits(wrapped), output)

    def test_unmerges_a_merged_model(self, gate: str) -> None:
        model = tiny_llama()
        before = logits(model)
        wrapped = masked(model, gate=gate)
        output = logits(wrapped)
        wrapped.merge_adapter()
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped), before)
        assert torch.equal(logits(wrapped), output)


class TestTwoAdapters:
    @each_gate
    @pytest.mark.parametrize("first", GATES)
    def test_active_masks_multiply(self, first: str, gate: str) -> None:
        model = two_adapters(first, gate)
        model.base_model.set_adapter(["default", "other"])
        for layer in layers(model).values():
            masks = layer.active_masks()
            assert len(masks) == 2
            weight = layer.frozen().weight
            m1, m2 = (mask.gate.value(mask.offset(weight), weight) for mask in masks)
            x = torch.randn(3, weight.shape[1])
            torch.testing.assert_close(layer(x), x @ (weight * m1 * m2).T)

    @each_gate
    @pytest.mark.parametrize("first", GATES)
    def test_merging_one_after_the_other_equals_merging_at_once(self, first: str, gate: str) -> None:
        model = two_adapters(first, gate)
        before = base_hash(model)
        model.base_model.set_adapter(["default", "other"])
        output = logits(model)
        model.merge_adapter(["default", "other"])
        at_once = weights(model)
        assert torch.equal(logits(model), output)
        model.unmerge_adapter()
        assert base_hash(model) == before
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="Already following adapters were merged default"):
            model.merge_adapter(["other"])
        assert_equal(weights(model), at_once)
        assert all(layer.merged_adapters == ["default", "other"] for layer in layers(model).values())
        model.unmerge_adapter()
        assert base_hash(model) == before

    def test_merge_and_unload_of_a_named_adapter(self) -> None:
        model = two_adapters()
        model.set_adapter("other")
        output = logits(model)
        assert torch.equal(logits(model.merge_and_unload(adapter_names=["other"])), output)

    def test_set_adapter_switches_output_and_gradients(self) -> None:
        model = two_adapters()
        first = logits(model)
        model.set_adapter("other")
        assert not torch.equal(logits(model), first)
        assert all(p.requires_grad for p in scores_of(model, "other").values())
        assert not any(p.requires_grad for p in scores_of(model).values())
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

    def test_adding_one_leaves_the_first_active_and_trainable(self) -> None:
        model = masked(tiny_llama())
        output = logits(model)
        model.add_adapter("other", MaskConfig(init_weights=False))
        assert model.active_adapters == ["default"]
        assert torch.equal(logits(model.eval()), output)
        assert all(p.requires_grad for p in scores_of(model).values())
        assert not any(p.requires_grad for p in scores_of(model, "other").values())

    def test_other_targets(self) -> None:
        model = masked(tiny_llama(), modules="attn")
        first = logits(model)
        model.add_adapter("other", MaskConfig(gate="centered", modules="mlp"))
        scatter(model, "other", seed=2)
        model.eval()
        assert len(scores_of(model)) == 8
        assert len(scores_of(model, "other")) == 6
        assert torch.equal(logits(model), first)
        before = base_hash(model)
        model.base_model.set_adapter(["default", "other"])
        both = logits(model)
        model.merge_adapter()
        assert torch.equal(logits(model), both)
        model.unmerge_adapter()
        assert base_hash(model) == before

    def test_overlapping_targets(self) -> None:
        model = two_adapters("normalized", "threshold", modules="attn")
        model.base_model.set_adapter(["default", "other"])
        counts = sorted(len(layer.active_masks()) for layer in layers(model).values())
        assert counts == [1] * 6 + [2] * 8

    def test_delete_adapter(self) -> None:
        model = two_adapters()
        first = logits(model)
        model.delete_adapter("other")
        assert not scores_of(model, "other")
        assert all(list(layer.mask_gate) == ["default"] for layer in layers(model).values())
        assert torch.equal(logits(model), first)
        assert set(model.peft_config) == {"default"}

    def test_delete_of_the_active_adapter_falls_back_to_another(self) -> None:
        model = two_adapters()
        model.set_adapter("other")
        second = logits(model)
        model.set_adapter("default")
        with pytest.warns(UserWarning, match="was active which is now deleted"):
            model.delete_adapter("default")
        assert torch.equal(logits(model), second)

    def test_delete_of_the_only_adapter_gives_the_base(self) -> None:
        base = tiny_llama()
        before = logits(base)
        masked(base).delete_adapter("default")
        assert not scores_of(base)
        assert torch.equal(logits(base), before)

    def test_training_two_at_once(self) -> None:
        model = two_adapters()
        model.base_model.set_adapter(["default", "other"])
        logits_ = model(input_ids=torch.tensor([[3, 4, 5]])).logits
        logits_.square().mean().backward()
        for adapter in ("default", "other"):
            assert all(p.grad is not None and p.grad.any() for p in scores_of(model, adapter).values())


def test_delta_of_an_unscattered_adapter_is_zero() -> None:
    model = get_peft_model(tiny_llama(), MaskConfig(gate="normalized"))
    assert not any(layer.get_delta_weight("default").any() for layer in layers(model).values())
