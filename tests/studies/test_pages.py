"""Pages of studies: made of committed files alone, and they say what was not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from maskft.errors import StudyError
from maskft.report.study_pages import made, relative_step, write_pages
from maskft.studies.definition import load_study
from maskft.studies.results import Result, read_results, write_result
from tests.test_cli import call

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "results"
COMMITTED = [path for path in sorted((ROOT / "studies").glob("*.yaml")) if (path.with_suffix("") / "results").is_dir()]

COSTS = ("final loss", "trained", "step", "memory", "runs")


def score(correct: int, of: int) -> dict[str, Any]:
    return {"accuracy": correct / of, "low": 0.1, "high": 0.9, "correct": correct, "examples": of}


def result(variant: str, seed: int, *, correct: int = 3, **changes: Any) -> Result:
    part = {
        "tuned": score(correct, 4),
        "base": score(0, 4),
        "blind": score(1, 4),
        "outcomes": "1110" if correct == 3 else "1100",
    }
    return Result.model_validate(
        {
            "study": "s",
            "stage": "run",
            "variant": variant,
            "data": "",
            "settings": {},
            "tuned": {},
            "seed": seed,
            "overrides": [],
            "environment": {},
            "recipe": {"data": {"kind": "easy-vqa"}, "method": {"name": "mask", "gate": "soft"}, "training": {}},
            "metric": "exact",
            "parts": {"train": {**part, "tuned": score(4, 4), "outcomes": "1111"}, "test": part},
            "training": {
                "steps": 2,
                "epochs": 1.0,
                "examples": 4,
                "loss": 1.0,
                "final_loss": 0.5 + seed,
                "trainable_parameters": 1000,
                "base_parameters": 2000,
                "seconds": 3.0,
                "step_seconds": 1.5,
                "resumed_from_step": None,
                "peak_memory": 2_000_000_000,
            },
            "log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0 + seed}],
            "after": {},
            "wall_seconds": 360.0,
            "packages": {"torch": "2"},
            "python": "3.11",
            "machine": {"processor": "x86_64", "cores": 2},
            "commit": "abc1234",
            "data_fingerprint": "0",
            "base_fingerprint": "0",
            **changes,
        }
    )


def pages(folder: Path, results: list[Result], **content: Any) -> dict[str, str]:
    """The page and picture of a study with these results."""
    study = {"title": "A study", "recipe": "r.yaml", "variants": {"a": {}, "b": {}}, "seeds": [0, 1], **content}
    (folder / "s.yaml").write_text(json.dumps(study))
    for number, one in enumerate(results):
        write_result(folder / "s" / "results" / f"{number}.json", one)
    return {path.name: text for path, text in made(folder / "s.yaml", folder / "docs").items()}


def line(page: str, start: str) -> list[str]:
    return [cell.strip() for cell in next(one for one in page.splitlines() if one.startswith(start)).split("|")[1:-1]]


def test_committed_pages_are_those_of_committed_results() -> None:
    """To mend it: python -m maskft.report.study_pages studies docs/results"""
    expected = {page: text for study in COMMITTED for page, text in made(study, PAGES).items()}
    assert {page: page.read_text(encoding="utf-8") for page in PAGES.glob("*")} == expected


def test_committed_pages_are_on_the_site_and_in_the_readme() -> None:
    named = {f"results/{study.stem}.md" for study in COMMITTED}
    assert named == set(re.findall(r"results/[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == set(re.findall(r"results/[\w-]+\.md", (ROOT / "README.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize(("base", "variant", "refused"), [("x/y", "b", True), ("y", "a", True), ("y", "b", False)])
def test_runs_of_different_bases_are_on_no_page(tmp_path: Path, base: str, variant: str, refused: bool) -> None:
    found = [result("a", 0), result(variant, 1).model_copy(update={"base_fingerprint": "0" * 64})]
    found = [one.model_copy(update={"recipe": {**one.recipe, "model": {"base": base}}}) for one in found]
    if not refused:  # a name alone may be of two bases
        assert pages(tmp_path, found)
        return
    with pytest.raises(StudyError, match=r"seed1\.json the base has other weights than in the run a\.seed0; no"):
        pages(tmp_path, found)


def test_a_table_says_when_the_validation_loss_was_lowest(tmp_path: Path) -> None:
    losses = [{"step": 1, "epoch": 0.5, "eval_loss": 1.0}, {"step": 2, "epoch": 1.0, "eval_loss": 2.0}]
    page = pages(tmp_path, [result("a", 0, log=losses), result("a", 1, log=losses[1:])])["s.md"]
    assert line(page, "| variant")[4] == "lowest validation loss"
    assert line(page, "| a ")[4] == "0.750 of 1.000 epochs"


def test_several_data_sets_have_a_short_table(tmp_path: Path) -> None:
    data = {"x": {}, "y": {}}
    ran = [("a", 0, "x", 3), ("a", 1, "x", 3), ("b", 0, "x", 2), ("b", 1, "x", 3), ("a", 0, "y", 2)]
    found = [result(variant, seed, correct=correct, data=name) for variant, seed, name, correct in ran]
    page = pages(tmp_path, found, data=data)["s.md"]
    assert line(page, "| method") == ["method", "trained", "x", "y"]
    assert line(page, "| base") == ["base, not trained", "", "0.0 %", "0.0 %"]
    assert line(page, "| best guess") == ["best guess without the image", "", "25.0 %", "25.0 %"]
    a, b = line(page, "| a | 50"), line(page, "| b | 50")
    assert a[1] == "50.00%"
    assert a[2].startswith("**75.0 %** (")
    assert a[3] == "50.0 % (10.0 to 90.0, 1 of 2 runs)"
    assert b[2].startswith("62.5 % (")
    assert b[3] == "not run"


def test_a_table_of_means_and_of_what_was_not_run(tmp_path: Path) -> None:
    page = pages(tmp_path, [result("a", 0), result("a", 1, correct=2)], question="Which?", paper_scale="Much.")["s.md"]
    assert page.startswith("# A study\n\nWhich?\n")
    assert line(page, "| variant") == ["variant", "train", "test", "train minus test", *COSTS]
    cells = line(page, "| a ")
    assert cells[1] == "100.0 % (100.0 to 100.0)"
    assert cells[2].startswith("62.5 % (")
    assert cells[3] == "+37.5"
    assert cells[4:] == ["1.0000 (0.5000 to 1.5000)", "1,000", "1.50 s", "2.00 GB", "2"]
    assert line(page, "| b ") == ["b", *["not run"] * 7, "0 of 2"]
    assert "Not run yet: 2 of 4 runs." in page
    assert "maskft study studies/s.yaml" in page
    assert "2 runs, 0.2 hours in all, on x86_64 with 2 cores; commit abc1234; torch 2." in page
    assert "train 0.0 %, blind guess 25.0 %" in page
    assert page.endswith("## At the size of a paper\n\nMuch.\n")


def test_axes_data_and_tuned_values_have_columns(tmp_path: Path) -> None:
    one = result("a", 0, data="x", settings={"method.init_gate": 0.9}, tuned={"training.learning_rate": 0.01})
    tried = result("a", 0, data="x", stage="tune")
    page = pages(
        tmp_path, [one, tried], vary={"method.init_gate": [0.9, 0.98]}, data={"x": {}}, seeds=[0], variants={"a": {}}
    )["s.md"]
    assert line(page, "| variant")[:4] == ["variant", "data", "init_gate", "learning_rate"]
    assert line(page, "| a | x | 0.9 ")[3] == "0.01"
    assert line(page, "| a | x | 0.98 ")[3] == "not run"
    assert "1 runs and 1 of tuning" in page


@pytest.mark.parametrize("plot", [None, "step", "rho", "gap", "drift", "training.max_steps"])
def test_pictures(tmp_path: Path, plot: str | None) -> None:
    axis = {"training.max_steps": [1, 2]}
    after = {"drift": {"checkpoints": [{"step": 1, "correlation": 0.5}, {"step": 2, "correlation": 1.0}]}}
    runs = [result(v, s, settings={"training.max_steps": n}, after=after) for v in "ab" for s in (0, 1) for n in (1, 2)]
    found = pages(tmp_path, runs, plot=plot, vary=axis)
    assert "![A study](s.svg)" in found["s.md"]
    root = ElementTree.fromstring(found["s.svg"])
    texts = " ".join("".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert {"step": "training loss", "gap": "minus", "drift": "correlation"}.get(plot or "", "accuracy") in texts


@pytest.mark.parametrize(("values", "axis"), [([1, 2], "x.y"), ([0.01, 0.1, 1.0], "log10 of x.y")])
def test_a_picture_of_a_setting_shows_intervals(tmp_path: Path, values: list[float], axis: str) -> None:
    runs = [result("a", 0, settings={"x.y": value}) for value in values]
    drawn = ElementTree.fromstring(pages(tmp_path, runs, plot="x.y", vary={"x.y": values})["s.svg"])
    tag = "{http://www.w3.org/2000/svg}"
    assert axis in ["".join(text.itertext()) for text in drawn.iter(f"{tag}text")]
    assert sum(line.get("stroke-width") == "1" and "stroke" in line.attrib for line in drawn.iter(f"{tag}line")) == len(
        values
    )


def test_a_picture_has_what_answered_the_same_questions_together(tmp_path: Path) -> None:
    found = pages(tmp_path, [result(v, 0, data=d) for v in "ab" for d in ("y", "x")], data={"y": {}, "x": {}})
    told = [f"<title>{variant} {data}: " for data in "yx" for variant in "ab"]
    places = [found["s.svg"].index(text) for text in told]
    assert places == sorted(places)


def test_a_study_without_results_has_a_page(tmp_path: Path) -> None:
    found = pages(tmp_path, [])
    assert list(found) == ["s.md"]
    assert "Not run yet: 4 of 4 runs." in found["s.md"]


def test_findings_are_taken_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "findings.md").write_text("It is so.\n")
    assert "\nIt is so.\n" in pages(tmp_path, [result("a", 0)])["s.md"]


def test_relative_steps() -> None:
    def of(**method: Any) -> float | None:
        recipe = {
            "data": {"kind": "easy-vqa"},
            "method": {"name": "mask", **method},
            "training": {"learning_rate": 0.1},
        }
        return relative_step(result("a", 0, recipe=recipe))

    assert of(gate="soft", init_gate=0.98) == pytest.approx(0.002)
    assert of(gate="centered") == pytest.approx(0.05)
    assert of(gate="topk") is None
    assert relative_step(result("a", 0, recipe={"data": {"kind": "easy-vqa"}, "method": {"name": "projector"}})) is None


def test_pages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pages(tmp_path, [result("a", 0)])
    (tmp_path / "other.yaml").write_text("no results, so no page")
    written = write_pages(tmp_path, tmp_path / "docs")
    assert [path.name for path in written] == ["s.md", "s.svg"]
    assert call(monkeypatch, "study", tmp_path / "s.yaml", "--page", tmp_path / "more", "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == [str(tmp_path / "more" / n) for n in ("s.md", "s.svg")]
    assert (tmp_path / "more" / "s.md").read_text() == written[0].read_text()
    assert load_study(tmp_path / "s.yaml").title == "A study"
    assert len(read_results(tmp_path / "s" / "results")) == 1
