"""Every study of the repository runs from its file to its page, at toy size. `make studies-smoke` runs this file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from maskft.report.study_pages import made
from maskft.studies.definition import cells, load_study
from maskft.studies.work import run_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_runs(path: Path, tmp_path: Path) -> None:
    outcome = run_study(path, tmp_path / "out", toy=True)
    assert outcome.failures == {}
    study = load_study(path)
    assert {r.variant for r in outcome.results if r.stage == "run"} == set(study.variants)
    assert len([r for r in outcome.results if r.stage == "run"]) == len(cells(study, {}, toy=True))

    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("../recipes", str(path.parents[1] / "recipes")))
    (tmp_path / path.stem).mkdir()
    shutil.copytree(tmp_path / "out" / "results", tmp_path / path.stem / "results")
    page = made(copy, tmp_path / "docs")[tmp_path / "docs" / f"{path.stem}.md"]
    assert page.startswith(f"# {study.title}\n")
    assert "not run" in page.lower()  # toy runs leave cells out, and the page says so
