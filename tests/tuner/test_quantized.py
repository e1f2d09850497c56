"""Masks on quantised frozen weights, against plain masks on the same weights unpacked; and merging them."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from maskft import MaskConfig
from maskft.linear import masked_weight
from maskft.tuner import attach, merge_in_full_precision
from maskft.tuner.quantized import QuantizedLinear

from .models import GATES, batch, logits, loss, masked, scatter, scores_of
from .quantization import BACKENDS, KINDS, layers, load, merge_quietly, packed_hash, save_base

each_kind = pytest.mark.parametrize("kind", KINDS)
each_gate = pytest.mark.parametrize("gate", GATES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def plain_twin(folder: Path, model: nn.Module) -> LlamaForCausalLM:
    """A model in full precision with the same weights, unpacked by PEFT's own function."""
    twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            twin.get_submodule(name).weight.data = dequantize_module_weight(module).detach().float()
    return twin


def half_gap(code: Tensor) -> float:
    return max(high - low for low, high in pairwise(sorted(code.tolist()))) / 2


def rounding_bound(layer: QuantizedLinear, weight: Tensor) -> Tensor:
    """The largest rounding error of each entry when `weight` is quantised as the layer's weight is.

    Half a gap of the code times the scale; double quantisation rounds the scales of 256 blocks likewise. Beside it,
    what is packed and unpacked is rounded to a dtype, of which `eps` is a bound on the relative error of both.
    """
    stored = layer.save_weight()
    if layer.quantization_backend.backend_name == "bnb 8bit":
        rows = weight.abs().amax(1, keepdim=True)
        return (rows * (0.5 / 127 + torch.finfo(torch.float16).eps)).expand_as(weight)
    if layer.quantization_backend.backend_name == "torchao":
        data: Any = stored.data
        bits = 8 if type(data).__name__ == "Int8Tensor" else 4
        groups = weight.view(weight.shape[0], -1, data.block_size[-1])
        steps = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
        return (steps * (0.5 + 2**bits * torch.finfo(data.dtype).eps)).expand_as(groups).reshape(weight.shape)
    state = stored.scales
    blocks = weight.reshape(-1, state.blocksize)
    scales = blocks.abs().amax(1, keepdim=True)
    off = 0.0
    if state.nested:
        of_scales = (scales - scales.mean()).abs().max().item()
        off = half_gap(state.state2.code) * of_scales + 1e-6
    bound = scales * (half_gap(state.code) + torch.finfo(state.dtype).eps) + off
    return bound.expand_as(blocks).reshape(weight.shape)


@each_kind
class TestAgainstPlainMasks:
    def test_layers(self, checkpoint: Path, kind: str) -> None:
        model = attach(load(checkpoint, kind), MaskConfig())
        backend, name = BACKENDS.get(kind, ("torchao", "TorchaoLinear"))
        assert len(layers(model)) == 14
        for layer in layers(model).values():
            assert type(layer).__name__ == name
            assert layer.mask_scores["default"].shape == (layer.out_features, layer.in_features)
            assert layer.mask_scores["default"].dtype == torch.float32
        assert model.get_model_status().quantization_backend == backend
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trainable == list(scores_of(model))

    @each_gate
    def test_logits_and_gradients(self, checkpoint: Path, kind: str, gate: str) -> None:
        base = load(checkpoint, kind)
        twin = masked(plain_twin(checkpoint, base), gate=gate)
        model = masked(base, gate=gate)
        # both compute in fp32; scales may be multiplied in another order
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
        for one in (model, twin):
            loss(one).backward()
        for name, parameter in scores_of(model).items():
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=1e-4, atol=1e-7)

    def test_two_masks_multiply(self, checkpoint: Path, kind: str) -> None:
        base = load(checkpoint, kind)
        models = [masked(one, gate="normalized") for one in (plain_twin(checkpoint, base), base)]
        for model in models:
            model.add_adapter("other", MaskConfig(gate="topk", keep_ratio=0.7))
            scatter(model, "other", seed=2)
            model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-5, atol=1e-5)

    def test_disabled_masks_give_the_base_and_gradients_to_inputs(self, checkpoint: Path, kind: str) -> None:
        base = load(checkpoint, kind)
        expected = logits(plain_twin(checkpoint, base))
        model = masked(base)
        output = logits(model)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
            layer = next(iter(layers(model).values()))
            x = torch.randn(3, layer.in_features, requires_grad=True)
            layer(x).sum().backward()
            torch.testing.assert_close(x.grad, layer.pretrained_weight().float().sum(0).expand(3, -1))
        assert torch.equal(logits(model), output)

    def test_inference_mode(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind))
        output = logits(model)
        with torch.inference_mode():
            assert torch.equal(logits(model), output)
            with model.disable_adapter():
                assert not torch.equal(logits(model), output)
            merge_quietly(model)
            assert not torch.equal(logits(model), output)
            model.unmerge_adapter()
        assert torch.equal(logits(model), output)

    def test_starts_at_the_base(self, checkpoint: Path, kind: str) -> None:
        model = attach(load(checkpoint, kind), MaskConfig(gate="normalized"))
        with model.disable_adapter():
            before = logits(model)
        assert torch.equal(logits(model), before)

    def test_low_precision_and_autocast(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind, torch.bfloat16))
        layer = next(iter(layers(model).values()))
        x = torch.randn(2, 3, layer.in_features)
        expected = layer(x.bfloat16())
        assert expected.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected.float())  # computed in bf16, and back in the dtype of x
            loss(model).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in scores_of(model).values())

    def test_copies(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind))
        output = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), output)
        if kind in BACKENDS:  # torchao hangs a function on its layers that cannot be pickled
            assert torch.equal(logits(pickle.loads(pickle.dumps(model))), output)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao"])
@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_twenty_steps_lower_the_loss_and_leave_the_base_alone(checkpoint: Path, kind: str, gate: str) -> None:
    model = attach(load(checkpoint, kind, torch.bfloat16), MaskConfig(gate=gate, init_gate=0.9))
    before = packed_hash(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3, eps=1e-12)
    losses = []
    for _ in range(20):
        value = loss(model.train())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.5
    assert packed_hash(model) == before


@each_kind
class TestMerging:
    @each_gate
    def test_each_weight_is_off_by_no_more_than_rounding(self, checkpoint: Path, kind: str, gate: str) -> None:
        model = masked(load(checkpoint, kind), gate=gate)
        exact, inputs = {}, {name: torch.randn(5, layer.in_features) for name, layer in layers(model).items()}
        for name, layer in layers(model).items():
            with torch.no_grad():
                weight = masked_weight(layer.pretrained_weight().float(), layer.active_masks())
                exact[name] = weight, rounding_bound(layer, weight), layer(inputs[name])
        merge_quietly(model)
        shares = []
        for name, layer in layers(model).items():
            weight, bound, output = exact[name]
            error = (layer.get_base_weight().float() - weight).abs()
            assert (error <= bound).all(), name
            shares.append((error / bound.clamp(min=1e-30)).max().item())
            allowed = inputs[name].abs() @ bound.T + 1e-5
            assert ((layer(inputs[name]) - output).abs() <= allowed).all()
        if gate in ("soft", "normalized", "centered"):
            assert max(shares) > 0.5  # the bound says something

    def test_logits_move_by_what_the_rounding_of_weights_implies(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind), gate="soft", init_gate=0.9)
        dense = merge_in_full_precision(copy.deepcopy(model))
        before = logits(model)
        torch.testing.assert_close(logits(dense), before, rtol=1e-5, atol=1e-5)
        bounds = {
            name.removeprefix("base_model.model."): rounding_bound(layer, weight.float())
            for name, layer in layers(model).items()
            for weight in [dense.get_submodule(name.removeprefix("base_model.model.")).weight.detach()]
        }
        merge_quietly(model)
        merged = logits(model)
        # Nothing but the weights has changed ...
        torch.testing.assert_close(merged, logits(plain_merged(dense, model)), rtol=1e-5, atol=1e-5)
        # ... and to first order a logit moves by at most the sum of |its gradient| times the bound of each weight.
        weights = {name: dense.get_submodule(name).weight.requires_grad_(True) for name in bounds}
        output = dense(**batch(dense)).logits
        for token in (3, 17, 42):
            gradients = torch.autograd.grad(output[0, -1, token], list(weights.values()), retain_graph=True)
            allowed = sum((g.abs() * bounds[name]).sum() for name, g in zip(weights, gradients, strict=True))
            moved = (merged - before)[0, -1, token].abs()
            assert 0 < moved <= allowed

    def test_unmerge_restores_every_bit(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind), gate="topk")
        before, output = packed_hash(model), logits(model)
        for _ in range(2):
            merge_quietly(model, safe_merge=True)
            assert packed_hash(model) != before
            assert all(layer.get_delta_weight("default").any() for layer in layers(model).values())
            model.unmerge_adapter()
            assert packed_hash(model) == before
            assert torch.equal(logits(model), output)

    def test_disabling_unmerges(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind))
        with model.disable_adapter():
            base = logits(model)
        merge_quietly(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)

    def test_one_after_the_other_equals_at_once(self, checkpoint: Path, kind: str) -> None:
        model = masked(load(checkpoint, kind), gate="normalized")
        model.add_adapter("other", MaskConfig(gate="centered"))
        scatter(model, "other", seed=2)
        merge_quietly(model, adapter_names=["default", "other"])
        at_once = packed_hash(model)
        model.unmerge_adapter()
        merge_quietly(model, adapter_names=["default"])
        with pytest.warns(UserWarning, match="Already following adapters were merged default"):
            merge_quietly(model, adapter_names=["other"])
        assert packed_hash(model) == at_once

    def test_merge_and_unload_keeps_the_base_quantised(self, checkpoint: Path, kind: str) -> None:
        base = load(checkpoint, kind)
        keys, kinds = set(base.state_dict()), {name: type(module) for name, module in base.named_modules()}
        model = masked(base)
        merge_quietly(model)
        output = logits(model)
        model.unmerge_adapter()
        with pytest.warns(UserWarning, match="rounds the result"):
            bare = model.merge_and_unload()
        assert set(bare.state_dict()) == keys
        assert {name: type(module) for name, module in bare.named_modules()} == kinds
        bare.train()  # in evaluation mode bitsandbytes rounds activations or scales as well
        torch.testing.assert_close(logits(bare), output, rtol=1e-4, atol=1e-4)

    def test_unload_gives_the_base_back(self, checkpoint: Path, kind: str) -> None:
        base = load(checkpoint, kind)
        before = packed_hash(base)
        assert packed_hash(masked(base).unload()) == before

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_safe_merge_refuses_broken_scores(self, checkpoint: Path, kind: str, value: float) -> None:
        model = masked(load(checkpoint, kind), gate="topk")
        scores = next(iter(scores_of(model).values()))
        scores.data[0, 0] = value
        before = packed_hash(model)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge_in_full_precision(model, safe_merge=True)
        assert packed_hash(model) == before

    def test_in_full_precision(self, checkpoint: Path, kind: str, tmp_path: Path) -> None:
        model = masked(load(checkpoint, kind, torch.bfloat16), modules="attn")
        model.train()  # the layers without masks compute as they were loaded to
        output = logits(model)
        merged = merge_in_full_precision(model, safe_merge=True)
        assert {type(m) for name, m in merged.named_modules() if name.endswith("_proj")} == {nn.Linear}
        assert not any(parameter.requires_grad for name, parameter in merged.named_parameters() if "_proj" in name)
        merged.save_pretrained(tmp_path)
        assert "quantization_config" not in (tmp_path / "config.json").read_text()
        reloaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(logits(reloaded), logits(merged))
        assert not getattr(merged, "is_quantized", False)
        # bf16 rounds to 1 part in 256, in another order in layers that had no mask
        torch.testing.assert_close(logits(reloaded), output, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("kind", "width"), [("nf4", 64), ("fp4", 64), ("nf4-bf16-storage", 64), ("int8", None)])
def test_hard_masks_are_exact_where_the_largest_weight_was_kept(checkpoint: Path, kind: str, width: int | None) -> None:
    model = masked(load(checkpoint, kind), gate="topk", keep_ratio=0.5)
    before = {name: layer.pretrained_weight() for name, layer in layers(model).items()}
    merge_quietly(model)
    exact = 0
    for name, layer in layers(model).items():
        with torch.no_grad():
            masked_ = masked_weight(before[name], layer.masks(["default"]))
        weight, expected, merged = (
            matrix.view(-1, width or matrix.shape[1]) for matrix in (before[name], masked_, layer.get_base_weight())
        )
        kept = expected.abs().amax(1) == weight.abs().amax(1)
        torch.testing.assert_close(merged[kept], expected[kept], rtol=1e-6, atol=0)
        exact += int(kept.sum())
    assert exact > 100


def plain_merged(dense: nn.Module, model: nn.Module) -> nn.Module:
    """The dense model with the weights that merging left in the quantised one."""
    twin = copy.deepcopy(dense)
    for name, layer in layers(model).items():
        twin.get_submodule(name.removeprefix("base_model.model.")).weight.data = layer.get_base_weight().float()
    return twin
