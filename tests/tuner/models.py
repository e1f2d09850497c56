"""Tiny random models and inputs."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from maskft import MaskConfig

IMAGE_TOKEN = 63
GATES = ("soft", "normalized", "centered", "topk", "threshold")
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> LlamaForCausalLM:
    """14 linear layers; weights large enough that masks show in the logits."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "initializer_range": 0.3, **overrides})).to(dtype).eval()


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """A CLIP tower of one layer, a projector of two and the Llama above; 4 image tokens an image."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
    )
    text = LlamaConfig(**TEXT, initializer_range=0.3)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    ).eval()


def tiny_language_models() -> dict[str, PreTrainedConfig]:
    """Two layers each: plain linear layers, GPT-2's transposed ones, fused ones, and experts as they are kept."""
    text = {**TEXT, "initializer_range": 0.3}
    experts = {**text, "head_dim": 8, "num_experts_per_tok": 2}
    gpt2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
    return {
        "llama": LlamaConfig(**text),
        "gpt2": GPT2Config(**gpt2, eos_token_id=2, pad_token_id=0, initializer_range=0.3),
        "phi3": Phi3Config(**text),
        "qwen3-moe": Qwen3MoeConfig(**experts, moe_intermediate_size=16, num_experts=4),
        "mixtral": MixtralConfig(**experts, num_local_experts=4),
        "gpt-oss": GptOssConfig(**experts, num_local_experts=4, layer_types=["full_attention"] * 2),
    }


def tiny_language_model(name: str, num_hidden_layers: int = 2) -> PreTrainedModel:
    """One of `tiny_language_models`, with the same random weights each time."""
    config = tiny_language_models()[name]
    config.num_hidden_layers = num_hidden_layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of 8 tokens, with an image each where the model sees."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 60, (2, 8), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if any("vision" in name for name, _ in model.named_children()) or hasattr(model.config, "vision_config"):
        ids[:, 1:5] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    return inputs


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**batch(model)).logits
    return output


def loss(model: nn.Module) -> Tensor:
    inputs = batch(model)
    value: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
    return value


def scores_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(f"mask_scores.{adapter}")}


def scatter(model: nn.Module, adapter: str = "default", std: float = 1.0, seed: int = 1) -> None:
    """Give an adapter scores that are off the start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in scores_of(model, adapter).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def masked(model: nn.Module, seed: int = 1, **fields: Any) -> PeftModel:
    """The model with one scattered adapter, in eval mode."""
    wrapped = get_peft_model(model, MaskConfig(**fields))
    scatter(wrapped, seed=seed)
    return wrapped.eval()


def base_hash(model: nn.Module) -> str:
    """Over every tensor of the state that is no score, under the names of the bare model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".mask_scores." not in name:
            digest.update(name.replace("base_model.model.", "").replace("base_layer.", "").encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
