"""The quick start as another user, in a folder with an awkward name, with a home that cannot be written, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskft.vlm.embedded import embedded_base

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_NOBODY = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"),  # an interpreter may lie below /root
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that anyone can write, with the sources in it."""
    top = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    top.chmod(0o755)
    place = top / "Größe und Maß 尺寸"
    place.mkdir()
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    place.chmod(0o777)
    (top / "home").mkdir(mode=0o555)
    (top / "temporary").mkdir()
    (top / "temporary").chmod(0o777)
    yield place
    shutil.rmtree(top)


@pytest.mark.slow
@pytest.mark.parametrize("composed", [True, False])
def test_quick_start_elsewhere(composed: bool, place: Path) -> None:
    home, temporary = place.parent / "home", place.parent / "temporary"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(place / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if composed:  # by whoever set the machine up
        environment["MASKFT_CACHE"] = str(place.parent / "cache")
        shutil.copytree(embedded_base(), place.parent / "cache" / embedded_base().name)
        (place.parent / "cache").chmod(0o555)
        (place.parent / "cache" / embedded_base().name).chmod(0o555)

    def maskft(*arguments: str) -> str:
        command = [sys.executable, "-m", "maskft.cli", *arguments]
        if os.geteuid() == 0:
            command = [*AS_NOBODY, *command]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    few = ["training.max_steps=2", "data.limits={train: 16, validation: 4, test: 4}", "method.layers=0-1"]
    trained = json.loads(maskft("train", "recipes/quickstart.yaml", "--output", "runs/Lauf 1 ä", "--json", *few))
    assert trained["train"]["steps"] == 2
    scores = json.loads(maskft("evaluate", "runs/Lauf 1 ä", "--json"))
    assert scores["test_examples"] == 4
    merged = json.loads(maskft("export", "runs/Lauf 1 ä", "runs/fertig ö", "--json"))
    assert merged["largest_logit_difference"] == 0
    assert (place / "runs" / "fertig ö" / "config.json").is_file()
    assert list(home.iterdir()) == []
    made = {path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")}  # torch's own
    assert made == (set() if composed else {f"maskft-{_user()}"})


def _user() -> int:
    return NOBODY if os.geteuid() == 0 else os.geteuid()
