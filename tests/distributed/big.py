"""A base too large for a process with bounded memory, written layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from maskft.vlm.load import load_skeleton
from tests.data.helpers import MARKED, make_processor


def big_base(folder: Path, *, layers: int, hidden: int = 1024, inner: int = 2816) -> int:
    """Write a model of random fp32 weights that sees 28 x 28 pixels as four tokens; no more than a layer is in memory.

    Returns:
        The bytes of its weights.
    """
    processor = make_processor(MARKED)
    tokenizer = processor.tokenizer
    processor.save_pretrained(folder)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, vision_feature_layer=-1
    ).save_pretrained(folder)
    shapes = {name: p.shape for name, p in load_skeleton(str(folder), dtype="float32").named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        number = name.partition("language_model.layers.")[2].partition(".")[0] or "rest"
        files.setdefault(f"model-{number}.safetensors", []).append(name)
    draw = torch.Generator().manual_seed(0)
    size = 0
    for file, names in files.items():
        tensors = {name: _random(name, shapes[name], draw) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        size += sum(tensor.numel() * 4 for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {n: file for file, names in files.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _random(name: str, shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """Norms are ones; matrices keep the size of what goes through them."""
    if len(shape) == 1:
        return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
    return torch.empty(shape).uniform_(-1, 1, generator=draw).mul_((3 / shape[1:].numel()) ** 0.5)
