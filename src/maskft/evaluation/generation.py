"""Greedy answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from maskft.data import Collator

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

    Args:
        rows: examples in canonical form; their last answer is not shown to the model.
        batch_size: questions generated together, left-padded.
        max_new_tokens: longest answer, in tokens.
        progress: wraps the batches, for a progress bar.
    """
    collator = Collator(processor, max_length=None)
    starts = range(0, len(rows), batch_size)
    answers: list[str] = []
    for start in progress(starts):
        batch = collator.prompts([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers
