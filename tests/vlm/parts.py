"""Tiny vision towers and language models with their processors and tokenizers, saved as published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

SIZE, PATCH = 28, 7
PATCHES = (SIZE // PATCH) ** 2
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
SQUARE = {"height": SIZE, "width": SIZE}
WORDS = ["USER: what colour is the shape? ASSISTANT: red circle yes no. A chat between a curious user"] * 4


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every weight a random value far enough from 0 and 1 that a part left out is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(parameter + 0.3 * noise)
    return model.eval()


def tower(kind: str, folder: Path) -> Path:
    """Save a tower of three layers and its image processor."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    both = {"text_config": {**text, "vocab_size": 64}, "vision_config": VISION}
    plain = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    crop = {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}
    if kind == "siglip":
        model, images = SiglipModel(SiglipConfig(**both)), SiglipImageProcessorPil(size=SQUARE)
    elif kind == "siglip-vision":
        model, images = SiglipVisionModel(SiglipVisionConfig(**VISION)), SiglipImageProcessorPil(size=SQUARE)
    elif kind == "clip":
        model, images = CLIPModel(CLIPConfig(**both, projection_dim=16)), CLIPImageProcessorPil(**crop)
    elif kind == "dinov2":
        model, images = Dinov2Model(Dinov2Config(**plain)), BitImageProcessorPil(**crop)
    elif kind == "dinov2-registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**plain, num_register_tokens=4))
        images = BitImageProcessorPil(**crop)
    else:
        model, images = ViTModel(ViTConfig(**VISION), add_pooling_layer=False), ViTImageProcessorPil(size=SQUARE)
    spread(model).save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def bpe(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=alphabet, show_progress=False, vocab_size=300
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def fast_tokenizer(*more: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with <|end|>, and `more` tokens in its vocabulary."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(["<|end|>", *more]), eos_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


def language_model(kind: str, vocab_size: int, **more: Any) -> Any:
    """A language model of two layers with random weights."""
    config = {**TEXT, "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, **more}
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**config)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{"tie_word_embeddings": True, **config})),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**config, head_dim=12)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**config)),
    }
    return spread(made[kind]())


def language(kind: str, folder: Path, *special: str, rows: int = 0, template: str | None = None, **more: Any) -> Path:
    """Save a language model with a tokenizer that has `special` tokens, and `rows` more embeddings than tokens."""
    tokenizer = fast_tokenizer(*special, template=template)
    language_model(kind, len(tokenizer) + rows, **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
