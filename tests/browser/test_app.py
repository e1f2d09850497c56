"""The playground in a browser: an image is dropped, base and masks answer, strength 0 is the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskft.app.page import build, serve
from maskft.app.playground import Playground
from maskft.evaluation.candidates import find_candidates
from tests.evaluation.tiny import tiny_pair

from .conftest import serious

pytestmark = pytest.mark.filterwarnings("default")  # gradio's own


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pair(tmp_path_factory.mktemp("app"))
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.new("1", (6000, 4000)).save(folder / "large.png")
    return folder


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    candidates = find_candidates(str(place / "base"), [str(place / "a"), str(place / "b")])
    page = build(Playground(candidates, dtype="float32", max_new_tokens=8))
    yield serve(page, host="127.0.0.1", port=None, wait=False)
    page.close()


def answers(page: Any, count: int = 3) -> list[str]:
    return [page.locator(f"#answer-{n} textarea").input_value() for n in range(count)]


def ask(page: Any, question: str) -> list[str]:
    """Ask, and wait until all have answered and nothing changes any more."""
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    page.wait_for_function("document.querySelector('#answer-2 textarea').value.length > 0", timeout=60_000)
    before: list[str] = []
    while (now := answers(page)) != before:
        before = now
        page.wait_for_timeout(1500)
    return now


def test_base_and_masks_answer(address: str, place: Path, open_page: Any) -> None:
    seen = open_page(address)
    page = seen.page
    page.locator("#image input[type=file]").set_input_files(str(place / "red.png"))
    page.wait_for_selector("#image img")
    said = ask(page, "What color is it?")
    assert all(said)
    assert len(set(said)) == 3
    slider = page.locator("#strength input[type=number]")
    slider.fill("0")
    slider.press("Tab")
    again = ask(page, "What color is it? ")
    assert set(again) == {said[0]}
    assert seen.elsewhere(address.rstrip("/")) == []
    # gradio leaves its stream of answers as soon as it has the last one
    assert [error for error in seen.errors if "/queue/data" not in error] == []


def test_mixing(address: str, open_page: Any) -> None:
    page = open_page(address).page
    page.get_by_text("Mix two masks").click()
    page.locator("#mix").click()
    page.wait_for_function("document.querySelector('#mixture textarea').value.includes('interpolate')", timeout=60_000)
    assert page.locator("#answer-mixture").is_visible()


def test_an_image_with_too_many_pixels_is_refused(address: str, place: Path, open_page: Any) -> None:
    page = open_page(address).page
    page.locator("#image input[type=file]").set_input_files(str(place / "large.png"))
    page.wait_for_timeout(2000)
    page.locator("#question textarea").fill("What?")
    page.locator("#ask").click()
    page.get_by_text("pixels").first.wait_for(timeout=60_000)
    assert answers(page) == ["", "", ""]


def test_axe_finds_nothing_serious_of_ours(address: str, open_page: Any) -> None:
    page = open_page(address).page
    page.wait_for_selector("#ask")
    assert serious(page) == []
