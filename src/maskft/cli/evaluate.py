"""maskft evaluate"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from maskft.cli.output import notes, percent, print_json, progress, quiet_libraries, result_console
from maskft.cli.report import leave_report
from maskft.cli.score import TITLES
from maskft.errors import UserError


def run(
    model: str,
    benchmarks: list[str] | None,
    held_out: dict[str, Any],
    asked: dict[str, Any],
    *,
    limit: int | None,
    as_json: bool,
) -> None:
    """Held-out questions, or benchmarks where some are named; each has options of its own, None where not given."""
    if not benchmarks:
        held_out, asked = {**held_out, "data": asked["data"]}, {**asked, "data": None}
    own, others = (asked, held_out) if benchmarks else (held_out, asked)
    if given := [f"--{name.replace('_', '-')}" for name, value in others.items() if value not in (None, [])]:
        raise UserError(f"{', '.join(given)} can be used only {'without' if benchmarks else 'with'} --benchmark.")
    settings = {name: value for name, value in own.items() if value not in (None, [])}
    if benchmarks:
        _on_benchmarks(model, benchmarks, limit=limit, as_json=as_json, **settings)
    else:
        _held_out(Path(model), limit=limit, as_json=as_json, **settings)


def _on_benchmarks(
    model: str,
    benchmarks: list[str],
    *,
    limit: int | None,
    as_json: bool,
    data: Path | None = None,
    adapters: Sequence[str] = (),
    **settings: Any,
) -> None:
    if data is None:
        raise UserError("--benchmark needs --data, the folder that holds gqa/, MMMU/, MME/, pope/ and so on.")
    quiet_libraries()
    from maskft.evaluation.run_benchmarks import run_benchmarks

    paths = [path for given in adapters for path in _paths(given)]
    outcome = run_benchmarks(model, benchmarks, data, adapters=paths, limit=limit, progress=progress, **settings)
    if not outcome.main:
        return
    if as_json:
        places = {name: {bench: str(path) for bench, path in row.items()} for name, row in outcome.files.items()}
        report = {"output": str(outcome.output), "results": outcome.results, "answered": outcome.answered}
        print_json({**report, "answers": places})
    console = result_console(as_json)
    if limit is None:
        console.print(_side_by_side(outcome.results))
        if longest := settings.get("max_new_tokens"):
            console.print(f"answers of at most {longest} tokens, not of the benchmark's own length: not as in papers")
    else:
        for name, answered in outcome.answered.items():
            counts = ", ".join(f"{count} questions of {bench}" for bench, count in answered.items())
            console.print(f"{name} answered {counts}", markup=False)
        console.print("no score with --limit: a score needs the answers to all questions")
    console.print(f"answers  {_pattern(outcome.files)}", markup=False)
    if limit is None:
        console.print(f"results  {outcome.output / 'results.json'}", markup=False)


def _pattern(files: dict[str, dict[str, Path]]) -> Path:
    """All answers files in one line, such as out/{gqa,pope}/answers/{base,tuned}.jsonl."""
    rows = list(files.values())
    any_file = next(iter(rows[0].values()))
    stem = _braces([next(iter(row.values())).stem for row in rows])
    return any_file.parents[2] / _braces(list(rows[0])) / any_file.parent.name / f"{stem}{any_file.suffix}"


def _braces(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _paths(given: str) -> list[str]:
    """A comma list of folders, unless a folder has that name."""
    return [given] if Path(given).exists() else [part for part in given.split(",") if part]


def _side_by_side(results: dict[str, dict[str, Any]]) -> Table:
    """A row a benchmark, a column a model."""
    table = Table(title="scored as the official scorers do")
    table.add_column("benchmark")
    for name in results:
        table.add_column(escape(name), justify="right")
    for bench in next(iter(results.values())):
        table.add_row(TITLES[bench], *(f"{row[bench]['score']:.2f}" for row in results.values()))
    return table


def _held_out(
    folder: Path,
    *,
    limit: int | None,
    as_json: bool,
    split: str | None = None,
    data: Path | None = None,
    show: int = 6,
) -> None:
    if split not in (None, "test", "validation", "train"):
        raise UserError(f"--split is '{split}'; it must be test or validation, or train for what was trained on.")
    if split and data:
        raise UserError("--split and --data both say what to ask. Give one of them.")
    split = split or "test"
    quiet_libraries()
    from maskft.evaluation import answers_name, evaluate_run
    from maskft.runs import read_metrics

    notes.print(
        f"answering the questions of {data} with {folder}" if data else f"answering the {split} questions of {folder}"
    )
    scores, records = evaluate_run(folder, split=split, data=data, limit=limit, progress=progress)
    if as_json:
        print_json({"run": str(folder), **scores})
    console = result_console(as_json)
    asked = "questions of the data" if data else "training questions" if split == "train" else "held-out questions"
    console.print(_score_table(scores, f"{len(records)} {asked}", read_metrics(folder)["train"]))
    if "by_answer_type" in scores:
        console.print(_type_table(scores["by_answer_type"]))
    if show:
        console.print(_answer_table(records, show))
    if limit is None:
        written = folder / f"answers-{answers_name(split, data)}.jsonl"
        console.print(
            f"answers  {written}\nmetrics  {folder / 'metrics.json'}\n{leave_report(folder)}",
            end="",
        )
    else:
        console.print(f"the first {limit} questions only: nothing was written")


def _score_table(scores: dict[str, Any], asked: str, trained: dict[str, Any]) -> Table:
    from maskft.evaluation.metrics import METRIC_TITLES

    share = trained["trainable_parameters"] / trained["base_parameters"]
    table = Table(title=f"{METRIC_TITLES[scores['metric']]} on {asked}")
    for column in ("model", "accuracy", "95 % interval", "trainable", "training time"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = (("base", "", ""), ("blind guess", "", ""), ("tuned", percent(share), f"{trained['seconds']:.0f} s"))
    for name, trainable, seconds in rows:
        score = scores[name.split()[0]]
        interval = f"{percent(score['low'])} to {percent(score['high'])}"
        table.add_row(name, percent(score["accuracy"]), interval, trainable, seconds)
    return table


def _type_table(by_type: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """What is known of one type of answer need not be known of another."""
    table = Table(title="by type of answer")
    for column in ("answer", "questions", "base", "blind guess", "tuned"):
        table.add_column(column, justify="left" if column == "answer" else "right")
    for kind, found in by_type.items():
        shares = (percent(found[side]["accuracy"]) for side in ("base", "blind", "tuned"))
        table.add_row(kind, str(found["tuned"]["examples"]), *shares)
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
