"""A real browser: Debian's chromium, driven by Playwright. Without them these tests are skipped."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
CHROMIUM = shutil.which("chromium")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
    if missing or CHROMIUM is None:
        stop = pytest.fail if "VXM_TEST_NEEDS_DATA" in os.environ else pytest.skip
        stop(f"needs chromium and {', '.join(missing) or 'Playwright'}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    """Open a file in a window, and check at the end that nothing went wrong and nothing left the machine."""
    faults: list[str] = []
    contexts = []

    def show(path: Path, width: int = 1440, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("data:", "file:", "blob:")) else faults.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=true]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert faults == []


def wait_for_text(page: Any, selector: str, text: str) -> None:
    """Wait until an element shows a text: pages draw when the browser asks them to."""
    page.wait_for_function("([where, text]) => document.querySelector(where).innerText === text", arg=[selector, text])


def serious(page: Any) -> list[str]:
    """What axe-core finds that is serious or worse."""
    import axe_playwright_python

    source = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    page.evaluate(source)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]
