"""Every public function, class and method says what it does, where it is declared first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "maskft"
FILES = sorted(SRC.rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Methods that Transformers' Trainer and the callbacks, torch's modules and Python's handlers of logs declare.
OF_OTHERS = {"create_optimizer", "training_step", "compute_loss", "forward", "backward", "setup_context", "emit"}


def definitions(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, Definition]]:
    """(dotted name, node) of the public functions, classes and methods."""
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        yield f"{inside}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{inside}{node.name}.")


def public(path: Path) -> list[tuple[str, Definition]]:
    return list(definitions(ast.parse(path.read_text(encoding="utf-8")).body))


DECLARED = OF_OTHERS | {
    node.name for path in FILES for name, node in public(path) if "." in name and ast.get_docstring(node)
}
"""Names of methods that a protocol or a base class explains for all that implement them."""


def explained(path: Path, name: str, node: Definition) -> bool:
    if ast.get_docstring(node):
        return True
    if path.parent.name == "cli":  # the function of the command, in app.py, has the text that --help shows
        return name.startswith("run")
    return "." in name and (node.name in DECLARED or node.name.startswith("on_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    assert [name for name, node in public(path) if not explained(path, name, node)] == []


def test_the_package_says_what_its_names_are() -> None:
    import maskft

    for name in maskft.__all__:
        assert f"`{name}`" in (maskft.__doc__ or "")
        assert getattr(maskft, name) is not None
