"""One run of a study, in a process of its own, so that its memory is given back and a crash is its alone.

    python -m maskft.studies.trial

reads paths of jobs from stdin, a line each, and works on one after the other: it forks, trains, answers and writes
result.json beside the job. On stdout it says "started PID" and "ended CODE": 0 done, 2 a user's mistake, 3 paused, 1 a
fault, below 0 a signal. It ends with its stdin, and the run with it. The imports, which take longer than a short run,
are made once. With --once it works on one job by itself, without forking, and ends.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from maskft.errors import Paused, StudyError, UserError
from maskft.recipe import Recipe, load_recipe
from maskft.runs import METRICS, RECIPE, LoadedRun, load_data, load_run, run_recipe, write_json
from maskft.studies.results import Part, Result, Score, Training, final_loss, packed_outcomes, write_result
from maskft.studies.sections import watching

PAUSED, MISTAKE, FAULT = 3, 2, 1
RESULT = "result.json"
OUTPUT = "output.txt"


class Job(BaseModel):
    """What a trial is told, as job.json in its folder.

    Attributes:
        folder: the trial's; the run is in run/.
        shared: folder of what all trials of the study on this machine use: answers of the base, fingerprints.
        parts: of the data, to be answered.
        loss_every, loss_rows: as in `maskft.studies.sections.Measure`.
        after: settings of analyses, by name.
        cell: fields of `Result` that say which run it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Path
    overrides: list[str]
    folder: Path
    shared: Path
    parts: list[Literal["validation", "test"]]
    train_questions: int
    loss_every: int = 0
    loss_rows: int = 1
    last_steps: int
    after: dict[str, dict[str, Any]]
    cell: dict[str, Any]


def work(job: Job) -> Result:
    """Train and evaluate, each as far as it has not been done, and write the result.

    Raises:
        UserError: recipe, data or model cannot be used.
        Paused: SIGTERM asked for an end.
    """
    import torch

    from maskft.studies.after import analysed
    from maskft.training import LOG, train

    started = time.monotonic()
    recipe = load_recipe(job.recipe, [*job.overrides, *watching(job.loss_every)])
    run = job.folder / "run"
    with _alone(job.folder):
        data = load_data(recipe)
        _make_room(run, recipe)
        finished = (run / METRICS).is_file()
        metrics = train(recipe, run, say=_say, parts=_watched(data, job.loss_rows) if job.loss_every else data)
        peak = _peak_of_training(job.folder, finished)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = _answered(job, run, data)
        after = portable(analysed(run, job.after, _say))
    log = json.loads((run / LOG).read_text(encoding="utf-8")) if (run / LOG).is_file() else []
    made = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    result = Result(
        **job.cell,
        overrides=list(map(_portable_override, job.overrides)),
        recipe=portable(recipe.model_dump(mode="json")),
        metric=recipe.evaluation.metric,
        parts=parts,
        training=_training(metrics["train"], log, job.last_steps, peak),
        log=log,
        after=after,
        wall_seconds=round(time.monotonic() - started, 1),
        packages=made["packages"],
        python=made["python"],
        machine=made["machine"],
        commit=made["commit"],
        data_fingerprint=_data_fingerprint(recipe, data, job.shared),
        base_fingerprint=_base_fingerprint(recipe, job.shared),
    )
    write_result(job.folder / RESULT, result)
    return result


def _make_room(run: Path, recipe: Recipe) -> None:
    """Set aside a run of the same cell that was made or measured otherwise; one that did not end is removed."""
    if (run / RECIPE).is_file() and run_recipe(run) != recipe:
        if (run / METRICS).is_file():
            run.rename(next(free for n in count(1) if not (free := run.with_name(f"{run.name}.{n}")).exists()))
        else:
            shutil.rmtree(run)


def portable(tree: Any) -> Any:
    """The tree without this machine's paths: those in the current folder relative to it, of others the last piece."""
    if isinstance(tree, dict):
        return {key: portable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [portable(value) for value in tree]
    if not isinstance(tree, str) or not os.path.isabs(tree):
        return tree
    path = Path(tree)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _portable_override(override: str) -> str:
    key, _, value = override.partition("=")
    try:
        return f"{key}={json.dumps(portable(json.loads(value)), ensure_ascii=False)}"
    except ValueError:
        return f"{key}={portable(value)}"


def _watched(data: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The data with so many rows of validation, on which the loss is measured while training."""
    if "validation" not in data:
        raise StudyError("measure.loss_every asks for the loss on the validation part, but the data has none.")
    part = data["validation"]
    return {**data, "validation": part.select(range(min(rows, len(part))))}


def _training(trained: Mapping[str, Any], log: Sequence[Mapping[str, Any]], last_steps: int, peak: int) -> Training:
    first = trained["resumed_from_step"] or 0
    done = trained["steps"] - first
    known = {name: trained[name] for name in Training.model_fields if name in trained}
    watching = sum(entry.get("eval_runtime", 0.0) for entry in log if entry.get("step", 0) > first)
    step = round((trained["seconds"] - watching) / done, 4) if done else None
    last = final_loss(log, last_steps)
    return Training(**{**known, "final_loss": last, "step_seconds": step, "peak_memory": peak})


def _answered(job: Job, run: Path, data: Mapping[str, Any]) -> dict[str, Part]:
    """Scores of the parts that the job asks for; the run is loaded once for all of them."""
    wanted: dict[str, int | None] = {"train": job.train_questions} if job.train_questions else {}
    wanted |= dict.fromkeys(job.parts)
    for part in wanted:
        if part not in data:
            raise StudyError(f"the data has no {part} part; it has {', '.join(data)}.")
    if not wanted:
        return {}
    loaded = load_run(run, data)
    return {part: _scored(loaded, part, limit, job.shared) for part, limit in wanted.items()}


def _scored(loaded: LoadedRun, part: str, limit: int | None, shared: Path) -> Part:
    """Answers of a part, scored. The base's answers are kept for the other trials."""
    from maskft.evaluation import evaluate_run
    from maskft.evaluation.evaluate import answer_types, scored

    if limit is not None and limit >= len(loaded.asked[part]):
        limit = None  # all of them, which is a result of the run's own
    known = _kept(shared, "answers", loaded.recipe, "model", "data", "evaluation", part, limit)
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
    scores, records = evaluate_run(loaded, split=part, limit=limit, base_answers=before)
    if before is None:
        write_json(known, [record["base"] for record in records])
    outcomes = packed_outcomes(scored(scores["metric"], [record["tuned"] for record in records], records))
    tuned, base, blind = (Score(**scores[name]) for name in ("tuned", "base", "blind"))
    return Part(tuned=tuned, base=base, blind=blind, outcomes=outcomes, answer_types=answer_types(records))


def _data_fingerprint(recipe: Recipe, data: Mapping[str, Any], shared: Path) -> str:
    """`data_fingerprint`, counted once for all trials with these data."""
    path = _kept(shared, "rows", recipe, "data")
    if not path.is_file():
        write_json(path, data_fingerprint(data))
    found: str = json.loads(path.read_text(encoding="utf-8"))
    return found


def data_fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 over the rows: their texts, and of each image the bytes, or the size where it is a file."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(name.encode())
        for row in part:
            texts = {key: row[key] for key in ("messages", "answers") if key in row}
            digest.update(json.dumps(texts, sort_keys=True, default=str).encode())
            for image in row["images"]:
                content = image["bytes"] or str(os.path.getsize(image["path"])).encode()
                digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _base_fingerprint(recipe: Recipe, shared: Path) -> str:
    """Of the base's weights as they are without quantisation, counted once."""
    path = _kept(shared, "base", recipe, "model")
    if not path.is_file():
        from maskft.fingerprint import fingerprint
        from maskft.vlm.load import load_model

        model = load_model(
            recipe.model.base, dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code
        )
        write_json(path, fingerprint(dict(model.named_parameters())))
    found: str = json.loads(path.read_text(encoding="utf-8"))
    return found


def _kept(shared: Path, kind: str, recipe: Recipe, *parts: Any) -> Path:
    """The file for what depends on these sections of the recipe and these values alone."""
    dumped = recipe.model_dump(mode="json")
    content = json.dumps([dumped.get(part, part) if isinstance(part, str) else part for part in parts], sort_keys=True)
    shared.mkdir(parents=True, exist_ok=True)
    return shared / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"


def _peak_of_training(folder: Path, finished: bool) -> int:
    """Of this process, or where another one had `finished` the training, of that one."""
    kept = folder / "peak.json"
    if finished and kept.is_file():
        found: int = json.loads(kept.read_text(encoding="utf-8"))
        return found
    peak = _peak_memory()
    write_json(kept, peak)
    return peak


def _peak_memory() -> int:
    """Bytes that were most in use so far: of the accelerator where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder; its lock is the kernel's and ends with its process."""
    import fcntl

    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def run_job(path: Path) -> int:
    """Work on a job, with everything it prints in a file beside it; returns the exit code."""
    with (path.parent / OUTPUT).open("a", encoding="utf-8") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    try:
        work(Job.model_validate_json(path.read_text(encoding="utf-8")))
    except Paused as paused:
        _say(f"maskft: {paused}")
        return PAUSED
    except UserError as error:
        _say(f"maskft: {error}")
        return MISTAKE
    except BaseException:
        traceback.print_exc()
        return FAULT
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve(forks: bool) -> None:
    """See the module's docstring."""
    import maskft.evaluation
    import maskft.studies.after
    import maskft.training  # noqa: F401

    gc.freeze()  # what is imported stays, so that collections in the forked processes pass over it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the worker, whose end lets a run save a checkpoint
    with os.fdopen(os.dup(0), "rb", buffering=0) as lines, os.fdopen(os.dup(1), "w", buffering=1) as answers:
        buffer = b""
        while True:
            while b"\n" not in buffer:
                if not (read := lines.read(4096)):
                    return
                buffer += read
            line, _, buffer = buffer.partition(b"\n")
            path = Path(line.decode())
            if not forks:
                answers.write(f"started {os.getpid()}\n")
                answers.write(f"ended {run_job(path)}\n")
                return
            child = os.fork()
            if child == 0:
                code = FAULT
                try:
                    code = run_job(path)
                finally:
                    os._exit(code)
            answers.write(f"started {child}\n")
            answers.write(f"ended {_waited(child, lines.fileno())}\n")


def _waited(child: int, stdin: int) -> int:
    """The child's exit code, minus the signal that ended it; it is asked to end when stdin is closed."""
    closed = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if not closed and select.select([stdin], [], [], 0.1)[0] and not os.read(stdin, 1):
            closed = True
            os.kill(child, signal.SIGTERM)
        elif closed:
            time.sleep(0.1)


def main(arguments: Sequence[str]) -> None:
    """Serve; with --once, work on one job without forking."""
    serve(forks="--once" not in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
