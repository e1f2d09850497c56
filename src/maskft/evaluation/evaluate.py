"""Evaluating a run on held-out questions: the base and the tuned model, answers written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskft.data import answer, prompt
from maskft.errors import RunError
from maskft.evaluation.generation import Progress, generate_answers
from maskft.evaluation.metrics import accuracy, blind_accuracy, exact_match
from maskft.runs import load_data, load_run, update_metrics, write_atomically


def evaluate_run(
    run: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    progress: Callable[[str], Progress] = lambda label: iter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer every held-out question with the base and the tuned model.

    Writes `answers-<split>.jsonl`, and for the test split the entries base, tuned, blind and test_examples of
    metrics.json (for another split one entry under its name). With a limit nothing is written, so that a quick look
    never takes the place of a result.

    Args:
        run: a finished run's folder.
        split: "test" or "validation".
        limit: only the first so many questions.
        progress: makes a progress wrapper for a label.

    Returns:
        (the new metrics, one record a question: id, question, image, truth, base, tuned).

    Raises:
        RunError: not a finished run, or its data has no such split.
    """
    loaded = load_run(run)
    parts = load_data(loaded.recipe)
    if split not in parts:
        raise RunError(f"the data of {run} has no {split} split; it has {', '.join(parts)}. Set data.split.{split}.")
    rows = list(parts[split])[:limit]
    settings = loaded.recipe.evaluation
    arguments = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
    with loaded.base() as base:
        base_answers = generate_answers(base, loaded.processor, rows, progress=progress("base"), **arguments)
    tuned_answers = generate_answers(loaded.model, loaded.processor, rows, progress=progress("tuned"), **arguments)

    truths = [answer(row) for row in rows]
    questions = [question_text(row) for row in rows]
    records = [
        {"id": row["id"], "question": q, "image": _image_name(row), "truth": truth, "base": before, "tuned": after}
        for row, q, truth, before, after in zip(rows, questions, truths, base_answers, tuned_answers, strict=True)
    ]
    train_rows = parts["train"]
    scores: dict[str, Any] = {
        "base": asdict(accuracy([exact_match(r["base"], r["truth"]) for r in records])),
        "tuned": asdict(accuracy([exact_match(r["tuned"], r["truth"]) for r in records])),
        "blind": asdict(
            blind_accuracy([question_text(r) for r in train_rows], [answer(r) for r in train_rows], questions, truths)
        ),
        f"{split}_examples": len(rows),
    }
    if limit is not None:
        return scores, records
    write_atomically(run / f"answers-{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    update_metrics(run, scores if split == "test" else {split: scores})
    return scores, records


def question_text(row: Any) -> str:
    """The text of the last question."""
    last = prompt(row)[-1]
    return "".join(part["text"] for part in last["content"] if part["type"] == "text")


def _image_name(row: Any) -> str | None:
    return row["images"][0]["path"] if row["images"] else None
