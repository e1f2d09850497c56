"""Studies from their file to their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import StudyError
from maskft.studies import process
from maskft.studies.results import Result, best, final_loss, packed_outcomes, read_results
from maskft.studies.trial import portable
from maskft.studies.work import Outcome, run_study
from tests.studies.made import write_study
from tests.test_cli import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> tuple[Path, Outcome]:
    """A study with tuning, axis, choice on validation and analyses."""
    file = write_study(
        folder,
        vary={"method.init_gate": {"values": [0.9, 0.98], "variants": ["soft"]}},
        seeds=[0],
        tune={
            "parameters": {"training.learning_rate": {"low": 0.01, "high": 0.1, "log": True}},
            "trials": 2,
            "by_variant": {"centered": {}},
        },
        measure={"test": "chosen", "train_questions": 4, "last_steps": 1, "loss_every": 1, "loss_rows": 2},
        after=["masks", "gates", "drift"],
    )
    return file, run_study(file, folder / "out")


def by_name(outcome: Outcome) -> dict[str, Any]:
    return {f"{r.stage} {r.variant} {r.settings.get('method.init_gate', '')}".strip(): r for r in outcome.results}


def test_every_cell_has_a_result(tuned: tuple[Path, Outcome]) -> None:
    outcome = tuned[1]
    assert outcome.failures == {}
    assert sorted((r.stage, r.variant) for r in outcome.results) == [
        ("run", "centered"),
        ("run", "soft"),
        ("run", "soft"),
        ("tune", "soft"),
        ("tune", "soft"),
    ]
    assert read_results(outcome.output / "results") == sorted(
        outcome.results,
        key=lambda r: (r.stage == "tune", r.variant, r.settings.get("method.init_gate", 0), str(r.tuned)),
    )


def test_tuning_chooses_on_validation(tuned: tuple[Path, Outcome]) -> None:
    outcome = tuned[1]
    trials = [r for r in outcome.results if r.stage == "tune"]
    assert {r.tuned["training.learning_rate"] for r in trials} == {0.01, 0.1}
    assert all(set(r.parts) == {"validation"} for r in trials)
    chosen = trials[best(trials, "accuracy")].tuned
    assert outcome.tuned == {("soft", ""): chosen}
    assert all(r.tuned == chosen for r in outcome.results if r.stage == "run" and r.variant == "soft")
    assert all(r.recipe["training"].get("learning_rate") is None for r in outcome.results if r.variant == "centered")


@pytest.mark.parametrize(
    ("choose", "trials", "chosen"),
    [
        ("accuracy", [(0.800, 0.214), (0.798, 0.209), (0.642, 0.417)], 1),  # one question of 400 says nothing
        ("accuracy", [(0.810, 0.228), (0.788, 0.222)], 0),  # a standard error is 0.0196
        ("accuracy", [(0.788, 0.222), (0.795, 0.230), (0.810, 0.225)], 2),
        ("accuracy", [(1.0, 0.3), (0.9975, 0.1)], 0),  # the best is certain of itself
        ("accuracy", [(1.0, 0.3), (1.0, 0.1)], 1),
        ("loss", [(0.800, 0.214), (0.642, 0.209)], 1),
    ],
)
def test_what_few_questions_cannot_tell_apart_the_loss_does(
    tuned: tuple[Path, Outcome], choose: str, trials: list[tuple[float, float]], chosen: int
) -> None:
    measured = next(result for result in tuned[1].results if result.stage == "tune")
    assert best([with_outcome(measured, accuracy, loss) for accuracy, loss in trials], choose) == chosen


def with_outcome(result: Result, accuracy: float, loss: float) -> Result:
    """A result with that accuracy on 400 validation questions, and that training loss."""
    part = result.parts["validation"]
    score = part.tuned.model_copy(update={"accuracy": accuracy, "examples": 400})
    training = result.training.model_copy(update={"final_loss": loss})
    return result.model_copy(
        update={"parts": {"validation": part.model_copy(update={"tuned": score})}, "training": training}
    )


def test_only_chosen_runs_answer_the_test(tuned: tuple[Path, Outcome]) -> None:
    runs = [r for r in tuned[1].results if r.stage == "run" and r.variant == "soft"]
    best = max(r.value("accuracy") for r in runs)
    for run in runs:
        assert ("test" in run.parts) == (run.value("accuracy") == best)


def test_a_result_says_what_was_measured_with_what(tuned: tuple[Path, Outcome]) -> None:
    result = by_name(tuned[1])["run centered"]
    validation, training = result.parts["validation"], result.training
    assert validation.tuned.examples == len(validation.outcomes) == 3
    assert validation.tuned.correct == sum(validation.scores())
    assert validation.answer_types is not None
    assert set(validation.answer_types) <= set("yno")
    assert len(validation.answer_types) == 3
    assert result.parts["train"].tuned.examples == 4
    assert training.steps == 2
    assert training.final_loss == [entry["loss"] for entry in result.log if "loss" in entry][1]
    assert training.peak_memory > 1e7
    assert training.trainable_parameters > 0
    assert result.packages["torch"]
    assert len(result.data_fingerprint) == len(result.base_fingerprint) == 64
    assert result.after["gates"][-1]["step"] == 2
    assert set(result.after["gates"][-1]) == {"step", "overall"}
    assert result.after["masks"][0]["gates"] > 0
    assert "has 0 checkpoint(s)" in result.after["drift"]["not_done"]


def test_the_loss_on_validation_is_watched_in_runs_alone(tuned: tuple[Path, Outcome]) -> None:
    for result in tuned[1].results:
        losses = [(entry["eval_loss"], entry["epoch"]) for entry in result.log if "eval_loss" in entry]
        assert len(losses) == (2 if result.stage == "run" else 0)
        assert result.best_epoch() == (min(losses)[1] if losses else None)


def test_watching_changes_nothing_of_a_run(folder: Path) -> None:
    runs = []
    for name, measure in {"plain": {"last_steps": 1}, "watched": {"last_steps": 1, "loss_every": 1}}.items():
        file = write_study(folder / name, variants={"soft": {}}, seeds=[0], measure=measure)
        results, written = folder / name / "out" / "results", []
        runs += run_study(
            file, results.parent, progress=lambda *_, at=results, seen=written: seen.append(len(list(at.glob("*"))))
        ).results
        assert written == [0, 0, 1]  # after tuning, before the run and after it: it is there before the study's end
    plain, watched = runs
    assert plain.best_epoch() is None
    assert watched.best_epoch() is not None
    assert plain.training.final_loss == watched.training.final_loss
    assert plain.parts["validation"].outcomes == watched.parts["validation"].outcomes


def test_the_base_is_asked_once(tuned: tuple[Path, Outcome]) -> None:
    asked = sorted((tuned[1].output / "shared").glob("answers-*.json"))
    assert len(asked) == 3  # train, validation, test
    assert {len(json.loads(path.read_text())) for path in asked} == {3, 4}


def test_a_repeated_call_runs_nothing_again(tuned: tuple[Path, Outcome]) -> None:
    file, before = tuned
    started = time.monotonic()
    seen: list[tuple[str, int, int]] = []
    after = run_study(file, before.output, progress=lambda *told: seen.append(told))
    assert time.monotonic() - started < 20
    assert after.results == before.results
    assert after.tuned == before.tuned
    assert seen[0] == ("tuning", 2, 2)
    assert seen[-1][1] == seen[-1][2] >= 2  # tests, of centered and of the best start of soft


def test_failures_are_told_and_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    file = write_study(
        folder / "bad",
        variants={"good": {}, "lost": {"data.image_root": str(folder / "none")}, "odd": {"training.adam_beta1": 2.0}},
        seeds=[0],
        after=["masks"],
        measure={"validation": False},
    )
    assert call(monkeypatch, "study", file, "--output", folder / "bad-out", "--json") == 2
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert [run["variant"] for run in told["runs"]] == ["good"]
    assert set(told["failures"]) == {"lost.seed0", "odd.seed0"}
    assert "2 of 3 runs failed. The same command tries them again." in err
    mended = json.loads(file.read_text())
    del mended["variants"]["lost"], mended["variants"]["odd"], mended["environment"]
    file.write_text(json.dumps(mended))
    assert call(monkeypatch, "study", file, "--output", folder / "bad-out") == 0


def test_mistakes_are_told_before_the_first_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    file = write_study(folder / "wrong", variants={"a": {"method.gat": "soft"}})
    assert call(monkeypatch, "study", file, "--output", folder / "wrong-out") == 2
    assert "unknown key 'method.gat'" in capfd.readouterr().err
    file = write_study(folder / "wrong", after=["mask"])
    with pytest.raises(StudyError, match=r"there is no analysis 'mask'\. Did you mean 'masks'"):
        run_study(file, folder / "wrong-out2")
    file = write_study(folder / "wrong", recipe="none.yaml")
    with pytest.raises(StudyError, match="has no section tune"):
        run_study(file, folder / "wrong-out3", trials=2)
    with pytest.raises(StudyError, match="cannot read the recipe"):
        run_study(file, folder / "wrong-out3")


def test_bad_trials_are_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "POLL", 0.1)
    whole = {"training.per_device_train_batch_size": 6, "training.max_steps": 40, "training.logging_steps": 5}
    file = write_study(
        folder / "pruned",
        variants={"soft": whole},
        tune={"parameters": {"training.learning_rate": [0.1, 0.05, 1e-9]}, "trials": 3, "pruner": "median"},
        seeds=[0],
    )
    outcome = run_study(file, folder / "pruned-out", only_tune=True)
    assert [result.tuned["training.learning_rate"] for result in outcome.results] == [0.1, 0.05]


def test_seeds_are_compared(folder: Path) -> None:
    file = write_study(folder / "seeds", variants={"soft": {}}, across=["agreement"], measure={"test": "none"})
    outcome = run_study(file, folder / "seeds-out")
    assert [r.seed for r in outcome.results] == [0, 1]
    (row,) = json.loads((outcome.output / "across.json").read_text())
    assert row["variant"] == "soft"
    assert 0 < row["found"]["agreement"]["by_chance"] < 1
    assert not any(str(folder) in str(value) for value in row["found"]["agreement"]["runs"])
    projectors = {"projector": {"method": {"name": "projector"}}}
    file = write_study(folder / "seeds", variants=projectors, across=["agreement"], measure={"test": "none"})
    (row,) = json.loads((run_study(file, folder / "seeds-out").output / "across.json").read_text())
    assert row["found"]["agreement"]["not_done"].startswith("a run has no mask")
    wrong = write_study(folder / "seeds", across=["agreements"])
    with pytest.raises(StudyError, match=r"Did you mean 'agreement'\?"):
        run_study(wrong, folder / "seeds-out2")


def test_a_failed_trial_of_tuning_is_told_and_the_others_decide(folder: Path, caplog: Any) -> None:
    tuning = {"parameters": {"training.adam_beta1": [0.9, 2.0]}, "trials": 2}
    file = write_study(folder / "odd", variants={"soft": {}}, tune=tuning, seeds=[0])
    outcome = run_study(file, folder / "odd-out", only_tune=True)
    assert outcome.tuned == {("soft", ""): {"training.adam_beta1": 0.9}}
    assert "1 trials of tuning soft failed. The first error: " in caplog.text
    worse = write_study(
        folder / "odd2", variants={"soft": {}}, tune={**tuning, "parameters": {"training.adam_beta1": [2.0]}}
    )
    with pytest.raises(StudyError, match="no trial of tuning soft came to its end"):
        run_study(worse, folder / "odd2-out")


def test_an_interrupted_worker_leaves_its_cell_to_the_next(folder: Path) -> None:
    file = write_study(
        folder / "long",
        variants={"soft": {"training.max_steps": 150, "training.logging_steps": 25, "training.save_strategy": "steps"}},
        seeds=[0],
        measure={"validation": False, "test": "none"},
    )
    out = folder / "long-out"
    command = [sys.executable, "-m", "maskft.cli", "study", str(file), "--output", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    (log,) = _appears(out, "trials/*/run/log.json")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped; the same command goes on from there" in err.decode()
    assert list(log.parent.glob("checkpoints/checkpoint-*"))
    shorter = run_study(file, out).results
    assert [r.training.steps for r in shorter] == [150]
    assert (shorter[0].training.resumed_from_step or 0) > 0


def _appears(folder: Path, pattern: str) -> list[Path]:
    for _ in range(600):
        if found := list(folder.glob(pattern)):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{pattern} did not appear in {folder}: {os.listdir(folder)}")


def test_results_hold_no_paths_of_the_machine(tuned: tuple[Path, Outcome]) -> None:
    for path in (tuned[1].output / "results").glob("*.json"):
        assert str(tuned[0].parent) not in path.read_text()
    here = str(Path.cwd() / "data" / "x.json")
    assert portable({"a": [here, "/far/away.json", "kept", 1]}) == {"a": ["data/x.json", "away.json", "kept", 1]}


def test_final_loss_and_outcomes() -> None:
    log = [{"step": step, "loss": float(step)} for step in (10, 20, 30)] + [{"step": 30, "train_runtime": 1.0}]
    assert final_loss(log, 20) == 25.0
    assert final_loss([], 20) is None
    assert packed_outcomes([1.0, 0.0]) == "10"
    assert packed_outcomes([1.0, 0.5]) == "1 0.5"


def test_one_data_set_tunes_for_all_and_weights_make_room(tmp_path: Path) -> None:
    file = write_study(
        tmp_path,
        variants={"soft": {"method.gate": "soft"}},
        data={"a": {}, "b": {"data.share": 0.5}},
        seeds=[0],
        tune={"parameters": {"training.learning_rate": [0.01, 0.1]}, "trials": 2, "data": "b"},
        measure={"validation": False, "last_steps": 1},
        keep_weights=False,
    )
    outcome = run_study(file, tmp_path / "out")
    trials = [result for result in outcome.results if result.stage == "tune"]
    assert [result.data for result in trials] == ["b", "b"]
    assert outcome.tuned[("soft", "a")] == outcome.tuned[("soft", "b")]
    assert {result.data for result in outcome.results if result.stage == "run"} == {"a", "b"}
    assert list(outcome.output.rglob("trials/*/run/metrics.json"))
    assert not list(outcome.output.rglob("trials/*/run/*.safetensors"))
    repeated = run_study(file, tmp_path / "out")
    assert repeated.results == outcome.results


def test_checkpoints_make_room_and_what_was_learnt_stays(tmp_path: Path) -> None:
    saving = {"training.save_strategy": "steps", "training.save_steps": 1, "training.save_total_limit": 2}
    file = write_study(
        tmp_path, variants={"soft": saving}, seeds=[0], after=["drift"], measure={"test": "none"}, keep_weights="final"
    )
    outcome = run_study(file, tmp_path / "out")
    assert [len(result.after["drift"]["checkpoints"]) for result in outcome.results] == [2]
    assert list(outcome.output.rglob("trials/*/run/adapter_model.safetensors"))
    assert not list(outcome.output.rglob("checkpoint-*"))
