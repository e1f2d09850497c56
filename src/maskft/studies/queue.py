"""Cells of a study as trials in an Optuna storage. Any number of workers, on any machines, take from one queue.

A cell is planned as a waiting trial, claimed by the worker that sets it to running, and ends as complete, pruned or
failed. Workers let the database know every few seconds that they live; a trial whose worker is silent is failed by
whoever notices, and its cell is planned again. Should two workers plan the same cell, the later trial is given up when
it is claimed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskft.errors import MissingExtraError, StudyError, UserError
from maskft.studies.sections import Parameters

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 30
"""Seconds between signs of life."""
SILENCE = 4
"""So many of them missing, and a worker is taken for dead."""
CELL, ERROR, RESULT, GIVEN_UP = "cell", "error", "result", "given up"
logger = logging.getLogger(__name__)


def open_storage(url: str, heartbeat: int = HEARTBEAT) -> Any:
    """Open, and where it is new set up, the database of an SQLAlchemy URL, such as "postgresql+psycopg://host/name".

    Raises:
        MissingExtraError: Optuna or the database's driver is not installed.
        StudyError: it cannot be opened.
    """
    try:
        import optuna
        import sqlalchemy.exc
    except ImportError as error:
        raise MissingExtraError("optuna", "pip install 'maskft[study]'", "A study") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for left in (4, 3, 2, 1, 0):  # workers that start together may both make its tables, and one of them fails
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # heartbeats are called experimental
                return optuna.storages.RDBStorage(
                    url,
                    heartbeat_interval=heartbeat,
                    grace_period=SILENCE * heartbeat,
                    engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {},
                )
        except ImportError as error:
            raise MissingExtraError(
                str(error.name or error), "pip install 'maskft[study]'", f"The storage {_shown(url)}"
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
            if not left or isinstance(error, sqlalchemy.exc.ArgumentError):
                reason = str(error).splitlines()[0]
                raise StudyError(
                    f"the storage {_shown(url)} cannot be opened: {reason}. Give --storage an SQLAlchemy URL, such as "
                    "sqlite:///study.db or postgresql+psycopg://user@host/name."
                ) from error
            time.sleep(1)
    raise AssertionError


@contextlib.contextmanager
def storage_at(url: str, heartbeat: int = HEARTBEAT) -> Iterator[Any]:
    """`open_storage`, closed at the end of the block."""
    storage = open_storage(url, heartbeat)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


class Queue:
    """The cells of one stage, or of the tuning of one variant on one data set. Larger values are better.

    Args:
        storage: as `open_storage` gives it.
        name: of the Optuna study.
        sampler: "random" or "tpe" for tuned values that `plan` leaves open.
        seed: of the sampler.
        pruner: "median" or "none".
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        *,
        sampler: str = "random",
        seed: int = 0,
        pruner: str = "none",
    ) -> None:
        import optuna

        samplers: dict[str, Any] = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        pruners: dict[str, Any] = {
            "none": optuna.pruners.NopPruner(),
            "median": optuna.pruners.MedianPruner(n_startup_trials=2),
        }
        self.name, self._storage = name, storage
        self._cells: dict[str, dict[str, Any]] = {}
        self.study: optuna.Study = optuna.create_study(
            study_name=name,
            storage=storage,
            sampler=samplers[sampler](seed=seed),
            pruner=pruners[pruner],
            direction="maximize",
            load_if_exists=True,
        )

    def plan(self, cells: Mapping[str, Mapping[str, Any]], *, failed_too: bool) -> None:
        """Let every cell have a trial, but for those that failed unless `failed_too`.

        Args:
            cells: by key, the values of tuned parameters; those left out are for the sampler.
        """
        self._cells = {key: dict(values) for key, values in cells.items()}
        self._plan(failed_too)

    def revive(self) -> None:
        """Fail the trials of workers that are silent, and plan their cells again."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.storages.fail_stale_trials(self.study)
        self._plan(failed_too=False)

    def _plan(self, failed_too: bool) -> None:
        past = self.trials()
        for key, values in self._cells.items():
            last = past.get(key)
            if last is None or (last.state.name == "FAIL" and (failed_too or ERROR not in last.user_attrs)):
                tried = last.params if last is not None else {}
                self.study.enqueue_trial({**tried, **values}, user_attrs={CELL: key})

    def claim(self) -> optuna.Trial | None:
        """Take a waiting trial; None where there is none."""
        import optuna
        from optuna.trial import TrialState

        study_id = self._storage.get_study_id_from_name(self.name)
        for waiting in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if waiting.user_attrs.get(CELL) not in self._cells:
                continue
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, waiting.number)
            try:
                self._storage.record_heartbeat(trial_id)  # before it runs, so that no running trial is without
                if not self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                    continue
            except (optuna.exceptions.UpdateFinishedTrialError, optuna.exceptions.StorageInternalError):
                continue  # another worker was faster
            trial = optuna.Trial(self.study, trial_id)
            if self.trials()[waiting.user_attrs[CELL]].number == waiting.number:
                return trial
            trial.set_user_attr(GIVEN_UP, "planned twice")
            self.study.tell(trial, state=TrialState.FAIL)
        return None

    def trials(self) -> dict[str, optuna.trial.FrozenTrial]:
        """The trial that counts for each cell: the first one that has not failed, else the last."""
        found: dict[str, Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            key = trial.user_attrs.get(CELL)
            if key not in self._cells or GIVEN_UP in trial.user_attrs:
                continue
            if key not in found or found[key].state.name == "FAIL":
                found[key] = trial
        return found

    def unfinished(self) -> bool:
        """Whether a trial waits or runs."""
        return any(not trial.state.is_finished() for trial in self.trials().values())

    def complete(self, trial: optuna.Trial, value: float, result: Any) -> None:
        """End a trial well, with its result for all who share the storage."""
        with self._lost(trial):
            trial.set_user_attr(RESULT, result)
            self.study.tell(trial, value)

    def prune(self, trial: optuna.Trial) -> None:
        """End a trial that is not worth more steps."""
        from optuna.trial import TrialState

        with self._lost(trial):
            self.study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, error: str | None) -> None:
        """End a trial badly; without an error its cell is planned again."""
        from optuna.trial import TrialState

        with self._lost(trial):
            if error is not None:
                trial.set_user_attr(ERROR, error)
            self.study.tell(trial, state=TrialState.FAIL)

    @contextlib.contextmanager
    def alive(self, trial: optuna.Trial) -> Iterator[None]:
        """Give signs of life for a trial during the block."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(self.name), trial.number
        )
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._storage.get_heartbeat_interval()):
                try:
                    self._storage.record_heartbeat(trial_id)
                except Exception as error:  # a database that is away for a moment
                    logger.warning("no sign of life could be given: %s", error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextlib.contextmanager
    def _lost(self, trial: optuna.Trial) -> Iterator[None]:
        """A trial that was taken for dead meanwhile is another's by now."""
        import optuna

        try:
            yield
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            logger.warning("trial %s of %s was taken for dead and given to another worker", trial.number, self.name)


def suggest(trial: optuna.Trial, parameters: Parameters) -> dict[str, Any]:
    """Values of the parameters, by the sampler where the plan left them open."""
    found: dict[str, Any] = {}
    for key, parameter in parameters.items():
        if parameter.values is not None:
            found[key] = trial.suggest_categorical(key, parameter.values)
        else:
            assert parameter.low is not None
            assert parameter.high is not None
            found[key] = trial.suggest_float(key, parameter.low, parameter.high, log=parameter.log)
    return found


def should_prune(trial: Any, log: Path, reported: set[int]) -> bool:
    """Tell the trial the losses that have been logged since; whether its pruner would stop it."""
    try:
        entries = json.loads(log.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    for entry in entries:
        if "loss" in entry and entry["step"] not in reported:
            reported.add(entry["step"])
            trial.report(-entry["loss"], entry["step"])  # the larger the better, as are the values
    return bool(reported) and bool(trial.should_prune())


def open_queues(queues: Sequence[Queue]) -> bool:
    """Whether any of them has something left."""
    return any(queue.unfinished() for queue in queues)


def _shown(url: str) -> str:
    """A URL without its password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
