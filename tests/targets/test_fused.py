"""Heights of fused weights are those at which the model itself cuts: found out by changing rows and running it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch import Tensor, nn

from maskft import MaskConfig
from maskft.targets import fused_heights, lies_transposed
from maskft.tuner import MaskLayer
from tests.targets.forms import MOE, TEXT, tokens
from tests.targets.zoo import FAMILIES, inputs, random_model

GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 128, **tokens()}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "GPT-BigCode": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**GPT)),
    "GPT-BigCode, every head its own": lambda: t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**GPT, multi_query=False)),
    "MPT": lambda: t.MptForCausalLM(t.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=128, max_seq_len=64)),
    "GPT-2, cross-attention": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT, add_cross_attention=True)),
    "CodeGen": lambda: t.CodeGenForCausalLM(t.CodeGenConfig(**GPT, rotary_dim=4)),
    "MiniMax": lambda: t.MiniMaxForCausalLM(
        t.MiniMaxConfig(**{**MOE, "num_hidden_layers": 2}, layer_types=["linear_attention", "full_attention"])
    ),
}
QKV = {
    "Phi-3": "model.layers.0.self_attn.qkv_proj",
    "GPT-2": "transformer.h.0.attn.c_attn",
    "Qwen2-VL": "model.visual.blocks.0.attn.qkv",
    "Qwen2.5-VL": "model.visual.blocks.0.attn.qkv",
    "Qwen3-VL": "model.visual.blocks.0.attn.qkv",
    "BLIP-2": "vision_model.encoder.layers.0.self_attn.qkv",
    "GPT-BigCode": "transformer.h.0.attn.c_attn",
    "MPT": "transformer.blocks.0.attn.Wqkv",
}
GATE_UP = {
    "Phi-3": "model.layers.0.mlp.gate_up_proj",
    "Mixtral": "model.layers.0.mlp.experts.gate_up_proj",
    "Qwen3-MoE": "model.layers.0.mlp.experts.gate_up_proj",
    "Qwen3-VL-MoE": "model.language_model.layers.0.mlp.experts.gate_up_proj",
    "DeepSeek-V3": "model.layers.1.mlp.experts.gate_up_proj",
    "Llama-4": "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
}


class Rows:
    """A fused weight of a model, whose rows (outputs) can be changed; `output` is what the model says."""

    def __init__(self, name: str, place: str) -> None:
        if name in OTHERS:
            torch.manual_seed(0)
            self.model: Any = OTHERS[name]().eval()
            for parameter in self.model.parameters():
                nn.init.normal_(parameter, std=0.3)
            self.inputs = {"input_ids": torch.arange(10, 22)[None]}
        else:
            self.model = random_model(name)
            self.inputs = {k: v for k, v in inputs(name, self.model).items() if k != "labels"}
        parent, _, own = place.rpartition(".")
        self.parent, self.own = self.model.get_submodule(parent), own
        kept = getattr(self.parent, own)
        self.weight: Tensor = kept.weight if isinstance(kept, nn.Module) else kept
        self.bias: Tensor | None = getattr(kept, "bias", None)
        self.heights = fused_heights(own, self.weight, self.parent)

    def matrix(self) -> Tensor:
        return self.weight.data.mT if lies_transposed(self.own, self.parent) else self.weight.data

    def pieces(self) -> list[range]:
        edges = [sum(self.heights[:i]) for i in range(len(self.heights) + 1)]
        return [range(first, last) for first, last in pairwise(edges)]

    def change(self, rows: range | list[int], zero: bool = False) -> None:
        at = list(rows)
        self.matrix()[..., at, :] = 0 if zero else torch.randn_like(self.matrix()[..., at, :])
        if self.bias is not None:
            self.bias.data[at] = 0 if zero else torch.randn(len(at))

    def matters(self, rows: range | list[int]) -> bool:
        """Whether the output depends on these rows."""
        with torch.no_grad():
            before = self.model(**self.inputs).logits
            self.change(rows)
            return not torch.equal(before, self.model(**self.inputs).logits)


@pytest.mark.parametrize("name", QKV)
def test_without_values_queries_and_keys_say_nothing(name: str) -> None:
    rows = Rows(name, QKV[name])
    queries, keys, values = rows.pieces()
    assert values.stop == rows.matrix().shape[-2]
    rows.change(values, zero=True)
    assert not rows.matters([*queries, *keys])


@pytest.mark.parametrize("name", QKV)
def test_without_queries_keys_say_nothing(name: str) -> None:
    rows = Rows(name, QKV[name])
    queries, keys, values = rows.pieces()
    rows.change(queries, zero=True)
    assert not rows.matters(keys)
    assert rows.matters([values.start])
    assert rows.matters([values.stop - 1])


@pytest.mark.parametrize("name", QKV)
def test_without_keys_queries_say_nothing(name: str) -> None:
    rows = Rows(name, QKV[name])
    queries, keys, _ = rows.pieces()
    rows.change(keys, zero=True)
    assert not rows.matters(queries)


@pytest.mark.parametrize("name", QKV)
def test_each_of_the_three_counts(name: str) -> None:
    rows = Rows(name, QKV[name])
    for piece in rows.pieces():
        assert rows.matters(piece)


@pytest.mark.parametrize("name", GATE_UP)
@pytest.mark.parametrize("zeroed", [0, 1], ids=["gate", "up"])
def test_gate_and_up_need_each_other(name: str, zeroed: int) -> None:
    rows = Rows(name, GATE_UP[name])
    pieces = rows.pieces()
    assert len(pieces) == 2
    assert pieces[1].stop == rows.matrix().shape[-2]
    assert rows.matters(pieces[1 - zeroed])
    rows.change(pieces[zeroed], zero=True)
    assert not rows.matters(pieces[1 - zeroed])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("GPT-NeoX", "gpt_neox.layers.0.attention.query_key_value"),
        ("GPT-OSS", "model.layers.0.mlp.experts.gate_up_proj"),
        ("GPT-BigCode, every head its own", "transformer.h.0.attn.c_attn"),
        ("CodeGen", "transformer.h.0.attn.qkv_proj"),
        ("MiniMax", "model.layers.0.self_attn.qkv_proj"),
        ("Llama", "model.layers.0.self_attn.q_proj"),
        ("Mixtral", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_weights_that_are_no_stack(name: str, place: str) -> None:
    assert Rows(name, place).heights == ()


def test_keys_and_values_of_cross_attention() -> None:
    rows = Rows("GPT-2, cross-attention", "transformer.h.0.crossattention.c_attn")
    assert rows.heights == (32, 32)
    rows.inputs["encoder_hidden_states"] = torch.randn(1, 5, 32)
    keys, values = rows.pieces()
    rows.change(values, zero=True)
    assert not rows.matters(keys)


def test_uneven_rows_are_left_whole() -> None:
    assert fused_heights("qkv", torch.empty(31, 8), nn.Module()) == ()
    assert fused_heights("qkv", torch.empty(30, 8), nn.Module()) == (10, 10, 10)
    assert fused_heights("qkv", None, nn.Module()) == ()


def test_a_quantised_weight_has_the_heights_of_its_layer() -> None:
    """4-bit weights are kept as (bytes, 1)."""
    attention = t.Phi3ForCausalLM(t.Phi3Config(**TEXT)).model.layers[0].self_attn
    assert fused_heights("qkv_proj", torch.empty(1024, 1), attention) == (32, 16, 16)


def test_heights_and_direction_of_masked_weights() -> None:
    model = random_model("Llama-4")
    wanted = FAMILIES["Llama-4"].names("language", "mlp")
    experts = [name for name in wanted if ".experts." in name]
    masked = get_peft_model(model, MaskConfig(target_parameters=experts))
    wrapper = masked.base_model.model.language_model.model.layers[1].feed_forward.experts
    assert isinstance(wrapper, MaskLayer)
    for name in ("gate_up_proj", "down_proj"):
        assert lies_transposed(name, wrapper)
    weight = wrapper.get_base_layer().gate_up_proj
    assert fused_heights("gate_up_proj", weight, wrapper) == (48, 48)


@pytest.mark.parametrize(
    ("name", "parent", "own", "transposed"),
    [
        ("GPT-2", "transformer.h.0.attn", "c_attn", True),
        ("GPT-2", "transformer.h.0.mlp", "c_proj", True),
        ("Gemma-3", "model.multi_modal_projector", "mm_input_projection_weight", True),
        ("GPT-OSS", "model.layers.0.mlp.experts", "down_proj", True),
        ("Llama-4", "language_model.model.layers.1.feed_forward.experts", "down_proj", True),
        ("Mixtral", "model.layers.0.mlp.experts", "down_proj", False),
        ("Mixtral", "model.layers.0.mlp.experts", "gate_up_proj", False),
        ("Llama", "model.layers.0.mlp", "down_proj", False),
    ],
)
def test_direction(name: str, parent: str, own: str, transposed: bool) -> None:
    with torch.device("meta"):
        model = FAMILIES[name].build()
    assert lies_transposed(own, model.get_submodule(parent)) is transposed
