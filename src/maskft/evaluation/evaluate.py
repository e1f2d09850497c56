"""Evaluating a run on held-out questions: the base and the tuned model, answers written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskft.data import answer, image_key, prompt
from maskft.errors import DataError, RunError, gathered
from maskft.evaluation.generation import Progress, generate_answers
from maskft.evaluation.metrics import METRICS, accuracy, blind_guesses, option_letter
from maskft.runs import load_data, load_run, update_metrics, write_atomically


def evaluate_run(
    run: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    base_answers: Sequence[str] | None = None,
    progress: Callable[[str], Progress] = lambda label: iter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer every held-out question with the base and the tuned model.

    Writes `answers-<split>.jsonl`, and for the test split the entries metric, base, tuned, blind and test_examples of
    metrics.json (for another split one entry under its name). With a limit nothing is written, so that a quick look
    never takes the place of a result.

    Args:
        run: a finished run's folder.
        split: "test" or "validation"; with a limit also "train".
        limit: only the first so many questions.
        base_answers: what the base says to these questions, where that is known already; None asks it.
        progress: makes a progress wrapper for a label.

    Returns:
        (the new metrics, one record a question: id, question, image, truth, base, tuned; group, which names the first
        image by its content; answers, where the data lists several right ones).

    Raises:
        RunError: not a finished run, or its data has no such split.
        DataError: the metric is choice and a right answer has no option letter.
    """
    loaded = load_run(run)
    parts = load_data(loaded.recipe)
    if split not in parts:
        raise RunError(f"the data of {run} has no {split} split; it has {', '.join(parts)}. Set data.split.{split}.")
    rows = list(parts[split])[:limit]
    settings = loaded.recipe.evaluation
    if settings.metric == "choice":
        _require_letters(rows)
    arguments = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
    if base_answers is None:
        with loaded.base() as base:
            base_answers = generate_answers(base, loaded.processor, rows, progress=progress("base"), **arguments)
    tuned_answers = generate_answers(loaded.model, loaded.processor, rows, progress=progress("tuned"), **arguments)

    known: dict[str, str] = {}
    records = [
        {
            "id": row["id"],
            "question": question_text(row),
            "image": row["images"][0]["path"] if row["images"] else None,
            "group": _first_image(row, known),
            "truth": answer(row),
            **({"answers": row["answers"]} if row.get("answers") else {}),
            "base": before,
            "tuned": after,
        }
        for row, before, after in zip(rows, base_answers, tuned_answers, strict=True)
    ]
    train_rows = parts["train"]
    guesses = blind_guesses(
        [question_text(row) for row in train_rows],
        [answer(row) for row in train_rows],
        [record["question"] for record in records],
    )
    said = {"base": base_answers, "tuned": tuned_answers, "blind": guesses}
    groups = image_groups(records)
    scores: dict[str, Any] = {
        "metric": settings.metric,
        **{name: asdict(accuracy(scored(settings.metric, answers, records), groups)) for name, answers in said.items()},
        f"{split}_examples": len(rows),
    }
    if limit is not None:
        return scores, records
    write_atomically(run / f"answers-{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    update_metrics(run, scores if split == "test" else {split: scores})
    return scores, records


def scored(metric: str, answers: Iterable[str], records: Iterable[Mapping[str, Any]]) -> list[float]:
    """Score in [0, 1] of each answer against its record's references: `answers`, or else `truth` alone."""
    score = METRICS[metric]
    return [score(said, r.get("answers") or [r["truth"]]) for said, r in zip(answers, records, strict=True)]


def image_groups(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name of each record's image, the same for questions about one image; a record without image has its own."""
    names = ((record.get("group"), record.get("image")) for record in records)
    return [
        f"group {group}" if group else f"path {path}" if path else f"row {number:012d}"
        for number, (group, path) in enumerate(names)
    ]


def question_text(row: Any) -> str:
    """The text of the last question."""
    last = prompt(row)[-1]
    return "".join(part["text"] for part in last["content"] if part["type"] == "text")


def _first_image(row: Any, known: dict[str, str]) -> str | None:
    """The hash of the first image's content, shortened; `known` maps paths already read to their hashes."""
    if not row["images"]:
        return None
    image = row["images"][0]
    path = image["path"]
    key = known.get(path) if path else None
    key = key or image_key(image)[:16]
    if path:
        known[path] = key
    return key


def _require_letters(rows: Iterable[Any]) -> None:
    references = ((row, row.get("answers") or [answer(row)]) for row in rows)
    without = [row["origin"] for row, texts in references if not any(map(option_letter, texts))]
    if without:
        raise DataError(
            f"evaluation.metric is choice, but {len(without)} right answer(s) name no option letter, such as 'B' or "
            f"'B. red':\n{gathered(without)}"
        )
