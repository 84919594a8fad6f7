"""A browser that notes all that it asks for; run with Playwright's environment, without this project's."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from tests.acceptance.clients.checks import check

# Two busy cores may take long for anything.
PATIENCE_MS = 240_000
LARGEST_PICTURE = 200_000
DESKTOP, PHONE = (1280, 860), (360, 740)


class Look:
    """A browser before one server.

    Args:
        browser: a running one.
        setting: where the server is, axe's script, the folder of pictures, and keys.
    """

    def __init__(self, browser: Browser, setting: dict[str, Any]) -> None:
        self._browser = browser
        self.setting = setting
        self.url: str = setting["url"]
        self.asked: list[str] = []
        self.faults: list[str] = []

    @contextlib.contextmanager
    def page(self, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Iterator[Page]:
        """A page of its own, with nothing of earlier ones."""
        viewport: Any = {"width": size[0], "height": size[1]}
        context = self._browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE_MS)
        context.on("request", lambda request: self.asked.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", self._note)
        page.goto(f"{self.url}/playground")
        yield page
        context.close()

    def _note(self, message: Any) -> None:
        # What the server refuses is noted by the browser, too, and is no fault of the page.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def picture(self, page: Page, name: str, *, whole: bool = True) -> None:
        """Take a picture for the documentation."""
        path = Path(self.setting["pictures"]) / f"playground-{name}.png"
        taken = Image.open(io.BytesIO(page.screenshot(full_page=whole, animations="disabled")))
        # A page has few colours.
        taken.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        size = path.stat().st_size
        check(f"the picture {name} is small: {size // 1000} KB", size < LARGEST_PICTURE)

    def is_accessible(self, page: Page, name: str) -> None:
        """Check that axe finds nothing serious."""
        page.evaluate(Path(self.setting["axe"]).read_text())
        found = page.evaluate("axe.run()")
        bad = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
        shown = [(each["id"], [node["html"] for node in each["nodes"]]) for each in bad]
        check(f"axe finds nothing serious: {name}", not bad, shown)
        check(f"axe has looked: {name}", len(found["passes"]) > 10)

    def fits(self, page: Page, name: str) -> None:
        """Check that nothing has to be scrolled sideways."""
        width = page.evaluate("document.documentElement.scrollWidth")
        check(f"no sideways scrolling: {name}", width <= page.evaluate("innerWidth"), width)

    def asked_nobody_else(self) -> None:
        """Check that every request went to the server, and that the page had no fault."""
        foreign = [each for each in self.asked if not each.startswith(f"{self.url}/")]
        check(f"none of {len(self.asked)} requests left the host", not foreign, foreign)
        check("the page had no errors, its policy's among them", not self.faults, self.faults)


@contextlib.contextmanager
def looking() -> Iterator[Look]:
    """A browser by the setting on standard input, which can reach nothing but this machine."""
    setting = json.load(sys.stdin)
    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        path = setting["chromium"] or None
        with playwright.chromium.launch(executable_path=path, args=arguments) as browser:
            yield Look(browser, setting)


def panel(page: Page, model: str) -> Locator:
    """The side of a model."""
    return page.get_by_role("region", name=f"Answers of {model}", exact=True)


def add(page: Page, *models: str) -> None:
    """Add adapters to those that answer."""
    for model in models:
        page.get_by_label("Another adapter").fill(model)
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_label(model, exact=True).wait_for()


def send(page: Page, text: str) -> None:
    """Send a message."""
    page.locator("#prompt").fill(text)
    page.get_by_role("button", name="Send to all").click()


def wait_until_done(page: Page) -> None:
    """Wait until all have answered."""
    page.locator("#send:enabled").wait_for()


def answer_of(page: Page, model: str) -> str:
    """The latest answer of a model."""
    text = panel(page, model).locator(".answer").last.text_content()
    return text or ""


def wait_for_rows(page: Page, name: str, number: int) -> None:
    """Wait until the table of the batch has so many running rows of an adapter or a tenant."""
    cells = page.get_by_role("row").filter(has_text=name).locator("td:nth-last-child(3)")
    cells.get_by_text(str(number), exact=True).wait_for()


def fact(page: Page, model: str, name: str) -> str:
    """A figure of a model's latest answer."""
    facts = panel(page, model).locator(".facts div").filter(has_text=name)
    return facts.locator("dd").inner_text()
