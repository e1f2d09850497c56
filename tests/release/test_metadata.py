"""What the wheel holds and asks for, and that the core needs nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# Every package that each installation gets, and what it is for.
CORE = {
    "torch": "the tensors",
    "transformers": "the models",
    "peft": "the method is one of PEFT's",
    "trl": "the trainer",
    "accelerate": "devices and many processes, for the trainer",
    "safetensors": "adapters on disk",
    "numpy": "measures and pictures",
    "datasets": "rows of data",
    "pyarrow": "rows of data that are read as a stream",
    "pillow": "images",
    "pydantic": "the recipe's schema",
    "pyyaml": "the recipe's file",
    "typer": "the command line",
    "rich": "tables and progress on the command line",
    "jinja2": "the report; chat templates",
    "tqdm": "progress of answers",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, built from the source archive, and the archive."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def tracked(*folders: str) -> set[str]:
    """Files of the working tree below folders, as paths from its top, without what Python leaves."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {p.relative_to(ROOT).as_posix() for p in paths if p.is_file() and "__pycache__" not in p.parts}


def test_wheel_holds_the_package_and_the_recipes_alone(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {path.removeprefix("src/") for path in tracked("src/maskft")}
    recipes = {f"maskft/{path}" for path in tracked("recipes")}
    assert inside == package | recipes
    assert {
        "maskft/py.typed",
        "maskft/report/templates/report.html",
        "maskft/vlm/assets/projector.safetensors",
    } < inside
    assert "maskft/recipes/quickstart.yaml" in inside


def test_source_archive_holds_what_the_tests_need(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked("src/maskft", "recipes", "requirements") <= inside
    assert {"tests/release/test_metadata.py", "docs/method.md", "studies/quickstart/soft-seed0.json"} <= inside
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "pyproject.toml"} <= inside
    assert not [name for name in inside if name.startswith((".venv", "runs/", "dist/"))]


def test_metadata_is_what_an_index_takes(metadata: Message) -> None:
    import maskft

    assert metadata["Name"] == "maskft"
    assert metadata["Version"] == maskft.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == ">=3.10"
    assert len(metadata["Summary"]) < 200
    assert "\n" not in metadata["Summary"]
    assert str(metadata.get_payload()).startswith("# maskft")
    assert metadata.get_all("Classifier")


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]


def test_every_requirement_has_a_reason(metadata: Message) -> None:
    always = {r.name.lower() for r in requirements(metadata) if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert always == set(CORE)


def test_every_requirement_has_a_lowest_version_and_no_address(metadata: Message) -> None:
    for requirement in requirements(metadata):
        assert requirement.url is None  # an index refuses these
        assert requirement.specifier or not requirement.marker or "dev" in str(requirement.marker)


BLOCKED = """
import importlib, importlib.machinery, pkgutil, sys

BLOCKED = set(sys.argv[1].split(","))


class Without:
    '''The finder of files, blind to the blocked packages.'''

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        return None if top in BLOCKED else importlib.machinery.PathFinder.find_spec(name, path, target)

    find_distributions = importlib.machinery.PathFinder.find_distributions
    invalidate_caches = importlib.machinery.PathFinder.invalidate_caches


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
import maskft
from maskft.errors import MissingExtraError

for module in pkgutil.walk_packages(maskft.__path__, "maskft."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except MissingExtraError as error:
            print(module.name, "pip install 'maskft[" in str(error))
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""

# Modules that nobody imports but the tool they belong to.
FOR_OTHERS = {"maskft.evaluation.lmms": "lmms-eval loads it by its entry point"}


def optional_modules() -> set[str]:
    """Top-level modules of what the extras bring and the core, with all it needs in turn, does not."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, requires

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    def needed(names: set[str]) -> set[str]:
        found: set[str] = set()
        while names - found:
            name = (names - found).pop()
            found.add(name)
            try:
                lines = requires(name) or []
            except PackageNotFoundError:
                continue
            wanted = map(Requirement, lines)
            names |= {normal(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
        return found

    core = needed({normal(name) for name in CORE})
    return {
        module
        for module, distributions in packages_distributions().items()
        if not {normal(name) for name in distributions} & {*core, "maskft"} and module.isidentifier()
    } - {"pip", "setuptools", "pkg_resources", "_distutils_hack"}


def test_core_imports_without_any_optional_package() -> None:
    blocked = optional_modules()
    assert {"gguf", "onnx", "easy_vqa"} <= blocked
    command = [sys.executable, "-c", BLOCKED, ",".join(sorted(blocked))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{module} True" for module in sorted(FOR_OTHERS)]
