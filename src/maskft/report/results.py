"""Results as committed: one JSON file a run, under `studies/`, and the README's tables made of them.

python -m maskft.report.results keep runs/demo studies/quickstart/normalized-seed0.json
python -m maskft.report.results readme studies README.md
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskft.errors import RunError
from maskft.report.study_rows import rows
from maskft.report.study_summary import finished
from maskft.runs import read_metrics, run_recipe, write_atomically, write_json
from maskft.studies.definition import load_study
from maskft.studies.results import read_results

_BLOCK = r"(<!-- {0} -->\n).*?(<!-- /{0} -->)"


def keep(run: Path, out: Path) -> None:
    """Copy a finished and evaluated run's recipe, metrics and environment into one file.

    Raises:
        RunError: the run hasn't been evaluated, or `out` exists: a published result is not edited.
    """
    metrics = read_metrics(run)
    if "tuned" not in metrics:
        raise RunError(f"{run} has no test result; run: maskft evaluate {run}")
    if out.exists():
        raise RunError(f"{out} exists, and a published result is not edited. Give another name.")
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    write_json(out, {"recipe": run_recipe(run).model_dump(mode="json"), "metrics": metrics, "environment": environment})


def results(folder: Path) -> list[dict[str, Any]]:
    """All results of a study, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def quickstart_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table: the base, what can be guessed without the image, and each gate over its seeds."""
    first = found[0]["metrics"]
    lines = [
        f"| embedded base on easy-VQA, {first['test_examples']} held-out questions | exact match | seeds "
        "| trained, of the base's parameters | training time |",
        "|---|---|---|---|---|",
        f"| base | {_percent(first['base']['accuracy'])} % | | | |",
        f"| best guess without the image | {_percent(first['blind']['accuracy'])} % | | | |",
    ]
    gates = sorted({r["recipe"]["method"]["gate"] for r in found}, key=lambda gate: (gate != "soft", gate))
    for gate in gates:
        of_gate = [r["metrics"] for r in found if r["recipe"]["method"]["gate"] == gate]
        shares = [metrics["tuned"]["accuracy"] for metrics in of_gate]
        train = of_gate[0]["train"]
        seconds = statistics.median(metrics["train"]["seconds"] for metrics in of_gate)
        name = {"soft": "soft (as published)"}.get(gate, gate)
        lines.append(
            f"| S-MFT, gate {name} | {_percent(statistics.mean(shares))} % "
            f"({_percent(min(shares))} to {_percent(max(shares))}) | {len(shares)} "
            f"| {_percent(train['trainable_parameters'] / train['base_parameters'])} % | {seconds / 60:.1f} min |"
        )
    return "\n".join(lines) + "\n"


def comparison_table(study: Path) -> str:
    """Markdown table of a study's file: what has been run with every seed, by method and data set."""
    defined = load_study(study)
    done = read_results(study.with_suffix("") / "results")
    return "".join(f"{line}\n" for line in finished(defined, rows(defined, done)))


def with_table(readme: str, name: str, table: str) -> str:
    """`readme` with the text between the markers of that name replaced.

    Raises:
        RunError: there are no markers.
    """
    replaced, count = re.subn(_BLOCK.format(name), lambda match: match[1] + table + match[2], readme, flags=re.DOTALL)
    if count != 1:
        raise RunError(f"expected one block between <!-- {name} --> and <!-- /{name} -->.")
    return replaced


def with_tables(readme: str, studies: Path) -> str:
    """`readme` with the tables of the quick start and of the comparison."""
    told = with_table(readme, "results", quickstart_table(results(studies / "quickstart")))
    return with_table(told, "compare", comparison_table(studies / "compare.yaml"))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    command, source, target = arguments
    if command == "keep":
        keep(Path(source), Path(target))
    else:
        readme = Path(target)
        write_atomically(readme, with_tables(readme.read_text(encoding="utf-8"), Path(source)))


if __name__ == "__main__":
    main(sys.argv[1:])
