"""Tables of measurements in the docs are those of the committed files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_committed_measurements(tables) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.render(page), "run: python benchmarks/tables.py"
    for name in tables.TABLES:
        assert f"<!-- {name} -->" in page


def test_the_plans_page_shows_the_committed_measurements(tables) -> None:
    page = tables.PLAN.read_text(encoding="utf-8")
    assert page == tables.render(page, tables.PLAN_TABLES), "run: python benchmarks/tables.py"
    ratios = [float(row["ratio"]) for row in tables.read("plan_check.csv")]
    assert len(ratios) >= 8
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios)


def test_of_several_measurements_the_last_counts(tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.csv").write_text("method,peak_bytes,bytes_per_weight\na,1048576,9\nb,2097152,4\na,3145728,8\n")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    page = "x\n<!-- memory.csv -->\nold\n<!-- end -->\ny\n"
    assert tables.render(page) == (
        "x\n<!-- memory.csv -->\n\n| peak | MiB of the process | bytes per adapted weight |\n| --- | ---: | ---: |\n"
        "| a | 3 | 8 |\n| b | 2 | 4 |\n\n<!-- end -->\ny\n"
    )
