"""The parts of the page that need no gradio, and the command that opens it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import maskft.app.page as page
from maskft.errors import MissingExtraError, UserError
from tests.adapters.test_commands import run  # noqa: F401 (a fixture)
from tests.evaluation.tiny import tiny_adapter, tiny_base
from tests.report.made import make_run

Call = Any


def test_a_missing_gradio_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskft\[app\]'"):
        page.library()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


class Stub:
    """A playground that says two words."""

    def answers(self, *asked: object) -> Any:
        if asked[1] == "bad":
            raise UserError("ask a better question.")
        yield {"base": "no"}
        yield {"base": "no", "b": "yes"}


class Shown(Exception):
    """What gradio shows as an error."""


def test_a_text_for_each_box() -> None:
    ask = page._asked(SimpleNamespace(Error=Shown), Stub(), ["base", "a", "b"])  # type: ignore[arg-type]
    assert list(ask("x.png", "good", ["b"], 1.0, [])) == [["no", "", ""], ["no", "", "yes"]]
    with pytest.raises(Shown, match="better question"):
        list(ask(None, "bad", [], 1.0, []))


def test_heat_maps_and_examples_come_from_runs(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    (tmp_path / "adapter").mkdir()
    shown = SimpleNamespace(folders={"adapter": tmp_path / "adapter", "run": made})
    assert list(page._heats(shown)) == ["run"]  # type: ignore[arg-type]
    assert page._heats(shown)["run"].startswith("<svg")  # type: ignore[arg-type]
    found = page._examples(shown)  # type: ignore[arg-type]
    assert 0 < len(found) <= page.EXAMPLES
    assert all(Path(image).is_file() and question.startswith("Question") for image, question in found)
    assert page._heats(SimpleNamespace(folders={})) == {}  # type: ignore[arg-type]
    assert page._examples(SimpleNamespace(folders={"adapter": tmp_path / "adapter"})) == []  # type: ignore[arg-type]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks of the page."""
    asked: dict[str, Any] = {}

    def serve(built: Any, **arguments: Any) -> str:
        if arguments["port"] == 1:
            raise OSError("port 1 is taken")
        asked.update(arguments)
        return "http://127.0.0.1:7860/"

    def build(playground: Any) -> Any:
        asked["names"] = playground.names
        return SimpleNamespace(block_thread=lambda: None)

    monkeypatch.setattr(page, "library", lambda: None)
    monkeypatch.setattr(page, "build", build)
    monkeypatch.setattr(page, "serve", serve)
    return asked


def test_the_command(run: Call, served: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    tiny_base(tmp_path / "base")
    a, b = (tiny_adapter(tmp_path / "base", tmp_path / name) for name in ("a", "b"))
    code, _, err = run("app", tmp_path / "base", "--adapters", a, b, "--dtype", "float32")
    assert code == 0, err
    assert served == {"names": ["a", "b"], "host": "127.0.0.1", "port": None, "wait": False}
    assert "page     http://127.0.0.1:7860/" in err
    assert "password" not in err
    code, _, err = run("app", a, "--adapters", b, "--host", "0.0.0.0", "--dtype", "float32")
    assert (code, served["names"]) == (0, ["a", "b"])
    assert "there is no password" in err
    for arguments, message in (
        ((a, "--port", 1), "cannot be served on 127.0.0.1, port 1"),
        ((tmp_path / "base",), "needs a mask"),
        ((tmp_path / "nothing",), "there is no model"),
    ):
        code, out, err = run("app", *arguments)
        assert (code, out) == (2, "")
        assert message in err.replace("\n", " ")
