"""A Transformers folder with a tiny random model and its processor, and adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from maskft import MaskConfig
from tests.data.helpers import MARKED, make_processor
from tests.tuner.models import TEXT, scatter


def tiny_base(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Save a model of two layers that sees 28 x 28 pixels as four tokens; `width` is its hidden size."""
    processor = make_processor(MARKED)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        initializer_range=0.3,
    )
    sizes = {
        **TEXT,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "pad_token_id": None,
    }
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**{**sizes, **ends}, initializer_range=0.3),
            image_token_index=processor.image_token_id,
            vision_feature_layer=-1,
        )
    )
    return save_base(model, processor, folder)


def save_base(model: Any, processor: Any, folder: Path) -> Path:
    """Save a model that ends its answers where the tokenizer says, and its processor."""
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_pair(folder: Path) -> Path:
    """A folder with a base and two adapters on it, a and b."""
    tiny_base(folder / "base")
    for seed, name in enumerate(("a", "b"), 1):
        tiny_adapter(folder / "base", folder / name, seed=seed)
    return folder


def tiny_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """Save a mask adapter with random offsets on the base."""
    model = LlavaForConditionalGeneration.from_pretrained(base)
    masked = get_peft_model(model, MaskConfig())
    scatter(masked, std=3.0, seed=seed)
    masked.save_pretrained(folder)
    return folder
