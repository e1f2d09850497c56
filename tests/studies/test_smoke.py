"""Every study of the repository runs from its file to its page, at toy size. `make studies-smoke` runs this file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from maskft.report.study_pages import made
from maskft.studies.definition import cells, load_study
from maskft.studies.work import run_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
SOON = ("attribution", "time")
"""Studies of few runs; a run takes ten seconds of processor time. The others are left to `make studies-smoke`."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in SOON else pytest.mark.slow) for path in STUDIES],
)
def test_a_study_runs(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # each trial would compile anew, which takes longer than it trains
    shared = tmp_path_factory.getbasetemp() / "toy-base"  # made by the first study, for all of them
    if shared.exists():
        shutil.copytree(shared, tmp_path / "out" / "toy-base")
    outcome = run_study(path, tmp_path / "out", toy=True)
    if not shared.exists():
        shutil.copytree(tmp_path / "out" / "toy-base", shared)
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
