"""Peaks: counted parts, deep models from shallow ones, policies, pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedConfig,
)

from maskft.errors import ModelError, RecipeError
from maskft.memory import MODES
from maskft.optim import ScoreAdamW
from maskft.plan.predict import PARTS, Predictor
from maskft.plan.skeleton import Repetition, Skeleton
from maskft.plan.step import Load
from maskft.plan.ways import PLAIN, SAME, Way, moment_bytes, packed_bytes, with_mode
from maskft.tuner import MaskConfig
from tests.tuner.models import IMAGE_TOKEN, TEXT

FLAT = {**TEXT, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
DEEP = {**FLAT, "num_hidden_layers": 11}


def skeleton(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM) -> Skeleton:
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    return Skeleton(model.requires_grad_(False).eval())


def soft(base: Skeleton, mode: str = "fast", quantization: str = "none", **fields: Any) -> Way:
    return with_mode(mode, base.targets(MaskConfig(**fields)), MODES[mode], quantization)


def weights(config: LlamaConfig) -> tuple[int, int]:
    """Parameters of a Llama: of the masked layers, and of all else."""
    h, m, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    head = h // config.num_attention_heads
    layer = 2 * h * h + 2 * h * kv * head + 3 * h * m
    n = config.num_hidden_layers
    return n * layer, 2 * n * h + h + 2 * config.vocab_size * h


def test_what_stands_is_counted_by_hand() -> None:
    config = LlamaConfig(**FLAT)
    base = skeleton(config)
    masked, other = weights(config)
    buffers = 2 * 8 // 2 * 4  # inverse frequencies of a head of 8, and their originals
    load = Load(batch=1, tokens=8)
    for mode, per_score in (("fast", (4, 8)), ("balanced", (2, 8)), ("tight", (2, 8))):  # of fewer than 16 blocks
        peak = Predictor(base).predict(soft(base, mode), load)
        assert peak.base == 2 * (masked + other) + buffers
        assert (peak.trained, peak.moments) == (per_score[0] * masked, per_score[1] * masked)
    full = Predictor(base).predict(Way("full", "full", SAME, soft(base).config, dtype=torch.bfloat16), load)
    assert (full.base, full.trained, full.moments) == (buffers, 2 * (masked + other), 4 * (masked + other))
    wide = Predictor(base).predict(Way("full", "full", PLAIN, soft(base).config, dtype=torch.float32), load)
    assert (wide.trained, wide.moments) == (4 * (masked + other), 8 * (masked + other))
    lora = Predictor(base).predict(Way("LoRA", "lora", PLAIN, soft(base).config, 2), load)
    h, m = config.hidden_size, config.intermediate_size
    factors = 2 * 2 * (2 * 2 * h + 2 * (h + h // 4) + 3 * (h + m))
    assert (lora.trained, lora.moments) == (4 * factors, 8 * factors)
    assert lora.total == sum(getattr(lora, part) for part in PARTS)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("shape", [(64, 256), (63, 65), (3, 20, 70), (5000,), (63, 64)])
def test_moments_are_as_large_as_the_optimizers(memory: str, shape: tuple[int, ...]) -> None:
    mode = MODES[memory]
    score = torch.zeros(shape, dtype=getattr(torch, mode.score_dtype), requires_grad=True)
    optimizer = ScoreAdamW([score], lr=0.1, moments=mode.moments)
    score.sum().backward()
    optimizer.step()
    kept = sum(value.nbytes for name, value in optimizer.state[score].items() if name != "step")
    assert moment_bytes(mode, score) == kept
    assert moment_bytes(SAME, score) == 2 * score.nbytes


def test_policies_of_gradients() -> None:
    base = skeleton(LlamaConfig(**FLAT))
    predictor, load = Predictor(base), Load(batch=1, tokens=8, device="cpu")
    masked, _ = weights(base.model.config)
    largest = 32 * 48
    assert predictor.predict(soft(base, "tight"), load).gradients == 0
    assert predictor.predict(soft(base, "balanced"), load).gradients > 2 * masked * 0.75
    accumulated = predictor.predict(soft(base, "tight"), replace(load, accumulation=4))
    assert 2 * masked <= accumulated.gradients <= 2 * (masked + largest)
    assert len(predictor._passes) == 2  # one where steps are made in the backward pass, one where they are not
    clipped = predictor.predict(replace(soft(base, "tight"), clipped=True), load)
    assert 0 < clipped.gradients <= 2 * largest


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**DEEP),
    "gemma-3": Gemma3TextConfig(
        **DEEP,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 5 + ["sliding_attention"],
    ),
    "gpt-2": GPT2Config(vocab_size=64, n_embd=16, n_layer=9, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2),
}
LOADS = {
    "gpu": Load(batch=2, tokens=24, autocast=torch.bfloat16),
    "cpu": Load(batch=2, tokens=24, autocast=torch.bfloat16, device="cpu"),
    "checkpointing": Load(batch=1, tokens=64, checkpointing=True),
    "accumulation": Load(batch=1, tokens=24, accumulation=2),
}


@pytest.mark.parametrize(
    ("name", "load", "methods"),
    [
        ("llama", "gpu", "fast"),
        ("gemma-3", "gpu", "fast"),
        pytest.param("llama", "gpu", "balanced full", marks=pytest.mark.slow),
        pytest.param("llama", "cpu", "fast LoRA", marks=pytest.mark.slow),
        pytest.param("llama", "checkpointing", "balanced", marks=pytest.mark.slow),
        pytest.param("llama", "accumulation", "LoRA", marks=pytest.mark.slow),
        pytest.param("gpt-2", "gpu", "fast", marks=pytest.mark.slow),
    ],
)
def test_a_deep_model_from_shallow_ones(name: str, load: str, methods: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = skeleton(CONFIGS[name])
    config = soft(base).config
    ways = {
        "fast": soft(base),
        "balanced": soft(base, "balanced"),
        "LoRA": Way("LoRA", "lora", PLAIN, config, 2),
        "full": Way("full", "full", PLAIN, config, dtype=torch.float32),
    }
    chosen = [ways[method] for method in methods.split()]
    assert base.repetition(config.target_modules) is not None
    extended = [Predictor(base).predict(way, LOADS[load]) for way in chosen]
    monkeypatch.setattr(Skeleton, "repetition", lambda self, targets: None)
    assert extended == [Predictor(base).predict(way, LOADS[load]) for way in chosen]


def test_a_deep_model_behind_a_deeper_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose backward pass, which it has where inputs need gradients, is longer than the language model's."""
    monkeypatch.setattr("maskft.plan.predict.keep_inputs_frozen", lambda model: None)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(**{**DEEP, "num_hidden_layers": 7})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    base = skeleton(config, AutoModelForImageTextToText)
    load = Load(batch=2, tokens=64, images=1, checkpointing=True)
    way = soft(base)
    extended = Predictor(base).predict(way, load)
    monkeypatch.setattr(Skeleton, "repetition", lambda self, targets: None)
    whole = Predictor(base).predict(way, load)
    assert extended == whole
    assert whole.seen


def test_models_that_do_not_match_are_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base = skeleton(LlamaConfig(**DEEP))
    way, load = soft(base), LOADS["gpu"]
    extended = Predictor(base).predict(way, load)
    monkeypatch.setattr("maskft.plan.predict._extended", lambda *halves: None)
    assert Predictor(base).predict(way, load) == extended


def test_repetitions() -> None:
    base = skeleton(CONFIGS["gemma-3"])
    assert base.repetition(()) == Repetition(11, 0, 2)
    assert Repetition(11, 0, 2).lengths() == (7, 9)
    assert Repetition(11, 0, 2).factor() == 2
    assert skeleton(LlamaConfig(**DEEP)).repetition(()) == Repetition(11, 0, 1)
    assert skeleton(LlamaConfig(**FLAT)).repetition(()) is None
    assert base.repetition(["model.layers.5.mlp.up_proj"]) is None


def test_some_layers_masked() -> None:
    base = skeleton(LlamaConfig(**DEEP))
    way = soft(base, layers="middle-third", modules="mlp")
    assert base.repetition(way.config.target_modules) is None
    peak = Predictor(base).predict(way, Load(batch=1, tokens=8))
    assert peak.trained == 4 * 3 * 32 * 48 * 3


def test_the_users_own_targets() -> None:
    base = skeleton(LlamaConfig(**FLAT))
    way = soft(base, target_modules=["q_proj"])
    assert len(way.config.target_modules) == 2
    assert Predictor(base).predict(way, Load(batch=1, tokens=8)).trained == 4 * 2 * 32 * 32
    with pytest.raises(ModelError, match="q_projj"):
        soft(base, target_modules=["q_projj"])


@pytest.mark.parametrize("quantization", ["nf4", "int8", "int8-torchao"])
@pytest.mark.parametrize("kind", ["mask", "lora"])
def test_quantised_bases(quantization: str, kind: str) -> None:
    base = skeleton(LlamaConfig(**FLAT))
    config = base.targets(MaskConfig(modules="attn"))
    masked, _ = weights(base.model.config)
    layers = [base.model.get_submodule(name).weight for name in base.quantised(None)]
    assert sum(w.numel() for w in layers) == masked
    way = Way("few bits", kind, PLAIN, config, 2, quantization)
    plain = replace(way, quantization="none")
    load = Load(batch=1, tokens=8)
    packed, full = Predictor(base).predict(way, load), Predictor(base).predict(plain, load)
    assert packed.base - sum(packed_bytes(w, quantization) for w in layers) == full.base - 2 * masked
    assert packed.trained == full.trained
    assert packed.temporary >= full.temporary


def test_packed_layers_are_as_large_as_real_ones() -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    weight = torch.randn(64, 128).bfloat16()
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    assert packed_bytes(weight, "nf4") == layer.weight.numel() + 4 * state.absmax.numel()


class TestImages:
    def base(self) -> Skeleton:
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
        )
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**DEEP), image_token_index=IMAGE_TOKEN)
        return skeleton(config, AutoModelForImageTextToText)

    @pytest.mark.slow
    def test_deep_from_shallow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base, load = self.base(), Load(batch=2, tokens=24, images=2, autocast=torch.bfloat16)
        ways = [soft(base), soft(base, scope=["language", "projector", "vision"])]
        ways.append(Way("full", "full", PLAIN, soft(base).config, dtype=torch.float32))
        extended = [Predictor(base).predict(way, load) for way in ways]
        assert all(peak.seen for peak in extended)
        monkeypatch.setattr(Skeleton, "repetition", lambda self, targets: None)
        assert extended == [Predictor(base).predict(way, load) for way in ways]

    def test_the_vision_encoder_stays_as_it_is_in_full_fine_tuning(self) -> None:
        base = self.base()
        assert base.vision() == "model.vision_tower"
        way = Way("full", "full", SAME, soft(base).config, dtype=torch.bfloat16)
        peak = Predictor(base).predict(way, Load(batch=1, tokens=24, images=1))
        tower = base.model.get_submodule("model.vision_tower")
        assert peak.base >= 2 * sum(p.numel() for p in tower.parameters())
        assert peak.trained == 2 * sum(p.numel() for p in base.model.parameters()) - 2 * sum(
            p.numel() for p in tower.parameters()
        )

    def test_rows_too_short(self) -> None:
        base = self.base()
        with pytest.raises(RecipeError, match=r"2 image\(s\) take 8 tokens, and a row has 8"):
            Predictor(base).predict(soft(base), Load(batch=1, tokens=8, images=2))


def test_what_is_kept_between_the_passes_of_a_step() -> None:
    base = skeleton(LlamaConfig(**FLAT))
    masked, _ = weights(base.model.config)
    load = Load(batch=1, tokens=8, device="cpu", accumulation=2)
    for quantization in ("none", "nf4"):
        fast = Predictor(base).predict(soft(base, quantization=quantization), load)
        assert fast.gradients == 2 * masked  # those of masked weights, in bf16
        assert fast.temporary >= 2 * masked  # masked weights
    clipped = Predictor(base).predict(replace(soft(base), clipped=True), load)
    assert clipped.gradients >= 4 * masked


def test_fp16_steps_after_the_backward_pass() -> None:
    base = skeleton(LlamaConfig(**FLAT))
    load = Load(batch=1, tokens=8, device="cpu")
    bf16, fp16 = (
        Predictor(base).predict(soft(base), replace(load, autocast=dtype)) for dtype in (torch.bfloat16, torch.float16)
    )
    assert bf16.gradients < fp16.gradients


def test_compiled_masks_need_less() -> None:
    base = skeleton(LlamaConfig(**{**FLAT, "hidden_size": 256, "intermediate_size": 256}))
    load = Load(batch=1, tokens=8, device="cpu")
    compiled, written = (
        Predictor(base).predict(replace(soft(base, "balanced"), compiled=one), load) for one in (True, False)
    )
    assert compiled.temporary < written.temporary
    assert compiled.activations == written.activations


def test_pieces() -> None:
    base = skeleton(LlamaConfig(**FLAT))
    load = Load(batch=1, tokens=8, device="cpu")
    whole = Predictor(base).predict(soft(base), load)
    piece = Predictor(base).predict(soft(base, "tight"), load, ranks=4)
    assert piece.moments == whole.moments // 4  # in pieces they stay in fp32
    assert piece.activations == Predictor(base).predict(soft(base, "tight").in_pieces(), load).activations
    masked, _ = weights(base.model.config)
    layer = (2 + 2 + 2) * masked // 2 + 2 * 2 * 32
    outside = 2 * (2 * 64 * 32 + 32) + 32
    assert piece.gathered == 2 * layer + outside


def test_a_model_that_needs_values(monkeypatch: pytest.MonkeyPatch) -> None:
    base = skeleton(LlamaConfig(**FLAT))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.ones(1).to(self.lm_head.weight).item()

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be run without values"):
        Predictor(base).predict(soft(base), Load(batch=1, tokens=8, device="cpu"))
