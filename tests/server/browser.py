"""A real browser for the playground's tests, and what they read off the page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Locator, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_MS = 20_000


@contextmanager
def launched() -> Iterator[Browser]:
    """Chromium without a window. While it is open, no event loop can be started in this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Playground:
    """The page as a person uses it. `problems` are the console's errors and the script's exceptions."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.goto(url)

    def connected(self) -> Playground:
        """Wait until the server's intrinsics are listed."""
        self.page.locator(".intrinsic").first.wait_for()
        return self

    def ask(self, text: str) -> None:
        """Send a message and wait for the whole answer."""
        self.page.locator("#message").fill(text)
        self.page.keyboard.press("Enter")
        self.answered()

    def answered(self) -> None:
        self.page.locator("#log[aria-busy=false]").wait_for()

    def paste(self, title: str, text: str) -> None:
        """Attach a document to the next message."""
        if not self.page.locator("#doc-text").is_visible():
            self.page.locator("#add summary").click()
        self.page.locator("#doc-title").fill(title)
        self.page.locator("#doc-text").fill(text)
        self.page.locator("#doc-add").click()

    def intrinsic(self, name: str) -> Locator:
        return self.page.locator(f'.intrinsic[data-name="{name}"]')

    def run(self, name: str) -> None:
        """Run one intrinsic and wait for its result or its error."""
        self.intrinsic(name).get_by_role("button").click()
        self.intrinsic(name).locator(".value, .problem").first.wait_for()
        self.page.locator(".intrinsic.busy").first.wait_for(state="hidden")

    def run_all(self) -> None:
        self.page.locator("#run-all").click()
        self.page.locator("#tokens-title", has_text="intrinsics at once").wait_for()
        self.page.locator(".intrinsic.busy").first.wait_for(state="hidden")

    def drawn(self, title: str) -> None:
        """Wait until the tokens of the call of that title are drawn."""
        self.page.locator("#tokens-title", has_text=title).wait_for()
        self.page.locator(".legend").wait_for()

    def figure(self, name: str) -> int:
        """A number of tokens above the strip."""
        return number(self.page.locator(f'[data-figure="{name}"] strong').inner_text())

    def cells(self, state: str = "cell") -> int:
        """How many cells the strip has, of all or of one state."""
        return self.page.locator(f".drawing .cell.{state}").count()

    def color(self, name: str) -> tuple[float, ...]:
        """A CSS variable of the page that holds a colour."""
        script = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        text = self.page.evaluate(script, f"--{name}")
        return tuple(int(text[at : at + 2], 16) / 255 for at in (1, 3, 5))

    @staticmethod
    def box(locator: Locator) -> dict[str, float]:
        """Where an element is on the page, and its size."""
        box = locator.bounding_box()
        assert box
        return dict(box)

    def width(self) -> tuple[int, int]:
        """Width of the document and of the window."""
        wide, window = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        return wide, window

    def focus(self) -> tuple[str, str]:
        """The name of what has the focus (BODY: nothing has), and the style of its outline."""
        name, outline = self.page.evaluate(
            """(() => {
                const e = document.activeElement;
                const name = e.id || e.getAttribute("aria-label") || e.className || e.textContent.trim();
                return [e === document.body ? "BODY" : name, getComputedStyle(e).outlineStyle];
            })()"""
        )
        return name, outline

    def expect_failed_requests(self, count: int) -> None:
        """The browser itself notes each failed request in the console."""
        assert len(self.problems) == count
        assert all("Failed to load resource" in problem for problem in self.problems)
        self.problems.clear()


def save_screenshot(playground: Playground, path: str) -> None:
    """A conversation as one would show it: an answer over a passage, then all intrinsics at once."""
    page = playground.page
    page.set_default_timeout(300_000)
    page.locator(".opening").first.click()
    page.keyboard.press("Enter")
    playground.answered()
    playground.drawn("answer")
    playground.run_all()
    playground.drawn("intrinsics at once")
    page.locator(".cell").last.hover()
    page.mouse.move(0, 0)
    page.wait_for_timeout(2500)  # the cache's bars have come to rest
    page.screenshot(path=path, full_page=True)


def tree_of_turns(turns: int, first_id: int = 1) -> list[dict[str, Any]]:
    """A conversation as the cache lists it: a trunk, at each turn of which three adapters hang."""
    nodes: list[dict[str, Any]] = []

    def grow(parent: int, tokens: int, owner: str | None = None) -> int:
        number = first_id + len(nodes)
        nodes.append({"id": number, "parent": parent, "tokens": tokens, "owner": owner, "held": False})
        return number

    trunk = 0
    for turn in range(turns):
        trunk = grow(trunk, 40 + 7 * turn)
        for name in ("jailbreak", "answerability", "certainty"):
            grow(grow(trunk, 4, name), 3, name)
        grow(trunk, 90)
    return nodes


def number(text: str) -> int:
    """The first number of a text, written with commas."""
    found = re.search(r"\d[\d,]*", text)
    assert found, f"no number in {text!r}"
    return int(found[0].replace(",", ""))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG's contrast ratio of two colours."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: tuple[float, ...]) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
