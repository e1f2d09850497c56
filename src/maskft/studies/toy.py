"""A base for toy runs: the embedded base's tokenizer, processor and number of layers, with tiny random weights."""

from __future__ import annotations

from pathlib import Path

from maskft.errors import StudyError
from maskft.folders import staged
from maskft.studies.definition import Study

HIDDEN = 64
"""Wide enough for 4-bit blocks."""


def toy_base(study: Study, output: Path) -> str:
    """The base that a toy run takes: the study's own where its toy settings name one, else a tiny random one."""
    if "model.base" in study.toy:
        return str(study.toy["model.base"])
    folder = output / "toy-base"
    if not (folder / "config.json").is_file():
        try:
            with staged(folder) as staging:
                make_toy_base(staging)
        except (OSError, StudyError):  # another worker may have made it meanwhile
            if not (folder / "config.json").is_file():
                raise
    return str(folder)


def make_toy_base(folder: Path) -> None:
    """Save a model with the embedded base's layers and vocabulary, of which none is wider than 64.

    Raises:
        MissingExtraError: the packages of the embedded base are not installed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, Dinov2Config

    from maskft.vlm.embedded import IMAGE_SIZE, PATCH_SIZE, embedded_base
    from maskft.vlm.load import load_processor

    config = AutoConfig.from_pretrained(embedded_base())
    text = config.text_config
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
