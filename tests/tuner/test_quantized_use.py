"""Saving, training tools and refusals around masks on quantised bases."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, quantize_4bit
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import maskft.tuner.formats
from maskft import MaskConfig
from maskft.errors import AdapterError, ModelError
from maskft.tuner import attach, attach_saved, kept_scores, merge_in_full_precision
from maskft.tuner.formats import BITS4, TORCHAO, Stored

from .models import batch, logits, loss, masked, scatter, scores_of, tiny_llama, tiny_llava
from .quantization import FOUR_BITS, layers, load, merge_quietly, packed_hash, save_base

each_library = pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


class TestSaving:
    @each_library
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_round_trip(self, checkpoint: Path, kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        model = masked(load(checkpoint, kind))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint, kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))

    @each_library
    def test_second_adapter(self, checkpoint: Path, kind: str, tmp_path: Path) -> None:
        masked(load(checkpoint, kind), gate="centered").save_pretrained(tmp_path)
        model = masked(load(checkpoint, kind), seed=5)
        model.load_adapter(tmp_path, "second")
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(attach_saved(load(checkpoint, kind), tmp_path)))

    def test_saved_while_merged(self, checkpoint: Path, tmp_path: Path) -> None:
        model = masked(load(checkpoint, "nf4"))
        output = logits(model)
        merge_quietly(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(attach_saved(load(checkpoint, "nf4"), tmp_path)), output)

    def test_belongs_to_the_base_as_it_was_quantised(self, checkpoint: Path, tmp_path: Path) -> None:
        model = masked(load(checkpoint, "nf4", torch.bfloat16))
        model.save_pretrained(tmp_path)
        plain = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        for other in (plain, load(checkpoint, "fp4"), load(checkpoint, "int8")):
            with pytest.raises(AdapterError, match=r"trained on another base.*quantised as it was then"):
                attach_saved(other, tmp_path)
        assert len(layers(attach_saved(load(checkpoint, "nf4", torch.float32), tmp_path))) == 14

    def test_can_be_put_on_the_base_in_full_precision_on_demand(self, checkpoint: Path, tmp_path: Path) -> None:
        model = masked(load(checkpoint, "int8"))
        model.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_fingerprint": None}))
        plain = attach_saved(LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), tmp_path)
        # int8 rounds weights to 1 part in 254 of the largest in a row
        torch.testing.assert_close(logits(plain), logits(model), rtol=0.05, atol=0.05)

    def test_a_base_that_was_saved_quantised(self, checkpoint: Path, tmp_path: Path) -> None:
        model = masked(load(checkpoint, "nf4"))
        model.save_pretrained(tmp_path / "adapter")
        load(checkpoint, "nf4").save_pretrained(tmp_path / "base")
        loaded = attach_saved(
            LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter"
        )
        assert torch.equal(logits(loaded), logits(model))


class TestRepacking:
    """bitsandbytes' 4-bit layers repack their weight when they run in evaluation mode on some CPUs."""

    def repack(self, model: nn.Module, name: str = "model.layers.0.mlp.up_proj") -> None:
        module = model.get_submodule(name)
        weight = module.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        module.quant_state = weight.quant_state

    def test_running_a_masked_model_never_repacks(self, checkpoint: Path) -> None:
        model = masked(load(checkpoint, "nf4"))
        before = packed_hash(model)
        for _ in range(2):
            logits(model)
            with model.disable_adapter():
                logits(model)
            merge_quietly(model)
            logits(model)
            model.unmerge_adapter()
        assert packed_hash(model) == before
        assert not any(getattr(x.save_weight().scales, "packing_format_for_cpu", 0) for x in layers(model).values())

    def test_is_undone_where_nothing_was_lost(self, checkpoint: Path) -> None:
        model = load(checkpoint, "nf4", torch.bfloat16)
        before = packed_hash(model)
        expected = logits(masked(load(checkpoint, "nf4", torch.bfloat16)))
        self.repack(model)
        model = masked(model)
        assert torch.equal(logits(model), expected)
        assert packed_hash(model) == before

    @pytest.mark.parametrize(("kind", "dtype"), [("nf4-double", torch.bfloat16), ("nf4", torch.float32)])
    def test_is_refused_where_scales_were_rounded(self, checkpoint: Path, kind: str, dtype: torch.dtype) -> None:
        model = load(checkpoint, kind, dtype)
        self.repack(model)
        with pytest.raises(ModelError, match=r"up_proj' cannot be masked: bitsandbytes has repacked .* Load the base"):
            attach(model, MaskConfig())

    @pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
    def test_gradients_through_layers_without_masks_survive_an_evaluation(self, checkpoint: Path, before: bool) -> None:
        expected = masked(load(checkpoint, "nf4", torch.bfloat16), modules="attn")
        loss(expected.train()).backward()
        model = load(checkpoint, "nf4", torch.bfloat16)
        if before:
            self.repack(model)
        model = masked(model, modules="attn")
        logits(model)
        loss(model.train()).backward()
        for name, parameter in scores_of(model).items():
            assert torch.equal(parameter.grad, expected.get_parameter(name).grad)

    def test_layers_without_masks_are_read_as_they_are(self, checkpoint: Path) -> None:
        model = load(checkpoint, "nf4-double")
        weight = BITS4.unpack(BITS4.read(model.get_submodule("model.layers.0.mlp.up_proj")))
        self.repack(model)
        merged = merge_in_full_precision(masked(model, modules="attn"))
        # scales rounded to bf16, whose steps are 1 part in 128
        torch.testing.assert_close(
            merged.get_submodule("model.layers.0.mlp.up_proj").weight, weight, rtol=2**-8, atol=0
        )


@pytest.mark.parametrize("code", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 96), (6, 32), (3, 50), (128, 64)])
def test_weights_whose_rows_are_no_multiple_of_a_block(code: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    unpacked = BITS4.unpack(Stored(*quantize_4bit(weight, quant_type=code)))
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    bound = (blocks.abs().amax(1, keepdim=True) / 6 + 1e-6).expand_as(blocks).flatten()[: weight.numel()].view(shape)
    assert ((unpacked - weight).abs() <= bound).all()


CONFIGS = {
    "rows": Int8WeightOnlyConfig(set_inductor_config=False),
    "tensor": Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False),
    "groups": Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int4-asymmetric": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_torchao_weights_are_packed_as_the_library_packs_them(name: str) -> None:
    one, other = nn.Linear(64, 16), nn.Linear(64, 16)
    weight = other.weight.detach().clone()
    for layer in (one, other):
        quantize_(layer, CONFIGS[name])
    packed = TORCHAO.pack(weight, TORCHAO.read(one))
    for part in ("qdata", "scale", "zero_point"):
        found, expected = getattr(packed.data, part), getattr(other.weight, part)
        assert (found is None and expected is None) or torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao"])
def test_bias_and_the_names_of_peft(kind: str) -> None:
    base = nn.Sequential(nn.Linear(64, 32))
    bias = base[0].bias.detach().clone()
    if kind == "int8-torchao":
        quantize_(base, CONFIGS["rows"])
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False) if kind == "int8" else bnb.nn.LinearNF4(64, 32)
        layer.load_state_dict(base[0].state_dict())
        base = nn.Sequential(layer).to("cpu")
    model = attach(base, MaskConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    scatter(model)
    x = torch.randn(5, 64)
    weight = layer.get_base_weight()
    masked_ = (weight + layer.get_delta_weight("default")).detach()
    torch.testing.assert_close(model(x), x @ masked_.T + bias)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), x @ weight.T + bias)
    torch.testing.assert_close(layer.dense_layer(torch.float32, False, None)(x), x @ masked_.T + bias)
    layer.set_base_weight(2 * weight)
    torch.testing.assert_close(layer.get_base_weight(), 2 * weight, rtol=0.01, atol=0.01)


class TestTraining:
    @each_library
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing(self, checkpoint: Path, kind: str, use_reentrant: bool) -> None:
        model = masked(load(checkpoint, kind))
        loss(model.train()).backward()
        expected = {name: parameter.grad.clone() for name, parameter in scores_of(model).items()}
        model.zero_grad()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        loss(model).backward()
        for name, parameter in scores_of(model).items():
            assert torch.equal(parameter.grad, expected[name])

    @each_library
    def test_after_preparing_for_training_in_few_bits(self, checkpoint: Path, kind: str) -> None:
        prepared = prepare_model_for_kbit_training(
            load(checkpoint, kind, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model = masked(prepared)
        loss(model.train()).backward()
        assert all(parameter.grad.any() for parameter in scores_of(model).values())
        expected = logits(masked(load(checkpoint, kind, torch.bfloat16))).float()
        # norms compute in fp32 now, and hand fp32 to layers that compute in bf16
        torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)

    def test_masks_only_move_scores(self, checkpoint: Path) -> None:
        model = masked(load(checkpoint, "nf4"), gate="topk")
        before = packed_hash(model)
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        loss(model.train()).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert packed_hash(model) == before


class TestTrl:
    """SFTTrainer casts what is trained on quantised bases to bf16."""

    def trainer(self, model: Any, folder: Path, **arguments: Any) -> SFTTrainer:
        words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(folder),
                report_to="none",
                use_cpu=True,
                bf16=False,
                max_length=8,
                learning_rate=0.1,
                save_steps=1,
                logging_steps=1,
                disable_tqdm=True,
                **{"max_steps": 2, **arguments},
            ),
            train_dataset=Dataset.from_dict({"text": ["3 4 5 6 7 8", "9 10 11 12 13"] * 8}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2"),
            peft_config=None if isinstance(model, PeftModel) else MaskConfig(),
        )

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_scores_are_trained_in_their_dtype(self, checkpoint: Path, kind: str, tmp_path: Path) -> None:
        trainer = self.trainer(load(checkpoint, kind, torch.bfloat16), tmp_path)
        trainer.train()
        for parameter in scores_of(trainer.model).values():
            assert parameter.dtype == torch.float32
            assert trainer.optimizer.state[parameter]["exp_avg"].dtype == torch.float32
            assert not torch.equal(parameter, parameter.bfloat16().float())  # finer than bf16

    def test_resuming_loses_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        whole = self.trainer(load(checkpoint, "nf4", torch.bfloat16), tmp_path, max_steps=3)
        whole.train()
        resumed = self.trainer(load(checkpoint, "nf4", torch.bfloat16), tmp_path, max_steps=3)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        for name, parameter in scores_of(whole.model).items():
            assert torch.equal(parameter, resumed.model.get_parameter(name))

    @pytest.mark.parametrize("how", ["train", "eval", "to"])
    def test_the_next_use_brings_the_dtype_back(self, checkpoint: Path, how: str, tmp_path: Path) -> None:
        trainer = self.trainer(load(checkpoint, "nf4", torch.bfloat16), tmp_path)
        assert {parameter.dtype for parameter in scores_of(trainer.model).values()} == {torch.bfloat16}
        trainer.model.to("cpu") if how == "to" else getattr(trainer.model, how)()
        assert {parameter.dtype for parameter in scores_of(trainer.model).values()} == {torch.float32}

    def test_kept_scores_keep_every_bit(self, checkpoint: Path, tmp_path: Path) -> None:
        model = get_peft_model(load(checkpoint, "nf4", torch.bfloat16), MaskConfig())
        scatter(model)
        before = {name: parameter.detach().clone() for name, parameter in scores_of(model).items()}
        with kept_scores(model):
            self.trainer(model, tmp_path)
            assert {parameter.dtype for parameter in scores_of(model).values()} == {torch.bfloat16}
        assert all(torch.equal(parameter, before[name]) for name, parameter in scores_of(model).items())

    @pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
    def test_what_takes_weights_to_pieces_chooses_the_dtype(
        self, checkpoint: Path, variable: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = get_peft_model(load(checkpoint, "nf4", torch.bfloat16), MaskConfig())
        monkeypatch.setenv(variable, "true")
        monkeypatch.setattr(maskft.tuner.precision, "is_fsdp_enabled", lambda: variable.endswith("FSDP"))
        model.to(torch.bfloat16).train()
        assert {parameter.dtype for parameter in scores_of(model).values()} == {torch.bfloat16}

    def test_plain_bases_are_left_alone(self) -> None:
        model = get_peft_model(tiny_llama(), MaskConfig())
        model.bfloat16().train()
        assert {parameter.dtype for parameter in scores_of(model).values()} == {torch.bfloat16}


def fake(module: str, name: str, base: type[nn.Module] = nn.Module) -> type[nn.Module]:
    """A class that goes by the name of another package's."""
    return type(name, (base,), {"__module__": module})


FOREIGN = [
    ("GPTQ", "gptqmodel.nn_modules.qlinear.marlin", "MarlinLinear"),
    ("GPTQ", "auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear"),
    ("AWQ", "awq.modules.linear.gemm", "WQLinear_GEMM"),
    ("AWQ", "gptqmodel.nn_modules.qlinear.gemm_awq", "AwqGEMMLinear"),
    ("AQLM", "aqlm.inference", "QuantizedLinear"),
    ("EETQ", "transformers.integrations.eetq", "EetqLinear"),
    ("HQQ", "hqq.core.quantize", "HQQLinear"),
    ("GGUF", "transformers.integrations.gguf.utils", "GgufLinear"),
    ("BitNet", "transformers.integrations.bitnet", "BitLinear"),
    ("FP8", "transformers.integrations.finegrained_fp8", "FP8Linear"),
    ("VPTQ", "vptq.layers.vqlinear", "VQuantLinear"),
    ("Quanto", "optimum.quanto.nn.qlinear", "QLinear"),
    ("compressed-tensors", "compressed_tensors.linear.compressed_linear", "CompressedLinear"),
]


class TestRefusals:
    @pytest.mark.parametrize(("scheme", "module", "name"), FOREIGN, ids=lambda value: str(value))
    @pytest.mark.parametrize("base", [nn.Module, nn.Linear])
    def test_by_name(self, scheme: str, module: str, name: str, base: type[nn.Module]) -> None:
        kind = fake(module, name, base)
        model = tiny_llama()
        model.model.layers[1].mlp.up_proj = kind(16, 32) if base is nn.Linear else kind()
        message = f"layers.1.mlp.up_proj' cannot be masked: it is quantised with {scheme},.* Load the base in bf16"
        for config in (MaskConfig(), MaskConfig(target_modules=["up_proj"])):
            with pytest.raises(ModelError, match=message):
                attach(model, config)

    def test_where_no_layer_is_left_to_mask(self) -> None:
        kind = fake("gptqmodel.nn_modules.qlinear.torch", "TorchLinear")
        model = tiny_llama()
        for name in [name for name, module in model.named_modules() if name.endswith("_proj")]:
            model.set_submodule(name, kind())
        with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj' cannot be masked: .* GPTQ"):
            attach(model, MaskConfig())

    def test_unknown_schemes_with_codes_of_their_own(self) -> None:
        model = tiny_llama()
        model.model.layers[0].mlp.up_proj = layer = fake("somewhere", "PackedLinear")()
        layer.qweight = torch.zeros(3, dtype=torch.int32)
        with pytest.raises(ModelError, match="quantised with PackedLinear"):
            attach(model, MaskConfig(target_modules=["up_proj"]))

    def test_other_parts_of_the_model_may_be_quantised_in_any_way(self) -> None:
        model = tiny_llava()
        tower = next(m for name, m in model.named_modules() if name.endswith("vision_tower"))
        name = next(name for name, module in tower.named_modules() if name.endswith("q_proj"))
        tower.set_submodule(name, fake("hqq.core.quantize", "HQQLinear")())
        assert len(scores_of(attach(model, MaskConfig()))) == 16

    def test_full_precision_of_what_has_none(self) -> None:
        model = attach(tiny_llama(), MaskConfig(modules="attn"))
        model.base_model.model.model.layers[0].mlp.up_proj = fake("hqq.core.quantize", "HQQLinear")()
        with pytest.raises(
            ModelError, match=r"mlp.up_proj' is quantised with HQQ, which gives no full weight. Use merge_and_unload"
        ):
            merge_in_full_precision(model)

    def test_layers_not_quantised_yet(self) -> None:
        four, eight = bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)
        for layer, message in ((four, "not quantised yet. Move the model"), (eight, "has_fp16_weights=False")):
            with pytest.raises(ModelError, match=f"'0' cannot be masked: .*{message}"):
                attach(nn.Sequential(layer), MaskConfig(target_modules=["0"]))

    def test_embeddings_and_parameters(self, checkpoint: Path) -> None:
        table = nn.Sequential(bnb.nn.Embedding8bit(16, 64).to("cpu"))
        with pytest.raises(ModelError, match=r"'0' cannot be masked: it is quantised \(bnb 8bit\), and .* only linear"):
            attach(table, MaskConfig(target_modules=["0"]))
        with pytest.raises(ModelError, match=r"cannot be masked: it is quantised \(bnb 4bit\)"):
            attach(load(checkpoint, "nf4"), MaskConfig(target_parameters=["mlp.up_proj.weight"]))

    def test_torchao_weights_that_cannot_be_quantised_again_are_masked_but_not_merged(self, checkpoint: Path) -> None:
        base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        quantize_(base.model, Float8WeightOnlyConfig(set_inductor_config=False))
        model = masked(base)
        loss(model).backward()
        output = logits(model)
        with pytest.raises(ModelError, match=r"cannot be merged into torchao's Float8Tensor.*merge_in_full_precision"):
            model.merge_adapter()
        assert torch.equal(logits(model), output)
        torch.testing.assert_close(logits(merge_in_full_precision(model)), output)

    def test_torchao_weights_without_a_full_weight(self, checkpoint: Path) -> None:
        base = load(checkpoint, "int8-torchao")
        base.model.layers[0].mlp.up_proj.weight.act_pre_scale = torch.ones(64)
        with pytest.raises(ModelError, match="up_proj' cannot be masked: its weight is torchao's Int8Tensor"):
            attach(base, MaskConfig())


class TestFusedWeights:
    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_thresholds_of_gpt2(self, kind: str, tmp_path: Path) -> None:
        config = GPT2Config(
            vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        chosen: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **FOUR_BITS[kind]}
        model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**chosen))
        model = attach(model, MaskConfig(gate="topk", keep_ratio=0.75, modules="attn"))
        attention = model.base_model.model.transformer.h[0].attn.c_attn
        assert attention.mask_gate["default"].slices == (64, 64, 64)
        mask, weight = attention.mask("default"), attention.pretrained_matrix()
        kept = mask.gate.value(mask.offset(weight), weight)
        assert [part.sum().item() for part in kept.split(64)] == [0.75 * 64 * 64] * 3
        loss(model.train()).backward()


def test_beside_lora_of_peft(checkpoint: Path) -> None:
    """The same quantised base carries PEFT's own adapters after ours are unloaded."""
    base = masked(load(checkpoint, "nf4")).unload()
    assert torch.isfinite(loss(get_peft_model(base, LoraConfig(target_modules=["q_proj"]))))


def test_libraries_are_imported_where_a_quantised_weight_is_met() -> None:
    tree = ast.parse(Path(maskft.tuner.formats.__file__).read_text())
    at_the_top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert at_the_top
    assert not any(str(module).startswith(("bitsandbytes", "torchao")) for module in at_the_top)


def test_inputs_require_gradients_through_layers_without_masks(checkpoint: Path) -> None:
    model = attach(load(checkpoint, "nf4"), MaskConfig(layers=[0]))
    model.add_adapter("last", MaskConfig(layers=[1]))
    outputs: Tensor = model.train()(**batch(model)).logits
    outputs.sum().backward()
    assert all(parameter.grad.any() for parameter in scores_of(model).values())
