"""Workers that share a queue: nothing is lost, nothing runs twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import MissingExtraError, StudyError
from maskft.studies.queue import Queue, open_queues, open_storage, storage_at, suggest
from maskft.studies.sections import Parameter


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with storage_at(f"sqlite:///{tmp_path_factory.mktemp('db') / 's.db'}", heartbeat=1) as opened:
        yield opened


@pytest.fixture
def queues(storage: Any, request: pytest.FixtureRequest) -> tuple[Queue, Queue]:
    """Two workers' views of one queue."""
    return Queue(storage, request.node.name), Queue(storage, request.node.name)


CELLS: dict[str, dict[str, Any]] = {"a": {}, "b": {}}


def states(queue: Queue) -> dict[str, str]:
    return {key: trial.state.name for key, trial in queue.trials().items()}


def test_two_workers_take_different_cells(queues: tuple[Queue, Queue]) -> None:
    first, second = queues
    first.plan(CELLS, failed_too=True)
    second.plan(CELLS, failed_too=True)
    taken = [first.claim(), second.claim()]
    assert all(trial is not None for trial in taken)
    assert first.claim() is None
    for trial in taken:
        first.complete(trial, 1.0, {"cell": trial.user_attrs["cell"]})
    assert states(second) == {"a": "COMPLETE", "b": "COMPLETE"}
    assert not open_queues(queues)


def test_a_cell_that_was_planned_twice_runs_once(queues: tuple[Queue, Queue]) -> None:
    first, second = queues
    first.plan({"a": {}}, failed_too=True)
    first.study.enqueue_trial({}, user_attrs={"cell": "a"})  # as a worker that started at the same moment would
    second.plan({"a": {}}, failed_too=True)
    trial = first.claim()
    assert trial is not None
    assert second.claim() is None
    first.complete(trial, 1.0, {})
    assert [t.state.name for t in first.study.get_trials()] == ["COMPLETE", "FAIL"]
    assert states(second) == {"a": "COMPLETE"}


def test_a_silent_workers_cell_is_taken_up_again(queues: tuple[Queue, Queue]) -> None:
    dead, alive = queues
    dead.plan({"a": {"x": 0.25}}, failed_too=True)
    alive.plan({"a": {"x": 0.25}}, failed_too=True)
    lost = dead.claim()
    assert lost is not None
    assert suggest(lost, {"x": Parameter(low=0.0, high=1.0)}) == {"x": 0.25}
    alive.revive()
    assert alive.claim() is None
    time.sleep(5.5)  # four signs of life, one a second, are missing
    alive.revive()
    trial = alive.claim()
    assert trial is not None
    assert suggest(trial, {"x": Parameter(low=0.0, high=1.0)}) == {"x": 0.25}
    alive.complete(trial, 0.5, {"by": "alive"})
    dead.complete(lost, 0.7, {"by": "dead"})  # it was only asleep, and is told that the trial is gone
    assert states(dead) == {"a": "COMPLETE"}
    assert alive.trials()["a"].value == 0.5


def test_a_worker_that_gives_signs_of_life_keeps_its_trial(queues: tuple[Queue, Queue]) -> None:
    busy, other = queues
    busy.plan({"a": {}}, failed_too=True)
    other.plan({"a": {}}, failed_too=True)
    trial = busy.claim()
    assert trial is not None
    with busy.alive(trial):
        time.sleep(5.5)
        other.revive()
        assert other.claim() is None
    busy.complete(trial, 1.0, {})
    assert states(other) == {"a": "COMPLETE"}


def test_failed_cells_wait_for_the_next_call(queues: tuple[Queue, Queue]) -> None:
    queue, later = queues
    queue.plan({"a": {}, "b": {}}, failed_too=True)
    first, second = queue.claim(), queue.claim()
    assert first is not None
    assert second is not None
    queue.fail(first, "no such file")
    queue.fail(second, None)  # interrupted
    queue.revive()
    assert states(queue) == {"a": "FAIL", "b": "WAITING"}
    later.plan({"a": {}, "b": {}}, failed_too=True)
    assert states(later) == {"a": "WAITING", "b": "WAITING"}


def test_cells_of_another_definition_are_left_alone(queues: tuple[Queue, Queue]) -> None:
    before, after = queues
    before.plan({"a": {}}, failed_too=True)
    after.plan({"b": {}}, failed_too=True)
    trial = after.claim()
    assert trial is not None
    assert trial.user_attrs["cell"] == "b"
    assert after.claim() is None
    after.prune(trial)
    assert states(after) == {"b": "PRUNED"}
    after.revive()
    assert states(after) == {"b": "PRUNED"}


def test_samplers_fill_what_the_plan_leaves_open(storage: Any) -> None:
    parameters = {"x": Parameter(low=1e-4, high=1e-1, log=True), "y": Parameter(values=["p", "q"])}
    drawn = []
    for sampler in ("tpe", "random"):
        queue = Queue(storage, f"open-{sampler}", sampler=sampler, seed=1)
        queue.plan({"0": {}, "1": {}}, failed_too=True)
        for _ in range(2):
            trial = queue.claim()
            assert trial is not None
            values = suggest(trial, parameters)
            assert 1e-4 <= values["x"] <= 1e-1
            assert values["y"] in ("p", "q")
            queue.complete(trial, 0.0, {})
            drawn.append(values["x"])
    assert len(set(drawn[:2])) == len(set(drawn[2:])) == 2


def test_storages_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StudyError, match=r"the storage sqlite:////none/such/s.db cannot be opened"):
        open_storage("sqlite:////none/such/s.db")
    with pytest.raises(StudyError, match="Give --storage an SQLAlchemy URL"):
        open_storage("nonsense")
    with pytest.raises(MissingExtraError, match=r"postgresql\+pg8000://host/x.*pip install 'maskft\[study\]'"):
        open_storage("postgresql+pg8000://me:secret@host/x")


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskft\[study\]'"):
        open_storage("sqlite://")
