"""What a language model forgets while it is tuned: how much worse it predicts text that is not of the task.

The text is the reference of the Python language that comes with the interpreter (`pydoc_data.topics`, PSF licence),
unless another one is given. The base has seen such text, as any language model has; what counts is the difference.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F

from maskft.errors import DataError
from maskft.runs import load_run

WINDOW = 256
"""Tokens that are predicted one from those before it, starting anew with each window."""
WINDOWS = 64


@dataclass(frozen=True)
class Text:
    """A text and where it is from."""

    content: str
    source: str

    @property
    def sha256(self) -> str:
        """Of the content in UTF-8, as hexadecimal digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def reference_text() -> Text:
    """The reference of the running Python's language and library, in the order of its topics."""
    content = "\n\n".join(topics[name] for name in sorted(topics))
    return Text(content, f"pydoc_data.topics of Python {platform.python_version()}")


def read_text(path: Path) -> Text:
    """A text file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return Text(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text {path} cannot be read: {error}. Give a UTF-8 text file.") from error


def cut(tokens: Sequence[int], window: int = WINDOW, count: int = WINDOWS) -> list[list[int]]:
    """At most `count` windows of `window` tokens each, spread evenly over the text, none overlapping.

    Raises:
        DataError: the text is shorter than one window.
    """
    whole = len(tokens) // window
    if not whole:
        raise DataError(f"the text has {len(tokens)} tokens, but at least {window} are needed. Give a longer one.")
    chosen = min(count, whole)
    starts = [window * (i * whole // chosen) for i in range(chosen)]
    return [list(tokens[start : start + window]) for start in starts]


@torch.inference_mode()
def surprise(
    model: Any,
    ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 4,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[float]:
    """Mean negative log-likelihood of each window's tokens but the first, in nats a token.

    Args:
        model: a causal language model, or one that sees, which is shown no image.
        ids: token ids, windows x tokens.
        batch_size: windows at a time.
        progress: wraps the batches.
    """
    found: list[float] = []
    for start in progress(range(0, len(ids), batch_size)):
        batch = torch.tensor([list(row) for row in ids[start : start + batch_size]], device=model.device)
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch[:, 1:], reduction="none")
        found += losses.mean(1).tolist()
    return found


def compared(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Perplexities before and after, and the difference in nats a token with its standard error over windows.

    Args:
        before, after: nats a token, window by window.
    """
    count = len(before)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = math.fsum(differences) / count
    spread = math.fsum((d - mean) ** 2 for d in differences)
    return {
        "perplexity_base": math.exp(math.fsum(before) / count),
        "perplexity_tuned": math.exp(math.fsum(after) / count),
        "nats_lost": mean,
        "standard_error": math.sqrt(spread / (count - 1) / count) if count > 1 else math.inf,
    }


def forgetting(run: Path, text: Text | None = None, *, windows: int = WINDOWS) -> dict[str, Any]:
    """Perplexity of a run's base and tuned language model on a text.

    Args:
        run: a finished run's folder.
        text: default is `reference_text`.
        windows: of WINDOW tokens, at most.

    Raises:
        RunError: not a finished run.
        DataError: the text is too short.
    """
    text = text or reference_text()
    loaded = load_run(run)
    tokenizer = loaded.processor.tokenizer
    # text that looks like a special token is no such token: an image's would ask for an image
    tokens = tokenizer(text.content, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ids = cut(tokens, count=windows)
    with loaded.base() as base:
        before = surprise(base, ids)
    after = surprise(loaded.model, ids)
    about = {"text": text.source, "sha256": text.sha256, "windows": len(ids), "tokens": len(ids) * (len(ids[0]) - 1)}
    return {"run": str(run), **about, **compared(before, after)}
