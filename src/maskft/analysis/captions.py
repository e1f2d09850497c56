"""Whether a model still describes drawn shapes, as it was aligned to, after it was tuned to answer questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskft.data import answer, leaked_images
from maskft.data.easy_vqa import COLORS, SHAPES, load_easy_vqa
from maskft.evaluation import exact_match, generate_answers
from maskft.runs import load_run

LONGEST = 12
"""Tokens of an answer; a caption has about six."""


def captions(run: Path, *, images: int = 200) -> dict[str, Any]:
    """Captions of held-out images of easy-VQA ("A red circle.") by a run's base and tuned model.

    Args:
        run: a finished run's folder.
        images: how many are to be described, at most.

    Returns:
        {"run", "images", "images_of_training", "exact_base", "exact_tuned", "named_base", "named_tuned"}. Exact is the
        share of captions that are the right one; named the share that has its colour and its shape and no other, in
        whichever form.

    Raises:
        RunError: not a finished run.
        MissingExtraError: the package easy-vqa is not installed.
    """
    loaded = load_run(run)
    shown = load_easy_vqa("captions", limits={"test": images})["test"]
    truths = [answer(row) for row in shown]
    found: dict[str, Any] = {
        "run": str(run),
        "images": len(shown),
        "images_of_training": leaked_images(loaded.parts["train"], shown),
    }

    def describe(name: str, model: Any) -> None:
        said = generate_answers(
            model,
            loaded.processor,
            list(shown),
            batch_size=loaded.recipe.evaluation.batch_size,
            max_new_tokens=LONGEST,
        )
        pairs = list(zip(said, truths, strict=True))
        found[f"exact_{name}"] = _share([exact_match(one, truth) for one, truth in pairs])
        found[f"named_{name}"] = _share([named(one) == named(truth) for one, truth in pairs])

    with loaded.base() as base:
        describe("base", base)
    describe("tuned", loaded.model)
    return found


def named(text: str) -> set[str]:
    """The colours and shapes that a text names."""
    return {*COLORS, *SHAPES}.intersection(re.findall(r"[a-z]+", text.lower()))


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
