"""The tutorials' recipes are read, and the notebook runs and is shown with the outputs of its own cells."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskft.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOK = FOLDER / "quickstart.ipynb"
SCRIPT = ROOT / "docs" / "site" / "notebook.py"


def recipes() -> list[tuple[str, str]]:
    """(page, text) of every block that is a whole recipe."""
    found = [
        (page.name, text)
        for page in sorted(FOLDER.glob("*.md"))
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    return [(name, text) for name, text in found if "data" in yaml.safe_load(text)]


def test_pages_for_those_who_change_over_show_a_recipe() -> None:
    assert {"from-llama-factory.md", "from-trl.md"} <= {name for name, _ in recipes()}


@pytest.mark.parametrize(("name", "text"), recipes(), ids=[name for name, _ in recipes()])
def test_recipe_is_read(name: str, text: str, tmp_path: Path) -> None:
    from trl import SFTConfig

    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert set(recipe.training) <= {field.name for field in dataclasses.fields(SFTConfig)}


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def kinds(path: Path) -> list[list[tuple[str, list[str]]]]:
    """What each cell of code put out, but for the values."""
    code = (cell for cell in cells(path) if cell["cell_type"] == "code")
    return [[(o["output_type"], sorted(o.get("data", {}))) for o in cell["outputs"]] for cell in code]


def test_notebook_runs_as_shown(tmp_path: Path) -> None:
    ran = tmp_path / "ran.ipynb"
    done = subprocess.run([sys.executable, str(SCRIPT), str(NOTEBOOK), str(ran)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kinds(ran) == kinds(NOTEBOOK)
    text = "".join(output.get("text", [""])[-1] for cell in cells(ran) for output in cell.get("outputs", []))
    assert "same logits: True" in text


def test_outputs_are_those_of_the_cells() -> None:
    spec = importlib.util.spec_from_file_location("site_notebook", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    joined = [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]
    assert notebook["metadata"]["source_hash"] == script.source_hash({"cells": joined})  # else: make notebook
    assert NOTEBOOK.stat().st_size < 100_000
