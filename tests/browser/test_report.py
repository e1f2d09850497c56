"""The report in a browser: it opens from disk, draws every chart, and everyone can read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskft.report.page import write_report
from tests.report.made import HOSTILE, make_run

from .conftest import ink, picture, serious


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of reports."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [make_run(folder / f"run-{seed}", seed=seed) for seed in range(3)]
    hard = make_run(folder / "hard", seed=3, gate="topk", bits=True, keep_ratio=0.7)
    bad = make_run(folder / "hostile", seed=4, text=HOSTILE)
    several = {"one": runs[:1], "three": runs, "hard": [hard], "hostile": [bad, hard]}
    for name, given in several.items():
        write_report(given, folder / f"{name}.html")
    return {name: Path(folder / f"{name}.html").as_uri() for name in several}


@pytest.mark.parametrize("name", ["one", "three", "hard", "hostile"])
def test_opens_without_a_request_or_an_error(name: str, pages: dict[str, str], open_page: Any) -> None:
    alerts: list[str] = []
    seen = open_page("about:blank")
    seen.page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    seen.page.goto(pages[name])
    seen.page.wait_for_load_state("networkidle")
    assert seen.errors == []
    assert seen.elsewhere("file:", "about:") == []
    assert len([url for url in seen.requests if url.startswith("file:")]) == 1
    assert alerts == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn(scheme: str, pages: dict[str, str], open_page: Any) -> None:
    seen = open_page(pages["three"], scheme=scheme)
    charts = seen.page.query_selector_all("svg.chart")
    assert len(charts) > 10
    for chart in charts:
        image = picture(chart)
        assert min(image.size) > 80
        assert ink(image) > 0.02, chart.get_attribute("aria-label")
    for image in seen.page.query_selector_all("img"):
        assert image.evaluate("one => one.complete && one.naturalWidth > 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "three", "hostile"])
def test_axe_finds_nothing_serious(name: str, scheme: str, pages: dict[str, str], open_page: Any) -> None:
    seen = open_page(pages[name], scheme=scheme)
    seen.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert serious(seen.page) == []


@pytest.mark.parametrize("name", ["one", "three", "hostile"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out(width: int, name: str, pages: dict[str, str], open_page: Any) -> None:
    seen = open_page(pages[name], width=width)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_opens_the_data(pages: dict[str, str], open_page: Any) -> None:
    seen = open_page(pages["one"])
    first = seen.page.locator("summary").first
    first.focus()
    seen.page.keyboard.press("Enter")
    assert seen.page.locator("details").first.evaluate("one => one.open")
    assert seen.page.locator("details[open] table").first.is_visible()


def test_print_is_black_on_white(pages: dict[str, str], open_page: Any) -> None:
    seen = open_page(pages["one"], scheme="dark")
    seen.page.emulate_media(media="print")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert seen.page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
