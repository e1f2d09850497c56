"""Greedy answers in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from maskft.data import Collator
from maskft.data.images import image_names
from maskft.evaluation.prefix import share_prefix
from maskft.evaluation.products import cached_products
from maskft.memory import cached_weights

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def generate_answers(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress = iter,
) -> list[str]:
    """The model's greedy answer to the last question of each row, in the order of `rows`.

    Questions about one image are put into one batch where they fit, and share the computation of the image
    (`share_prefix`).

    Args:
        rows: examples in canonical form; their last answer is not shown to the model.
        batch_size: questions generated together, left-padded.
        max_new_tokens: longest answer, in tokens.
        progress: wraps the batches, for a progress bar.
    """
    collator = Collator(processor, max_length=None)
    images = [image_names(row) for row in rows]
    first: dict[Hashable, int] = {}
    order = sorted(range(len(rows)), key=lambda i: first.setdefault(images[i], i))
    answers = [""] * len(rows)
    with torch.inference_mode(), cached_weights(model), cached_products(model), _head_on_contiguous_rows(model):
        for start in progress(range(0, len(rows), batch_size)):
            chosen = order[start : start + batch_size]
            batch = collator.prompts([rows[i] for i in chosen])
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            length = inputs["input_ids"].shape[1]
            inputs = share_prefix(model, inputs, [images[i] for i in chosen])
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            texts = processor.batch_decode(tokens[:, length:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text.strip()
    return answers


@contextlib.contextmanager
def _head_on_contiguous_rows(model: Any) -> Iterator[None]:
    """Give the output layer its input in one piece.

    `generate` takes the last position out of all, a view with gaps. torch's linear sends such a batch to `bmm` with the
    weight expanded to every row, which a CPU copies: 2.8 GB for 50 rows of SmolLM2's head.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()
