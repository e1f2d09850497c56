"""Small real inputs: PNG files, rows, and a processor built from a tokenizer trained on a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
IMAGE_TOKENS = 4

_HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
_PARTS = "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
_END = "{{ '<|im_end|>' }}"
_TAIL = "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = _HEAD + _PARTS + _END + _TAIL
MARKED = (
    _HEAD
    + "{% if m.role == 'assistant' %}{% generation %}"
    + _PARTS
    + _END
    + "{% endgeneration %}{% else %}"
    + _PARTS
    + _END
    + "{% endif %}"
    + _TAIL
)


def make_processor(template: str | None = PLAIN, *, pad: bool = True) -> LlavaProcessor:
    """Return a LlavaProcessor with byte-level BPE; every 28 x 28 image becomes four tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system what color shape red circle yes no"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>" if pad else None,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images,
        fast,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template,
        image_token="<image>",
    )


def png(path: Path, color: Any = "red", mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Path:
    """Write a picture of one colour and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def row(*turns: str, images: list[Path | bytes] | None = None, origin: str = "a.json item 0") -> dict[str, Any]:
    """Return a canonical row of alternating turns, user first; the images stand in front of the first text."""
    entries = [
        {"path": None, "bytes": i} if isinstance(i, bytes) else {"path": str(i), "bytes": None} for i in images or []
    ]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    if messages:
        messages[0]["content"] = [{"type": "image", "text": None} for _ in entries] + messages[0]["content"]
    return {"id": origin, "images": entries, "messages": messages, "origin": origin}


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file; a list becomes lines if the suffix is .jsonl."""
    text = "\n".join(json.dumps(item) for item in data) if path.suffix == ".jsonl" else json.dumps(data)
    path.write_text(text, encoding="utf-8")
    return path


def llava(human: str = "<image>\nWhat?", gpt: str = "A cat.", **more: Any) -> dict[str, Any]:
    """Return a LLaVA row."""
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": "1", "conversations": turns, **more}
