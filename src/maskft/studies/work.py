"""A worker: takes cells of a study until none is left, stage by stage, and gathers the results."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskft.errors import StudyError
from maskft.recipe import Recipe, load_recipe
from maskft.runs import write_json
from maskft.studies.after import ACROSS, check_after, compare_seeds, named, remove_weights
from maskft.studies.definition import (
    Cell,
    Study,
    cells,
    grid_points,
    load_study,
    tuned_groups,
    tuned_parameters,
    tuning_cell,
)
from maskft.studies.known import differing, read_known, result_of
from maskft.studies.process import POLL, Processes, last_words, terminable
from maskft.studies.queue import CELL, ERROR, HEARTBEAT, RESULT, Queue, open_queues, should_prune, storage_at, suggest
from maskft.studies.results import Result, best, chosen_settings, identity, write_named
from maskft.studies.sections import Settings, watching
from maskft.studies.toy import toy_base
from maskft.studies.trial import OUTPUT, PAUSED, Job, portable
from maskft.studies.trial import RESULT as RESULT_FILE

logger = logging.getLogger(__name__)
RESULTS = "results"
Progress = Callable[[str, int, int], None]
"""Is told the stage, how many of its trials are finished, and how many there are."""


@dataclass
class Outcome:
    """What a worker leaves.

    Attributes:
        results: of all finished runs of the study, whoever made them; those of tuning too.
        failures: error by the name of the cell.
        tuned: what was chosen by variant and data set.
        output: folder of runs and results.
    """

    results: list[Result] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    tuned: dict[tuple[str, str], Settings] = field(default_factory=dict)
    output: Path = Path()


class Worker:
    """See `run_study`."""

    def __init__(
        self,
        path: Path,
        study: Study,
        output: Path,
        storage: Any,
        processes: Processes,
        *,
        toy: bool,
        known: Sequence[Result] = (),
    ) -> None:
        self.study, self.output, self.toy, self.known = study, output, toy, known
        self.name = path.stem + ("-toy" if toy else "")
        self.storage, self.processes = storage, processes
        self.recipe = study.recipe.read_text(encoding="utf-8") if study.recipe.is_file() else ""
        recipes = [self._load(cell) for cell in cells(study, {}, toy=True)] if toy else []
        self._base = [f"model.base={toy_base(study, output, recipes)}"] if toy else []
        self._toy = {"TORCHDYNAMO_DISABLE": "1"} if toy else {}  # to compile takes longer than to train
        self._queues: list[tuple[Queue, Mapping[str, Cell]]] = []
        self.tuning: list[Result] = []

    def check(self) -> None:
        """Load the recipes of one seed and find the analyses, so that a mistake is told before the first run."""
        check_after(self.study.after)
        named(self.study.across, ACROSS)
        for cell in cells(self.study, {}, toy=self.toy):
            if cell.seed == self.study.seeds[0]:
                self._load(cell)
        for group in self._tuned_groups():
            points = grid_points(tuned_parameters(self.study, group[0]), 1)
            self._load(tuning_cell(self.study, group, points[0], toy=self.toy))

    def _load(self, cell: Cell) -> Recipe:
        try:
            return load_recipe(self.study.recipe, list(cell.overrides))
        except ValueError as error:
            raise StudyError(f"the run {cell.name} cannot be made. {error}") from error

    def _tuned_groups(self) -> list[tuple[str, str]]:
        wanted = {cell.variant for cell in cells(self.study, {}, toy=self.toy)}
        found = [group for group in tuned_groups(self.study) if group[0] in wanted]
        return found[:1] if self.toy else found

    def tune(self, progress: Progress) -> dict[tuple[str, str], Settings]:
        """The first stage: the best values of each variant on each data set."""
        chosen: dict[tuple[str, str], Settings] = {}
        queues: dict[tuple[str, str], Queue] = {}
        for group in self._tuned_groups():
            tune = self.study.tune
            assert tune is not None
            count = 1 if self.toy else tune.trials
            parameters = tuned_parameters(self.study, group[0])
            open_values: Sequence[Settings] = [{}] * count
            values = grid_points(parameters, count) if tune.sampler == "grid" and not self.toy else open_values
            marker = tuning_cell(self.study, group, {}, toy=self.toy).key(self.recipe)
            described = {key: parameter.model_dump(exclude_none=True) for key, parameter in parameters.items()}
            queue = Queue(
                self.storage,
                f"{self.name}/tune/{marker}/{json.dumps(described, sort_keys=True)}"[:500],
                sampler="random" if tune.sampler == "grid" else tune.sampler,
                seed=tune.seed,
                pruner=tune.pruner,
            )
            planned = {json.dumps(point) if point else f"{n:03d}": point for n, point in enumerate(values)}
            queue.plan(planned, failed_too=False)
            if not any(trial.state.name == "COMPLETE" for trial in queue.trials().values()):
                queue.plan(planned, failed_too=True)
            queues[group] = queue

        def work(queue: Queue, trial: Any) -> None:
            group = next(group for group, own in queues.items() if own is queue)
            tried = suggest(trial, tuned_parameters(self.study, group[0]))
            self._run(queue, trial, tuning_cell(self.study, group, tried, toy=self.toy), ["validation"])

        self._drain("tuning", list(queues.values()), work, progress)
        for group, queue in queues.items():
            done = [t for t in queue.trials().values() if t.state.name == "COMPLETE"]
            errors = [trial.user_attrs[ERROR] for trial in queue.trials().values() if ERROR in trial.user_attrs]
            place = " on ".join(filter(None, group))
            if not done:
                first = errors[0] if errors else "none"
                raise StudyError(f"no trial of tuning {place} came to its end. The first error: {first}")
            if errors:
                logger.warning("%d trials of tuning %s failed. The first error: %s", len(errors), place, errors[0])
            results = [_result(trial) for trial in done]
            chosen[group] = dict(done[best(results, self.study.measure.choose)].params)
            self.tuning += results
        if self.study.tune is not None and (only := self.study.tune.data) is not None:
            chosen = {(variant, name): chosen[variant, only] for variant, _ in chosen for name in self.study.data}
        return chosen

    def run(self, tuned: Mapping[tuple[str, str], Settings], progress: Progress) -> list[Result]:
        """The second stage: every cell with every seed. Where only chosen runs are tested, the third tests those."""
        measure = self.study.measure
        parts = ["validation"] if measure.validation else []
        todo = {cell.key(self.recipe): cell for cell in cells(self.study, tuned, toy=self.toy)}
        first = self._stage("runs", todo, parts + (["test"] if measure.test == "all" else []), progress)
        if self.study.across:
            runs = compare_seeds(todo.values(), lambda cell: self._folder(cell) / "run", self.study.across)
            write_json(self.output / "across.json", portable(runs))
        if measure.test != "chosen":
            return first
        best = chosen_settings(first, measure.choose)
        if self.toy:  # where all are equal, one is enough
            best = {group: settings[:1] for group, settings in best.items()}
        tested = {k: c for k, c in todo.items() if c.settings in best.get(c.group, [])}
        second = self._stage("tests", tested, [*parts, "test"], progress)
        return [r for r in first if all(identity(r) != identity(t) for t in second)] + second

    def _folder(self, cell: Cell) -> Path:
        key = cell.key(self.recipe)
        return self.output / "trials" / (f"tune.{key}" if cell.stage == "tune" else key)

    def _stage(self, name: str, todo: Mapping[str, Cell], parts: Sequence[str], progress: Progress) -> list[Result]:
        queue = Queue(self.storage, f"{self.name}/{name}")
        # by data set and seed first, so that what an unfinished study has can be compared
        data, seeds = list(self.study.data or [""]), self.study.seeds
        order = sorted(todo, key=lambda key: (data.index(todo[key].data), seeds.index(todo[key].seed)))
        queue.plan({key: {} for key in order}, failed_too=True)
        self._drain(
            name, [queue], lambda own, trial: self._run(own, trial, todo[trial.user_attrs[CELL]], parts), progress
        )
        self._queues.append((queue, todo))
        return [_result(t) for t in queue.trials().values() if t.state.name == "COMPLETE"]

    def failures(self) -> dict[str, str]:
        """Errors of cells that failed."""
        return {
            todo[key].name: trial.user_attrs.get(ERROR, "its worker ended")
            for queue, todo in self._queues
            for key, trial in queue.trials().items()
            if trial.state.name == "FAIL"
        }

    def _drain(
        self, stage: str, queues: Sequence[Queue], work: Callable[[Queue, Any], None], progress: Progress
    ) -> None:
        """Work on trials of the queues until all of them, also those of other workers, have ended."""
        while True:
            states = [trial.state for queue in queues for trial in queue.trials().values()]
            progress(stage, sum(state.is_finished() for state in states), len(states))
            for queue in queues:
                queue.revive()
                if (trial := queue.claim()) is not None:
                    work(queue, trial)
                    break
            else:
                if not open_queues(queues):
                    return
                time.sleep(POLL)

    def _run(self, queue: Queue, trial: Any, cell: Cell, parts: Sequence[str]) -> None:
        """One trial in its process, from the claim to its end in the storage."""
        measure = self.study.measure
        tuning = cell.stage == "tune"
        folder = self._folder(cell)
        job = Job(
            recipe=self.study.recipe,
            overrides=[*cell.overrides, *self._base],
            folder=folder,
            shared=self.output / "shared",
            parts=[part for part in ("validation", "test") if part in parts],
            train_questions=0 if tuning else measure.train_questions,
            loss_every=0 if tuning else measure.loss_every,
            loss_rows=measure.loss_rows,
            last_steps=measure.last_steps,
            after={} if tuning else self.study.after,
            cell={
                "study": self.name,
                "stage": cell.stage,
                "variant": cell.variant,
                "data": cell.data,
                "settings": cell.settings,
                "tuned": cell.tuned,
                "seed": cell.seed,
                "environment": dict(cell.environment),
            },
        )
        if (known := self._known(cell, job)) is not None:
            self._complete(queue, trial, known)
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).unlink(missing_ok=True)
        write_json(folder / "job.json", job.model_dump(mode="json"))
        pruned = False
        reported: set[int] = set()

        def tick() -> bool:
            nonlocal pruned
            pruned = pruned or (tuning and should_prune(trial, folder / "run" / "log.json", reported))
            return not pruned

        code: int | None = None
        try:
            with queue.alive(trial):
                code = self.processes.run(folder / "job.json", {**cell.environment, **self._toy}, tick)
        finally:
            if code is None:  # this worker was interrupted
                self.processes.close()
                queue.fail(trial, None)
        if pruned:
            queue.prune(trial)
        elif code == 0:
            result = Result.model_validate_json((folder / RESULT_FILE).read_text(encoding="utf-8"))
            if (difference := differing(result, self.known)) is not None:
                queue.fail(trial, f"{difference}, so it cannot be compared with that one")
                return
            self._complete(queue, trial, result)
            remove_weights(folder / "run", keep=False if tuning else self.study.keep_weights)
        elif code == PAUSED:
            queue.fail(trial, None)
        else:
            queue.fail(trial, last_words(code, folder / OUTPUT))

    def _known(self, cell: Cell, job: Job) -> Result | None:
        """The result of the job among those that were there before."""
        if not self.known:
            return None
        recipe = load_recipe(job.recipe, [*job.overrides, *watching(job.loss_every)])
        asked = ["train", *job.parts] if job.train_questions else job.parts
        return result_of(cell, portable(recipe.model_dump(mode="json")), asked, self.known)

    def _complete(self, queue: Queue, trial: Any, result: Result) -> None:
        value = result.value(self.study.measure.choose if "validation" in result.parts else "loss")
        queue.complete(trial, value, result.model_dump(mode="json"))
        write_named(self.output / RESULTS, result)  # pages can be made of unfinished studies


def run_study(
    path: Path,
    output: Path,
    *,
    storage: str | None = None,
    toy: bool = False,
    trials: int | None = None,
    heartbeat: int = HEARTBEAT,
    only_tune: bool = False,
    known: Path | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> Outcome:
    """Work on a study until it is finished, together with every other worker on the same storage.

    Args:
        path: the study's file.
        output: folder for runs, results and, where no storage is given, the database.
        storage: SQLAlchemy URL of a database; default SQLite in `output`.
        toy: a tiny random base and a few cells, to see that everything runs.
        trials: of tuning, in place of the file's.
        heartbeat: seconds between signs of life in the storage.
        only_tune: end after the first stage.
        known: folder of results of this study; runs that it has, made by the same recipe, are not made again.
        progress: is told how far the study is.

    Raises:
        StudyError: the file, the storage or `known` cannot be used, or nothing of a tuning came to its end.
        MissingExtraError: Optuna is not installed.
    """
    study = load_study(path)
    if trials is not None:
        if study.tune is None:
            raise StudyError(f"--trials is for studies that tune, and {path} has no section tune. Leave it out.")
        study = study.model_copy(update={"tune": study.tune.model_copy(update={"trials": trials})})
    taken_over = read_known(known)
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    errors = output / f"worker-{os.getpid()}.txt"
    with storage_at(storage or f"sqlite:///{output / 'study.db'}", heartbeat) as opened, Processes(errors) as processes:
        worker = Worker(path, study, output, opened, processes, toy=toy, known=taken_over)
        worker.check()
        with terminable():
            tuned = worker.tune(progress)
            results = [] if only_tune else worker.run(tuned, progress)
        outcome = Outcome([*worker.tuning, *results], worker.failures(), tuned, output)
    for result in outcome.results:
        write_named(output / RESULTS, result)
    return outcome


def _result(trial: Any) -> Result:
    return Result.model_validate(trial.user_attrs[RESULT])
