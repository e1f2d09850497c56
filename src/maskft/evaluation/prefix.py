"""Several questions about one image: what their prompts have in common is computed once.

A LLaVA prompt begins with the image, which is most of it: 64 of about 96 tokens here, 576 or 729 of 620 to 780 with
CLIP or SigLIP. Attention is causal, so the keys and values of these tokens depend on nothing that follows. They are
computed once for each image and repeated for its questions:

    [image][question A]                 [image][pad][question A]
    [image][longer question B]    from  [image][longer question B]
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def share_prefix(model: Any, inputs: Mapping[str, Tensor], images: Sequence[Hashable]) -> dict[str, Any]:
    """Arguments of `generate` for the same answers, with the prompts' common beginnings in the cache already.

    The inputs are returned as they are where nothing can be shared: for models other than transformers' LLaVA, rows
    without exactly one image, a text before the image that differs, or no image with two questions.

    Args:
        model: a model or PEFT model.
        inputs: a left-padded batch of prompts, "input_ids" and "attention_mask" (batch x length), "pixel_values".
        images: a name of each row's images; rows with equal names have equal images.

    Returns:
        Arguments with prompts of the same length, padding moved behind the image.
    """
    from transformers import LlavaForConditionalGeneration

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = dict(inputs)
    first = {image: row for row, image in reversed(list(enumerate(images)))}
    if not isinstance(base, LlavaForConditionalGeneration) or len(first) == len(images):
        return plain
    ids, used, pixels = inputs["input_ids"], inputs["attention_mask"], inputs.get("pixel_values")
    if pixels is None or len(pixels) != len(ids) or set(inputs) != {"input_ids", "attention_mask", "pixel_values"}:
        return plain
    pads = used.shape[1] - used.sum(1)
    ends = _after_last(ids == base.config.image_token_id)
    size = int((ends - pads)[0])
    if size <= 0 or not torch.equal(ends - pads, torch.full_like(ends, size)):
        return plain
    # each row as [prefix][padding][rest], by moving its first `size` tokens in front of its padding
    places = torch.arange(ids.shape[1], device=ids.device)
    moved = torch.where(places < size, places + pads[:, None], places - size)
    moved = torch.where(places < size + pads[:, None], moved, places)
    ids, used = ids.gather(1, moved), used.gather(1, moved)
    if not torch.equal(ids[:, :size], ids[:1, :size].expand(len(ids), -1)):
        return plain
    rows = torch.tensor(list(first.values()), device=ids.device)
    cache = model(
        input_ids=ids[rows, :size],
        attention_mask=used[rows, :size],
        pixel_values=pixels[rows],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    number = {image: i for i, image in enumerate(first)}
    cache.batch_select_indices(torch.tensor([number[image] for image in images], device=ids.device))
    return {"input_ids": ids, "attention_mask": used, "past_key_values": cache}


def _after_last(marks: Tensor) -> Tensor:
    """For each row (batch x length, bool) the position after its last True; 0 without one."""
    places = torch.arange(1, marks.shape[1] + 1, device=marks.device)
    return (marks * places).amax(1)
