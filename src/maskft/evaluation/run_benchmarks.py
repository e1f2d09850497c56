"""Benchmarks on models: questions asked, answers kept on disk, scores side by side.

<output>/<benchmark>/answers/<model>.jsonl   answers, written as they come (see maskft.evaluation.answering)
<output>/results.json                        {model: {benchmark: {"score", "details"}}}

With several processes (`accelerate launch -m maskft.cli evaluate ...`) each holds a copy of the model and answers
every k-th batch.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskft.errors import DataError, RunError, UserError, gathered
from maskft.evaluation.answering import AnswerFile, answer_all, question_row, written_prompt
from maskft.evaluation.benchmarks import BENCHMARKS, Answer, Benchmark, Question, benchmark, read_answers
from maskft.evaluation.candidates import (
    Candidate,
    base_identity,
    find_candidates,
    learnt_identity,
    wearing,
)
from maskft.evaluation.generation import Progress, generate_answers
from maskft.runs import environment, write_json
from maskft.tuner.sharding import part_together
from maskft.vlm.load import load_model, load_processor

BATCH_SIZE = 16
DTYPES = ("float32", "bfloat16", "float16")
_PACKAGES = ("maskft", "torch", "transformers", "peft")
_PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for the others: one may have far more left to answer after an interruption."""


@dataclass(frozen=True)
class Outcome:
    """What a call made.

    Attributes:
        output: the folder of results and answers.
        files: the answers file of each model and benchmark.
        answered: how many questions each model has answered of each benchmark.
        results: {model: {benchmark: {"score", "details"}}}; empty with a limit, which leaves no complete answers.
        main: whether this process is the one that reports.
    """

    output: Path
    files: dict[str, dict[str, Path]]
    answered: dict[str, dict[str, int]]
    results: dict[str, dict[str, Any]]
    main: bool


@dataclass(frozen=True)
class _Task:
    """A benchmark, its questions as far as they are asked, and what scoring needs (None with a limit)."""

    name: str
    module: Benchmark
    questions: Sequence[Question]
    annotations: Any


def benchmark_names(given: Sequence[str]) -> list[str]:
    """Names from a list whose entries may be comma lists; "all" stands for all six.

    Raises:
        UserError: there is no such benchmark, or none is named.
    """
    names = [name.strip() for entry in given for name in entry.split(",") if name.strip()]
    names = [known for name in names for known in (BENCHMARKS if name == "all" else [name])]
    for name in names:
        benchmark(name)
    if not names:
        raise UserError(f"--benchmark names none. Give all, or some of {', '.join(BENCHMARKS)}.")
    return list(dict.fromkeys(names))


def run_benchmarks(
    model: str,
    benchmarks: Sequence[str],
    data: Path,
    *,
    adapters: Sequence[str] = (),
    output: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str | None = None,
    max_new_tokens: int | None = None,
    progress: Callable[[str], Progress] = lambda label: iter,
) -> Outcome:
    """Ask each model the questions of each benchmark and score the answers. An interrupted call is taken up again.

    Everything that can be checked beforehand is: files of the benchmarks, images, earlier answers in the output.

    Args:
        model: a run, an adapter, a model's folder, a hub id or "embedded".
        benchmarks: names of benchmarks.
        data: the folder that holds gqa/, MME/, pope/ and so on.
        adapters: more runs or adapters on the same base, one after the other.
        output: default: benchmarks/ in the folder of a run or adapter, runs/benchmarks/<name> for a base.
        limit: only the first so many questions of each benchmark; they get no score.
        batch_size: questions asked together.
        dtype: "float32", "bfloat16" or "float16"; default: the recipe's, bfloat16 without one.
        max_new_tokens: longest answer; default: each benchmark's own.
        progress: makes a progress wrapper for a label.

    Raises:
        UserError: anything given cannot be used.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    names = benchmark_names(benchmarks)
    state = _processes()
    with state.main_process_first():  # so that a mistake is reported once
        candidates = find_candidates(model, adapters)
        tasks = [_task(name, data, limit) for name in names]
        _refuse_missing_images(tasks)
        folder = output or _default_output(candidates[0])
        files = _answer_files(
            candidates,
            tasks,
            folder,
            {"limit": limit, "batch_size": batch_size, "dtype": dtype or candidates[0].model.dtype},
            max_new_tokens,
            state.device.type,
        )
        _read_results(folder / "results.json")
        if state.is_main_process:
            for file in files.values():
                file.check()
            for file in files.values():
                file.prepare()
    open_files = {key for key, file in files.items() if file.pending()}
    state.wait_for_everyone()  # nobody writes before all have looked
    if open_files:
        shown = progress if state.is_main_process else (lambda label: iter)
        _answer(candidates, {key: files[key] for key in files if key in open_files}, state, shown)

    results: dict[str, dict[str, Any]] = {}
    if state.is_main_process and limit is None:
        for candidate in candidates:
            for task in tasks:
                answers = read_answers(files[candidate.name, task.name].path)
                score = task.module.score(task.annotations, answers).to_dict()
                results.setdefault(candidate.name, {})[task.name] = score
        earlier = _read_results(folder / "results.json")
        merged = {name: {**earlier.get(name, {}), **results.get(name, {})} for name in {**earlier, **results}}
        write_json(folder / "results.json", merged)
    part_together()
    grid = {c.name: {t.name: files[c.name, t.name] for t in tasks} for c in candidates}
    return Outcome(
        output=folder,
        files={c: {t: file.path for t, file in row.items()} for c, row in grid.items()},
        answered={c: {t: len(file.questions) for t, file in row.items()} for c, row in grid.items()},
        results=results,
        main=state.is_main_process,
    )


def _processes() -> Any:
    """This process among those that `accelerate launch` or torchrun started, with its device."""
    from accelerate import PartialState

    no_accelerator = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    return PartialState(cpu=no_accelerator, timeout=_PATIENCE)


def _task(name: str, data: Path, limit: int | None) -> _Task:
    """Read a benchmark's files, and try scoring so that files that do not belong together are found now."""
    module = benchmark(name)
    asked = module.questions(data)
    if limit is not None:
        return _Task(name, module, asked[:limit], None)
    annotations = module.read(data)
    module.score(annotations, [Answer(q.id, written_prompt(name, q), "") for q in asked])
    return _Task(name, module, asked, annotations)


def _refuse_missing_images(tasks: Sequence[_Task]) -> None:
    missing = {
        str(question.image): f"{task.name}: {question.image}"
        for task in tasks
        for question in task.questions
        if question.image is not None and not question.image.is_file()
    }
    if missing:
        raise DataError(
            f"{len(missing)} images of the benchmarks are missing:\n{gathered(list(missing.values()))}\n"
            "Put them there, or leave the benchmark out."
        )


def _default_output(first: Candidate) -> Path:
    return first.folder / "benchmarks" if first.folder else Path("runs") / "benchmarks" / first.name


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results of earlier calls with the same output.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Remove it, or give another --output.") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{path} does not hold results of benchmarks. Remove it, or give another --output.")
    return content


def _answer_files(
    candidates: Sequence[Candidate],
    tasks: Sequence[_Task],
    output: Path,
    settings: dict[str, Any],
    max_new_tokens: int | None,
    device: str,
) -> dict[tuple[str, str], AnswerFile]:
    """The answers file of each (model, benchmark)."""
    section = candidates[0].model
    base, limit = base_identity(section), settings["limit"]
    versions = environment()
    made = {
        "packages": {name: versions["packages"][name] for name in _PACKAGES},
        "python": versions["python"],
        "device": device,
    }
    files = {}
    for candidate in candidates:
        learnt = learnt_identity(candidate)
        for task in tasks:
            stem = candidate.name if limit is None else f"{candidate.name}-limit-{limit}"
            files[candidate.name, task.name] = AnswerFile(
                path=output / task.name / "answers" / f"{stem}.jsonl",
                benchmark=task.name,
                model=candidate.name,
                questions=task.questions,
                batch_size=settings["batch_size"],
                settings={
                    **settings,
                    "attention": section.attention,
                    "quantization": section.quantization,
                    "max_new_tokens": max_new_tokens or task.module.MAX_NEW_TOKENS,
                    "base": base,
                    "learnt": learnt,
                },
                environment=made,
                places={"base": section.base, "learnt": str(candidate.folder) if candidate.folder else None},
            )
    return files


def _answer(
    candidates: Sequence[Candidate],
    files: dict[tuple[str, str], AnswerFile],
    state: Any,
    progress: Callable[[str], Progress],
) -> None:
    """Load the base once and finish the files, with one candidate after the other."""
    section = candidates[0].model
    waiting = [c for c in candidates if any(name == c.name for name, _ in files)]
    processor = load_processor(section.base, trust_remote_code=section.trust_remote_code)
    dtype = next(iter(files.values())).settings["dtype"]
    model = load_model(
        section.base,
        dtype=dtype,
        attention=section.attention,
        trust_remote_code=section.trust_remote_code,
        quantization=section.quantization,
    )
    if section.quantization == "none":  # a quantised model is put where it belongs when it is loaded
        model.to(state.device)
    for candidate in waiting[1:]:
        with wearing(model, candidate):  # one that does not fit is refused before any question is asked
            pass
    for candidate in waiting:
        with wearing(model, candidate) as worn:
            for (name, bench), file in files.items():
                if name != candidate.name:
                    continue

                def ask(questions: Sequence[Question], worn: Any = worn, file: AnswerFile = file) -> list[str]:
                    return _ask(worn, processor, questions, file)

                answer_all(
                    file,
                    ask,
                    progress=progress(f"{bench} {name}"),
                    process=state.process_index,
                    processes=state.num_processes,
                    wait=state.wait_for_everyone,
                )


def _ask(model: Any, processor: Any, questions: Sequence[Question], file: AnswerFile) -> list[str]:
    rows = [question_row(file.benchmark, question) for question in questions]
    try:
        return generate_answers(
            model, processor, rows, batch_size=len(rows), max_new_tokens=file.settings["max_new_tokens"]
        )
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory with {file.batch_size} questions together. Give a smaller --batch-size, and another "
            f"--output or remove {file.path}."
        ) from error
