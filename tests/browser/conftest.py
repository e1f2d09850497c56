"""A headless Chromium, from the system's packages; nothing is downloaded.

These tests are run by `make test-browser`. Without Chromium they fail and say how to install it.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser/" in str(item.path.as_posix()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"there is no Chromium on the path ({', '.join(NAMES)}). Install it: apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Watched:
    """A page, and everything that went wrong or was asked for on it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("requestfailed", lambda request: self.errors.append(f"failed: {request.url}"))
        page.on("request", lambda request: self.requests.append(request.url))

    def elsewhere(self, *starts: str) -> list[str]:
        """Requests to other places than those."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:", *starts))]


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Any]:
    """Open an address in a window of a size, in a colour scheme."""
    contexts = []

    def _open(address: str, width: int = 1280, height: int = 900, scheme: str = "light") -> Watched:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True, service_workers="block"
        )
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.page.goto(address)
        return watched

    yield _open
    for context in contexts:
        context.close()


def serious(page: Any) -> list[str]:
    """What axe-core finds on a page that is serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def picture(element: Any) -> Image.Image:
    """What an element looks like."""
    return Image.open(io.BytesIO(element.screenshot())).convert("RGB")


def ink(image: Image.Image) -> float:
    """Share of pixels that are not of the most frequent colour."""
    colours = image.getcolors(maxcolors=image.width * image.height)
    assert colours is not None
    return 1 - max(count for count, _ in colours) / (image.width * image.height)
