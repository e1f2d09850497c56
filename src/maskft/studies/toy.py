"""A base for toy runs: the embedded base's tokenizer and processor, with few layers of tiny random weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from maskft.errors import StudyError
from maskft.folders import staged
from maskft.recipe import Recipe
from maskft.studies.definition import Study

HIDDEN = 64
"""Wide enough for 4-bit blocks."""
LAYERS = 3
"""So that thirds of the depth have one each."""


def toy_base(study: Study, output: Path, recipes: Iterable[Recipe]) -> str:
    """The base that a toy run takes: the study's own where its toy settings name one, else a tiny random one.

    Args:
        study: whose it is.
        output: folder for the base.
        recipes: of the runs, which may name layers by their numbers.
    """
    if "model.base" in study.toy:
        return str(study.toy["model.base"])
    layers = max([LAYERS, *map(_named_layers, recipes)])
    folder = output / f"toy-base-{layers}"
    if not (folder / "config.json").is_file():
        try:
            with staged(folder) as staging:
                make_toy_base(staging, layers)
        except (OSError, StudyError):  # another worker may have made it meanwhile
            if not (folder / "config.json").is_file():
                raise
    return str(folder)


def _named_layers(recipe: Recipe) -> int:
    """How many layers a model needs to have those that the recipe names by their numbers."""
    named = getattr(recipe.method, "layers", "all")
    numbers = [int(digits) for digits in re.findall(r"\d{1,9}", named)] if isinstance(named, str) else named
    return max(numbers, default=-1) + 1


def make_toy_base(folder: Path, layers: int) -> None:
    """Save a model with the embedded base's vocabulary and at most its layers, of which none is wider than 64.

    Raises:
        MissingExtraError: the packages of the embedded base are not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, Dinov2Config

    from maskft.vlm.embedded import IMAGE_SIZE, PATCH_SIZE, embedded_base
    from maskft.vlm.load import load_processor

    config = AutoConfig.from_pretrained(embedded_base())
    text = config.text_config
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    text.hidden_size, text.intermediate_size = HIDDEN, 2 * HIDDEN
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, HIDDEN // 4
    config.vision_config = Dinov2Config(
        hidden_size=HIDDEN, num_attention_heads=4, num_hidden_layers=2, patch_size=PATCH_SIZE, image_size=IMAGE_SIZE
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(folder)
    load_processor("embedded").save_pretrained(folder)
