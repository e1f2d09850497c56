"""Tables of what analyses found, whatever their names are."""

from __future__ import annotations

import json
from pathlib import Path

from maskft.report.study_found import numbers
from maskft.studies.results import Result
from tests.studies.test_pages import line, pages, result


def test_numbers_are_those_at_the_top() -> None:
    found = {"a": 1, "b": 0.5, "c": True, "d": None, "e": [1], "f": {"g": 1}, "run": "x"}
    assert numbers(found) == {"a": 1, "b": 0.5, "c": True}
    assert numbers([{"a": 1}]) == {}


def test_means_and_spread_over_seeds(tmp_path: Path) -> None:
    lost = {("a", 0): 0.1, ("a", 1): 0.3, ("b", 0): 0.05}
    runs = [
        result(v, s, after={"forgetting": {"nats_lost": nats, "tokens": 4080, "worse": s == 1, "steps": [1]}})
        for (v, s), nats in lost.items()
    ]
    runs.append(result("b", 1, after={"forgetting": {"not_done": "the run has no text."}}))
    page = pages(tmp_path, runs, after=["forgetting", "gates"])["s.md"]
    assert "\n## Forgetting\n" in page
    assert "## Gates" not in page
    section = page.partition("## Forgetting")[2]
    assert line(section, "| runs") == ["runs", "nats lost", "worse"]
    assert line(section, "| a ") == ["a", "0.2 (0.1 to 0.3)", "1 of 2"]
    assert line(section, "| b ") == ["b", "0.05", "0 of 1"]
    assert "The same in all runs: tokens 4,080." in section
    assert "Not done of 1 runs: the run has no text." in section


def test_accuracy_by_type_of_answer(tmp_path: Path) -> None:
    def typed(variant: str, seed: int, types: str | None) -> Result:
        made = result(variant, seed)  # its first three questions of four are right
        return made.model_copy(
            update={"parts": {"test": made.parts["test"].model_copy(update={"answer_types": types})}}
        )

    page = pages(tmp_path, [typed("a", 0, "yyoo"), typed("a", 1, "yyoo"), typed("b", 0, None)])["s.md"]
    section = page.partition("## By type of answer")[2]
    assert line(section, "| runs") == ["runs", "other, 2 questions", "yes/no, 2 questions"]
    assert line(section, "| a ") == ["a", "50.0 %", "100.0 %"]
    assert line(section, "| b ") == ["b", "not run", "not run"]


def test_one_type_of_answer_needs_no_table(tmp_path: Path) -> None:
    made = result("a", 0)
    only = made.model_copy(update={"parts": {"test": made.parts["test"].model_copy(update={"answer_types": "oooo"})}})
    assert "By type" not in pages(tmp_path, [only])["s.md"]


def test_lines_without_results_are_not_run(tmp_path: Path) -> None:
    runs = [result("a", s, after={"bound": {"bits": 10.0 + s}}) for s in (0, 1)]
    section = pages(tmp_path, runs, after={"bound": {"delta": 0.1}})["s.md"].partition("## Bound")[2]
    assert line(section, "| b ") == ["b", "not run"]


def test_the_same_numbers_everywhere_need_no_table(tmp_path: Path) -> None:
    runs = [result(v, s, after={"bound": {"says_something": False}}) for v in "ab" for s in (0, 1)]
    section = pages(tmp_path, runs, after=["bound"])["s.md"].partition("## Bound")[2].partition("##")[0]
    assert section.strip() == "The same in all runs: says something no."


def test_what_seeds_have_in_common_is_shown(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    alike = {"shared": 0.123456, "by_chance": 0.1, "pairs": []}
    entries = [
        {"variant": "a", "data": "", "settings": {"x": 1}, "found": {"agreement": alike}},
        {"variant": "b", "data": "", "settings": {"x": 1}, "found": {"agreement": {"shared": None, "by_chance": 0.1}}},
        {"variant": "c", "data": "", "settings": {}, "found": {"agreement": {"not_done": "a run has no mask."}}},
    ]
    (tmp_path / "s" / "across.json").write_text(json.dumps(entries))
    page = pages(tmp_path, [result("a", 0)])["s.md"]
    assert line(page, "| runs") == ["runs", "agreement: shared", "agreement: by chance"]
    assert line(page, "| a 1 ") == ["a 1", "0.1235", "0.1"]
    assert line(page, "| b 1 ") == ["b 1", "not run", "0.1"]
    assert "\nNot done in 1 lines: a run has no mask.\n" in page
