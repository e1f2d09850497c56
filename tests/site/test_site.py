"""The documentation as a site: no warning, every link and anchor leads somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """Ids of a page, where its links lead, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given.get("id") or "", (given.get("name") or "") if tag == "a" else ""}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        for name, value in attrs:
            if (tag, name) in LOADED and value:
                self.loaded.append(value)


@cache
def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; --strict makes each warning an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's word on other generators
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # whose links assume a server


def test_links_and_anchors_lead_somewhere(site: Path, pages: list[Path]) -> None:
    broken = []
    for path in pages:
        for link in {*parsed(path).links, *parsed(path).loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = target.exists() and (target.suffix != ".html" or unquote(parts.fragment) in parsed(target).ids)
            if not known and not parts.fragment.startswith("__"):  # switches of the theme
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: list[Path]) -> None:
    foreign = [link for path in pages for link in parsed(path).loaded if urlsplit(link).scheme not in ("", "data")]
    assert foreign == []
    assert not [path for path in site.rglob("*.css") if re.search(r"url\([\"']?https?:", path.read_text())]


def test_every_page_is_there(site: Path) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert [str(page) for page in written if not (site / page).exists()] == []
    for page in ("index", "contributing", "changelog", "security", "tutorials/quickstart", "api/maskft.gates"):
        assert (site / f"{page}.html").exists()
    assert "masked_linear" in (site / "source" / "src" / "maskft" / "linear.py.html").read_text()


def test_formulas_are_drawn(site: Path) -> None:
    method = (site / "method.html").read_text()
    assert method.count('<math display="block">') >= 8
    assert "xFORMULAx" not in method
    assert "$$" not in method


def test_the_interface_is_described(site: Path) -> None:
    gates = (site / "api" / "maskft.gates.html").read_text()
    assert 'id="maskft.gates.Soft"' in gates
    config = (site / "api" / "maskft.tuner.config.html").read_text()
    assert 'id="maskft.tuner.config.MaskConfig"' in config
    assert "keep_ratio" in config
