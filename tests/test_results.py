"""Tables come from committed results and are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskft.errors import RunError
from maskft.report.results import comparison_table, keep, quickstart_table, results, with_table, with_tables
from maskft.studies.definition import load_study
from maskft.studies.results import read_results, write_named

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_tables(readme, ROOT / "studies") == readme


def test_the_comparison_shows_only_what_has_every_seed(tmp_path: Path) -> None:
    study = load_study(ROOT / "studies" / "compare.yaml")
    one = next(r for r in read_results(ROOT / "studies" / "compare" / "results") if r.stage == "run")
    (tmp_path / "compare.yaml").write_text((ROOT / "studies" / "compare.yaml").read_text())
    folder = tmp_path / "compare" / "results"
    for seed in study.seeds:
        assert comparison_table(tmp_path / "compare.yaml") == ""
        write_named(folder, one.model_copy(update={"variant": "lora", "settings": {}, "seed": seed}))
    lines = comparison_table(tmp_path / "compare.yaml").splitlines()
    assert lines[0] == f"| method | trained | {one.data} |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| base, not trained",
        "| best guess without the image",
        "| lora",
    ]
    assert "**" not in lines[-1]  # the best is only known once all have been run


def test_every_claim_of_quality_has_three_seeds() -> None:
    by_gate: dict[str, set[int]] = {}
    for result in results(ROOT / "studies" / "quickstart"):
        assert result["metrics"]["test_examples"] >= 300
        by_gate.setdefault(result["recipe"]["method"]["gate"], set()).add(result["recipe"]["training"]["seed"])
    assert by_gate
    assert all(len(seeds) >= 3 for seeds in by_gate.values())


def test_the_tuned_model_beats_its_base_by_ten_points_in_every_seed() -> None:
    for result in results(ROOT / "studies" / "quickstart"):
        metrics = result["metrics"]
        assert metrics["tuned"]["accuracy"] - metrics["base"]["accuracy"] >= 0.10


def test_a_table_is_made_of_its_results() -> None:
    def result(gate: str, accuracy: float) -> dict:
        train = {"trainable_parameters": 50, "base_parameters": 200, "seconds": 90.0}
        scores = {"base": {"accuracy": 0.1}, "blind": {"accuracy": 0.4}, "tuned": {"accuracy": accuracy}}
        metrics = {"test_examples": 300, "train": train, **scores}
        return {"recipe": {"method": {"gate": gate}}, "metrics": metrics}

    table = quickstart_table([result("normalized", 0.7), result("normalized", 0.8), result("soft", 0.6)])
    assert "300 held-out questions" in table
    assert "| base | 10.0 % | | | |" in table
    assert "| S-MFT, gate normalized | 75.0 % (70.0 to 80.0) | 2 | 25.0 % | 1.5 min |" in table
    assert table.index("soft (as published)") < table.index("normalized")


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(RunError, match="<!-- results -->"):
        with_table("# title\n", "results", "| a |\n")


def test_a_run_without_test_result_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="maskft evaluate"):
        keep(tmp_path, tmp_path / "out.json")
