"""One trial: from its job to its result, and the process that starts them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo

from maskft import runs
from maskft.errors import StudyError
from maskft.studies import process, trial
from maskft.studies.process import Processes
from maskft.studies.results import read_result, read_results
from tests.studies.made import write_study

CELL: dict[str, Any] = {
    "study": "s",
    "stage": "run",
    "variant": "a",
    "data": "",
    "seed": 0,
    "settings": {},
    "tuned": {},
    "environment": {},
}


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    with torch._dynamo.config.patch(disable=True):
        yield


def job(folder: Path, *overrides: str, **changes: Any) -> trial.Job:
    write_study(folder)
    (folder / "trial").mkdir(exist_ok=True)
    given = {
        "recipe": folder / "recipe.yaml",
        "overrides": ["method.memory=balanced", *overrides],
        "folder": folder / "trial",
        "shared": folder / "shared",
        "parts": ["validation"],
        "train_questions": 0,
        "last_steps": 1,
        "after": {"masks": {}},
        "cell": CELL,
    }
    return trial.Job.model_validate({**given, **changes})


def test_work_goes_on_where_it_ended(tmp_path: Path) -> None:
    given = job(tmp_path)
    first = trial.work(given)
    assert read_result(tmp_path / "trial" / "result.json") == first
    made = (tmp_path / "trial" / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    second = trial.work(given.model_copy(update={"parts": ["validation", "test"], "train_questions": 2}))
    assert (tmp_path / "trial" / "run" / "adapter_model.safetensors").stat().st_mtime_ns == made
    assert second.parts["validation"] == first.parts["validation"]
    assert set(second.parts) == {"train", "validation", "test"}
    assert second.training.final_loss == first.training.final_loss
    assert second.overrides == ["method.memory=balanced"]


def test_a_run_begun_otherwise_is_set_aside(tmp_path: Path) -> None:
    given = job(tmp_path, after={}, parts=[])
    trial.work(given)
    before = (tmp_path / "trial" / "run" / "recipe.yaml").read_text()
    (tmp_path / "trial" / "run.2").mkdir()  # an earlier one, of which somebody removed the first
    (tmp_path / "trial" / "run.2" / "recipe.yaml").touch()
    result = trial.work(given.model_copy(update={"loss_every": 1}))
    assert any("eval_loss" in entry for entry in result.log)
    assert (tmp_path / "trial" / "run.1" / "recipe.yaml").read_text() == before
    (tmp_path / "trial" / "run" / "metrics.json").unlink()  # as if it had been killed
    trial.work(given)
    assert sorted(path.name for path in (tmp_path / "trial").glob("run*")) == ["run", "run.1", "run.2"]


def test_data_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = job(tmp_path, parts=["validation", "test"], train_questions=2, after={})
    read = []
    whole = runs._whole_data
    monkeypatch.setattr(runs, "_whole_data", lambda recipe: read.append(recipe) or whole(recipe))
    trial.work(given)
    assert len(read) == 1


@pytest.mark.parametrize(("questions", "kept"), [(5, False), (100, True)])
def test_all_training_questions_are_a_result_of_the_run(tmp_path: Path, questions: int, kept: bool) -> None:
    given = job(tmp_path, parts=[], train_questions=questions, after={"bound": {"delta": 0.1}})
    result = trial.work(given)
    assert (tmp_path / "trial" / "run" / "answers-train.jsonl").exists() is kept
    assert result.parts["train"].tuned.examples == min(questions, 6)
    found = result.after["bound"]
    assert found["delta"] == 0.1 if kept else "maskft evaluate the run" in found["not_done"]


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    given = job(tmp_path, "data.split.test=0.0", parts=["test"])
    with pytest.raises(StudyError, match="the data has no test part; it has train, validation"):
        trial.work(given)


def test_what_goes_wrong_is_in_the_output(tmp_path: Path) -> None:
    path = tmp_path / "trial" / "job.json"
    path.parent.mkdir()
    path.write_text(job(tmp_path, "model.base=/none/such").model_dump_json())
    with Processes(tmp_path / "errors.txt") as processes:
        assert processes.run(path, {}, lambda: True) == trial.MISTAKE
        path.write_text("{}")
        assert processes.run(path, {}, lambda: True) == trial.FAULT
    said = (tmp_path / "trial" / "output.txt").read_text()
    assert "maskft: model.base is '/none/such'" in said
    assert "Traceback" in said


def test_where_forking_is_not_safe_a_process_takes_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FORKS", False)
    monkeypatch.setattr(process, "POLL", 0.05)
    (tmp_path / "job.json").write_text("{}")
    with Processes(tmp_path / "errors.txt") as processes:
        assert processes.run(tmp_path / "job.json", {}, lambda: True) == trial.FAULT
        (known,) = processes._started.values()
        assert known.over()


def test_a_process_that_cannot_start(tmp_path: Path) -> None:
    with (
        Processes(tmp_path / "errors.txt") as processes,
        pytest.raises(StudyError, match="the process that starts trials ended"),
    ):
        processes.run(tmp_path / "job.json", {"PYTHONHOME": str(tmp_path)}, lambda: True)
    assert (tmp_path / "errors.txt").read_text()


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"study": "x"}))
    with pytest.raises(StudyError, match="is not a study's result"):
        read_results(tmp_path)
    made = trial.work(job(tmp_path / "j", parts=[], after={}))
    with pytest.raises(StudyError, match="chosen by accuracy"):
        made.value("accuracy")


def test_the_peak_is_of_the_process_that_trained(tmp_path: Path) -> None:
    first = trial._peak_of_training(tmp_path, finished=False)
    assert first > 1e7
    (tmp_path / "peak.json").write_text("5")
    assert trial._peak_of_training(tmp_path, finished=True) == 5
    assert trial._peak_of_training(tmp_path, finished=False) >= first
    assert json.loads((tmp_path / "peak.json").read_text()) >= first
