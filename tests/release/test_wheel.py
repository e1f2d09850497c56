"""The wheel alone: installed into an environment of its own, it makes the quick start from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = [
    line for line in (ROOT / "requirements" / "demo-parts.txt").read_text().splitlines() if not line.startswith("#")
]


def run(command: list[object], cwd: Path, home: Path) -> str:
    """Output of a command that knows nothing of the clone or of this environment."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MASKFT_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout


@pytest.mark.slow
def test_quick_start_from_the_wheel_alone(tmp_path: Path) -> None:
    elsewhere, home = tmp_path / "elsewhere", tmp_path / "home"
    elsewhere.mkdir()
    home.mkdir()
    run([sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT], ROOT, home)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python, maskft = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "maskft"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    pins = ["--constraint", ROOT / "requirements" / "constraints.txt"]
    run([*pip, *pins, f"{wheel}[demo]"], elsewhere, home)
    run([*pip, "--no-deps", *PARTS], elsewhere, home)
    installed = json.loads(run([python, "-m", "pip", "list", "--format", "json"], elsewhere, home))
    names = {package["name"].lower() for package in installed}
    assert {"maskft", "gguf", "onnx", "easy-vqa"} <= names
    assert not names & {"gradio", "optuna", "bitsandbytes", "deepspeed", "matplotlib", "mkdocs", "pytest", "fastapi"}

    where = run([python, "-c", "import maskft; print(maskft.__file__)"], elsewhere, home)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert "quickstart" in json.loads(run([maskft, "recipes", "--json"], elsewhere, home))
    few = ["training.max_steps=2", "data.limits={train: 16, validation: 4, test: 4}", "method.layers=0-1"]
    trained = json.loads(run([maskft, "train", "quickstart", "--output", "runs/demo", "--json", *few], elsewhere, home))
    assert trained["train"]["steps"] == 2
    assert json.loads(run([maskft, "evaluate", "runs/demo", "--json"], elsewhere, home))["test_examples"] == 4
    merged = json.loads(run([maskft, "export", "runs/demo", "runs/merged", "--json"], elsewhere, home))
    assert merged["largest_logit_difference"] == 0
    assert (elsewhere / "runs" / "demo" / "report.html").is_file()
    assert (elsewhere / "runs" / "merged" / "config.json").is_file()
    shutil.rmtree(tmp_path / "venv")  # more than a gigabyte
