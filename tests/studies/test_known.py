"""A study goes on from results that another database, or another machine, has made."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskft.errors import StudyError
from maskft.studies.results import read_results, write_named
from maskft.studies.work import Outcome, run_study
from tests.studies.made import write_study
from tests.test_cli import call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A study with tuning and a watched loss, finished."""
    folder = tmp_path_factory.mktemp("known")
    file = write_study(
        folder,
        variants={"soft": {"method.gate": "soft"}},
        tune={"parameters": {"training.learning_rate": [0.01, 0.1]}, "trials": 2},
        measure={"train_questions": 4, "last_steps": 1, "loss_every": 1, "loss_rows": 2},
    )
    return file, run_study(file, folder / "out")


def trained(output: Path) -> set[str]:
    return {folder.name.rpartition("-")[0] for folder in (output / "trials").glob("*")}


def test_known_runs_are_not_made_again(made: tuple[Path, Outcome], tmp_path: Path) -> None:
    file, first = made
    again = run_study(file, tmp_path, known=first.output / "results")
    assert trained(tmp_path) == set()
    assert again.results == first.results
    assert again.tuned == first.tuned
    assert read_results(tmp_path / "results") == read_results(first.output / "results")


def test_what_is_missing_or_made_otherwise_is_run(made: tuple[Path, Outcome], tmp_path: Path) -> None:
    file, first = made
    for result in first.results:
        if result.stage == "tune" or result.seed == 0:
            training = {**result.recipe["training"], **({} if result.stage == "tune" else {"warmup_steps": 1})}
            changed = result.model_copy(update={"recipe": {**result.recipe, "training": training}})
            write_named(tmp_path / "known", changed)
    again = run_study(file, tmp_path / "out", known=tmp_path / "known")
    assert trained(tmp_path / "out") == {"soft.seed0", "soft.seed1"}
    assert again.failures == {}
    assert len(again.results) == len(first.results)


@pytest.mark.parametrize(("field", "said"), [("base_fingerprint", "other weights"), ("data_fingerprint", "other rows")])
def test_runs_of_another_base_or_other_data_are_not_mixed(
    made: tuple[Path, Outcome], tmp_path: Path, field: str, said: str
) -> None:
    file, first = made
    known = [result for result in first.results if result.stage == "tune"]
    for result in known:
        write_named(tmp_path / "known", result.model_copy(update={field: "0" * 64}))
    again = run_study(file, tmp_path / "out", known=tmp_path / "known")
    assert sorted(again.failures) == ["soft.seed0", "soft.seed1"]
    assert all(said in error and "the run tune.soft" in error for error in again.failures.values())


def test_a_folder_without_results_is_refused(made: tuple[Path, Outcome], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"has no results\. Give --known a folder of a study's"):
        run_study(made[0], tmp_path / "out", known=tmp_path)


def test_the_command_takes_them(
    made: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, first = made
    known = str(first.output / "results")
    assert call(monkeypatch, "study", str(file), "--output", str(tmp_path), "--known", known) == 0
    assert "soft" in capsys.readouterr().out
    assert trained(tmp_path) == set()
