"""Imports point down, third parties have one home, importing changes nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "maskft"
FILES = sorted(SRC.rglob("*.py"))
LEVELS = {
    "errors": 0,
    "selection": 0.5,
    **dict.fromkeys(("gates", "scores", "fingerprint", "packing", "compiling"), 1),
    **dict.fromkeys(("folders", "yamlfile", "checkpoints", "shipped"), 1),
    **dict.fromkeys(("linear", "targets"), 2),
    **dict.fromkeys(("tuner", "optim", "stepping", "measures", "whole"), 3),
    "methods": 3.5,
    **dict.fromkeys(("recipe", "data", "vlm", "adapters", "audit", "memory", "learnt"), 4),
    **dict.fromkeys(("runs", "inspection", "guard", "mask_stats", "presence", "sharded"), 5),
    "trainer": 6,
    "training": 7,
    **dict.fromkeys(("evaluation", "plan", "preview", "card"), 8),
    "analysis": 8.5,
    "studies": 9,
    "report": 10,
    "app": 11,
    "cli": 12,
}
PURE = ("gates", "selection", "scores", "linear", "fingerprint", "packing", "compiling")
HOMES = {
    "peft": {"tuner"},
    "trl": {"trainer", "training"},
    "easy_vqa": {"data"},
    "gguf": {"vlm"},
    "onnx": {"vlm"},
    "optuna": {"studies"},
    "sqlalchemy": {"studies"},
    "gradio": {"app"},
    "jinja2": {"report"},
}


def room(path: Path) -> str:
    """The part of the package a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(SRC).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} if node.module != "maskft" else {f"maskft.{alias.name}" for alias in node.names}
    return found


def called(path: Path) -> set[str]:
    """Dotted names used in the file, such as torch.save."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def identify(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


each_file = pytest.mark.parametrize("path", FILES, ids=identify)


@each_file
def test_every_room_has_a_level(path: Path) -> None:
    assert room(path) in {"", *LEVELS}


@each_file
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    if not here:  # the package's own __init__ hands out names on demand
        return
    for module in imports(path):
        name, *rest = module.split(".")
        if name != "maskft" or not rest or rest[0] == "__version__":
            continue
        there = "tuner" if rest[0] == "MaskConfig" else rest[0]
        assert there in LEVELS, f"{module} is of no known room"
        assert there == here or LEVELS[there] < LEVELS[here], f"{identify(path)} may not import {module}"


@pytest.mark.parametrize("name", PURE)
def test_the_method_knows_torch_and_nothing_else(name: str) -> None:
    tops = {module.split(".")[0] for module in imports(SRC / f"{name}.py")}
    assert tops - sys.stdlib_module_names <= {"torch", "maskft"}


@each_file
def test_third_parties_have_one_home(path: Path) -> None:
    for module in imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or room(path) in homes, f"{module} belongs to {homes}"


@each_file
def test_no_pickle(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & {"pickle", "cPickle", "dill", "joblib", "marshal"}
    assert not called(path) & {"torch.load", "torch.save"}
    assert not {"torch.load", "torch.save"} & {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@each_file
def test_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@each_file
def test_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_maskft_imports_neither_torch_nor_peft() -> None:
    loaded = python("import sys, maskft; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "maskft" in loaded
    assert not {"torch", "peft", "transformers", "trl", "pydantic", "yaml"} & set(loaded)


def test_importing_maskconfig_registers_the_method() -> None:
    code = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft import PeftType
assert "MASK" not in PeftType.__members__
from maskft import MaskConfig
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MASK] is MaskConfig
print(PEFT_TYPE_TO_TUNER_MAPPING[PeftType("MASK")].__name__)
"""
    assert python(code) == "MaskModel"


@pytest.mark.parametrize(
    "package",
    [".".join(path.relative_to(SRC.parent).parent.parts) for path in FILES if path.name == "__init__.py"],
)
def test_public_names_resolve(package: str) -> None:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None


def test_unknown_names_of_the_package() -> None:
    import maskft

    with pytest.raises(AttributeError, match="module 'maskft' has no attribute 'MaskConfg'"):
        maskft.MaskConfg  # noqa: B018
