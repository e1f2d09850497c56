"""Tiny random models of many families, and inputs that reach all of their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.targets.forms import IMAGE_TOKEN, Family
from tests.targets.reading import READING
from tests.targets.seeing import SEEING

FAMILIES: dict[str, Family] = {**SEEING, **READING}


def random_model(name: str) -> nn.Module:
    """The family's model with weights far from zero, so that gradients reach everything."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    for parameter in model.parameters():
        if parameter.dim() > 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(name: str, model: Any) -> dict[str, Tensor]:
    """One row of text with labels, around an image where the model sees."""
    family = FAMILIES[name]
    image = family.image() if family.image else {}
    tail = torch.arange(10, 22)
    count = sum(feature.shape[-2] for feature in _features(model, image)) if image else 0
    ids = torch.cat([torch.tensor([3]), torch.full((count,), IMAGE_TOKEN), tail])[None]
    kinds = (ids == IMAGE_TOKEN).long()
    extra = {"Qwen": "mm_token_type_ids", "Pali": "token_type_ids", "Gemma-": "token_type_ids"}
    typed = {key: kinds for start, key in extra.items() if image and name.startswith(start)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **image, **typed}


def _features(model: Any, image: dict[str, Tensor]) -> list[Tensor]:
    """Image features, (tokens, width) each; a model that looks at the image by cross-attention has one token."""
    if not hasattr(model, "get_image_features"):
        return [torch.empty(1, 1)]
    output = model.get_image_features(**image)
    features = output.last_hidden_state if output.pooler_output is None else output.pooler_output
    return [features.flatten(0, -2)] if isinstance(features, Tensor) else list(features)
