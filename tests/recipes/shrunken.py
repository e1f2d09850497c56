"""The recipes' bases, shrunken: the same classes with two layers, small widths, random weights and a tiny processor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, SiglipImageProcessorPil

from tests.data.helpers import MARKED, llava, make_processor, png
from tests.evaluation.tiny import save_base

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PLACES = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
"""Folders of images in LLaVA's layout."""
COLOURS = ("red", "blue", "lime")


def shrunken_base(name: str, folder: Path) -> Path:
    """Save a base that is to recipes/configs/`name` as a toy is to a house."""
    processor = make_processor(MARKED)
    processor.image_processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    tokenizer = processor.tokenizer
    content = json.loads((CONFIGS / name / "config.json").read_text())
    text = content["text_config"]
    groups = text["num_attention_heads"] // text["num_key_value_heads"]
    text.update(
        TEXT,
        num_key_value_heads=max(1, TEXT["num_attention_heads"] // groups),
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    content["vision_config"].update(VISION, initializer_range=0.1)
    content.update(image_seq_length=4, image_token_index=processor.image_token_id)
    if "head_dim" in text:
        text["head_dim"] = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    config = AutoConfig.for_model(**content)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return save_base(model, processor, folder)


def write_llava(folder: Path) -> Path:
    """Both of LLaVA's data sets in its layout, a few rows of each: conversations, one without an image, captions."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number, place in enumerate(PLACES * 2):
        colour = draw.choice(COLOURS)
        image = f"{place}/{number}.jpg"
        png(folder / image, colour)
        rows.append(llava("<image>\nWhat color?", colour, id=str(number), image=image))
    rows.append(llava("What shape is a ball?", "A circle.", id="text"))
    captions = []
    for number in range(8):
        image = f"{number:05d}/{number}.jpg"
        png(folder / "pretrain" / "images" / image, draw.choice(COLOURS))
        captions.append(llava("Describe it.\n<image>", "a shape", id=str(number), image=image))
    _write(folder / "llava_v1_5_mix665k.json", rows)
    _write(folder / "pretrain" / "blip_laion_cc_sbu_558k.json", captions)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
