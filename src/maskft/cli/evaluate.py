"""maskft evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from maskft.cli.output import notes, percent, print_json, progress, quiet_libraries, result_console
from maskft.errors import UserError


def run(folder: Path, *, split: str, limit: int | None, show: int, as_json: bool) -> None:
    if split not in ("test", "validation"):
        raise UserError(f"--split is '{split}'; it must be test or validation.")
    quiet_libraries()
    from maskft.evaluation import evaluate_run
    from maskft.runs import read_metrics

    notes.print(f"answering the {split} questions of {folder}")
    scores, records = evaluate_run(folder, split=split, limit=limit, progress=progress)
    if as_json:
        print_json({"run": str(folder), **scores})
    console = result_console(as_json)
    console.print(_score_table(scores, scores[f"{split}_examples"], read_metrics(folder)["train"]))
    if show:
        console.print(_answer_table(records, show))
    if limit is None:
        console.print(f"answers  {folder / f'answers-{split}.jsonl'}\nmetrics  {folder / 'metrics.json'}")
    else:
        console.print(f"the first {limit} questions only: nothing was written")


def _score_table(scores: dict[str, Any], examples: int, trained: dict[str, Any]) -> Table:
    share = trained["trainable_parameters"] / trained["base_parameters"]
    table = Table(title=f"exact match on {examples} held-out questions")
    for column in ("model", "accuracy", "95 % interval", "trainable", "training time"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = (("base", "", ""), ("blind guess", "", ""), ("tuned", percent(share), f"{trained['seconds']:.0f} s"))
    for name, trainable, seconds in rows:
        score = scores[name.split()[0]]
        interval = f"{percent(score['low'])} to {percent(score['high'])}"
        table.add_row(name, percent(score["accuracy"]), interval, trainable, seconds)
    return table


def _answer_table(records: list[dict[str, Any]], count: int) -> Table:
    """Questions with both answers, spread evenly over the test set."""
    table = Table(title="some of the questions")
    for column in ("image", "question", "base", "tuned", "truth"):
        table.add_column(column, overflow="fold")
    step = max(1, len(records) // count)
    for record in records[::step][:count]:
        question = record["question"].splitlines()[0]
        image = Path(record["image"]).name if record["image"] else ""
        table.add_row(image, question, record["base"], record["tuned"], record["truth"])
    return table
