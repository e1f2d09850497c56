"""Analyses that studies ask for: their settings, and runs that they cannot be made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskft.errors import RunError, StudyError
from maskft.studies import after
from maskft.studies.definition import Study


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"forgeting": {}}, "there is no analysis 'forgeting'. Did you mean 'forgetting'?"),
        ({"forgetting": {"window": 4}}, "has no setting 'window'. Did you mean 'windows'? Allowed: windows."),
        ({"masks": {"images": 4}}, "the analysis masks has no setting 'images'. It has none."),
        ({"probes": {"images": 1.5}}, "after.probes.images is 1.5; it must be a whole number above 0."),
        ({"bound": {"delta": 0}}, "after.bound.delta is 0; it must be a number above 0."),
    ],
)
def test_mistakes_are_told_before_the_first_run(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError) as told:
        after.check_after(asked)
    assert message in str(told.value)


def test_settings_may_be_left_out() -> None:
    def asked(given: Any) -> dict[str, Any]:
        found = Study.model_validate({"title": "t", "recipe": "r", "variants": {"a": {}}, "after": given}).after
        after.check_after(found)
        return found

    assert asked(["bound", "masks"]) == {"bound": {}, "masks": {}}
    assert asked({"bound": {"delta": 0.1}, "drift": None}) == {"bound": {"delta": 0.1}, "drift": {}}


def test_what_cannot_be_made_is_said_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Path) -> None:
        raise RunError(f"{run} has no mask.")

    monkeypatch.setitem(after.ANALYSES, "bad", fails)
    monkeypatch.setitem(after.ANALYSES, "good", lambda run, *, times: {"name": run.name * times})
    said: list[str] = []
    found = after.analysed(tmp_path / "r", {"bad": {}, "good": {"times": 2}}, said.append)
    assert found == {"bad": {"not_done": "the run has no mask."}, "good": {"name": "rr"}}
    assert said == [f"bad was not done: {tmp_path / 'r'} has no mask."]
