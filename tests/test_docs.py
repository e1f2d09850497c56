"""What the README and the pages show runs as shown."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from maskft.tuner import config
from maskft.vlm.embedded import embedded_base

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def blocks() -> list[tuple[str, str]]:
    """(name, code) of the README's Python blocks and of every block marked as runnable."""
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            if page.name == "README.md" or code.startswith("# runnable"):
                found.append((f"{page.name}-{number}", code))
    return found


@pytest.mark.parametrize(("name", "code"), blocks(), ids=[name for name, _ in blocks()])
def test_block_runs(name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")
    page.__dict__.update(base_folder=embedded_base(), work=tmp_path)
    monkeypatch.setattr(config, "GATES", dict(config.GATES))  # blocks may add to it
    monkeypatch.setitem(sys.modules, "page", page)  # dataclasses look their module up
    exec(compile(code, name, "exec"), page.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_commands_are_the_makefiles() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", "".join(page.read_text() for page in PAGES)))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("gate", config.GATES)
def test_every_gate_has_a_page_with_its_picture(gate: str) -> None:
    page = ROOT / "docs" / "gates" / f"{gate}.md"
    assert f"]({gate}.svg)" in page.read_text()
    assert f'gate="{gate}"' in page.read_text()
