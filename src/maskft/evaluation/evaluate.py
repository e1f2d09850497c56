"""Evaluating a run on held-out questions: the base and the tuned model, answers written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskft.data import answer, image_key, leaked_images, prompt, read
from maskft.data.schema import text_of
from maskft.errors import DataError, RunError, gathered
from maskft.evaluation.generation import Progress, generate_answers
from maskft.evaluation.metrics import METRICS, accuracy, answer_type, blind_guesses, option_letter
from maskft.runs import LoadedRun, load_run, update_metrics, write_atomically


def evaluate_run(
    run: Path | LoadedRun,
    *,
    split: str = "test",
    data: Path | None = None,
    limit: int | None = None,
    base_answers: Sequence[str] | None = None,
    progress: Callable[[str], Progress] = lambda label: iter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer every held-out question with the base and the tuned model.

    Writes `answers-<name>.jsonl` (`answers_name`), and for the test split the entries metric, base, tuned, blind,
    test_examples and, where answers are of several types, by_answer_type of metrics.json; else one entry: the name of
    the split, or "answers-<name>" for training and data of one's own. With a limit nothing is written, so that a quick
    look never takes the place of a result.

    Args:
        run: a finished run's folder, or the run in memory.
        split: "test", "validation" or "train".
        data: a data file, whose rows are asked instead of a split's; image paths are relative to its folder.
        limit: only the first so many questions.
        base_answers: what the base says to these questions, where that is known already; None asks it.
        progress: makes a progress wrapper for a label.

    Returns:
        (the new metrics, one record a question: id, question, image, truth, base, tuned; group, which names the first
        image by its content; answers, where the data lists several right ones).

    Raises:
        RunError: not a finished run, or its data has no such split.
        DataError: the metric is choice and a right answer has no option letter; `data` has a flaw.
    """
    given = None if data is None else read(data)
    loaded = run if isinstance(run, LoadedRun) else load_run(run)
    folder, parts = loaded.folder, loaded.asked
    if given is None and split not in parts:
        raise RunError(f"the data of {folder} has no {split} split; it has {', '.join(parts)}. Set data.split.{split}.")
    name = answers_name(split, data)
    rows = list(parts[split] if given is None else given)[:limit]
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
    groups, types = image_groups(records), [answer_type(record["truth"]) for record in records]
    outcomes = {name: scored(settings.metric, answers, records) for name, answers in said.items()}
    scores: dict[str, Any] = {
        "metric": settings.metric,
        **{name: asdict(accuracy(found, groups)) for name, found in outcomes.items()},
        f"{split if given is None else 'data'}_examples": len(rows),
    }
    if len(set(types)) > 1:
        scores["by_answer_type"] = {kind: _of_type(outcomes, groups, types, kind) for kind in sorted(set(types))}
    if given is not None:
        scores |= {"data": str(data), "images_of_training": leaked_images(train_rows, given)}
    if limit is not None:
        return scores, records
    write_atomically(
        folder / f"answers-{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    )
    if name == "test":
        update_metrics(folder, scores)
    else:  # the entry "train" holds what training says of itself
        update_metrics(folder, {name if name == "validation" else f"answers-{name}": scores})
    return scores, records


def answers_name(split: str, data: Path | None = None) -> str:
    """What answers are filed under: the split, or "data-<folder>-<file>" for a data file."""
    return split if data is None else f"data-{data.absolute().parent.name}-{data.stem}"


def scored(metric: str, answers: Iterable[str], records: Iterable[Mapping[str, Any]]) -> list[float]:
    """Score in [0, 1] of each answer against its record's references: `answers`, or else `truth` alone."""
    score = METRICS[metric]
    return [score(said, r.get("answers") or [r["truth"]]) for said, r in zip(answers, records, strict=True)]


def _of_type(
    outcomes: Mapping[str, Sequence[float]], groups: Sequence[str], types: Sequence[str], kind: str
) -> dict[str, dict[str, Any]]:
    """Each side's `Accuracy` over the questions whose answers are of one type."""
    own = [i for i, one in enumerate(types) if one == kind]
    return {
        name: asdict(accuracy([found[i] for i in own], [groups[i] for i in own])) for name, found in outcomes.items()
    }


def answer_types(records: Iterable[Mapping[str, Any]]) -> str:
    """First letter of each truth's `maskft.evaluation.metrics.answer_type`, in order."""
    return "".join(answer_type(record["truth"])[0] for record in records)


def image_groups(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name of each record's image, the same for questions about one image; a record without image has its own."""
    names = ((record.get("group"), record.get("image")) for record in records)
    return [
        f"group {group}" if group else f"path {path}" if path else f"row {number:012d}"
        for number, (group, path) in enumerate(names)
    ]


def question_text(row: Any) -> str:
    """The text of the last question."""
    return text_of(prompt(row)[-1])


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
