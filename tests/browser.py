"""Chromium for the tests of the page, and an eye on what goes wrong in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def launched_browser() -> Iterator[Browser]:
    """The chromium of this machine, headless; skips the test where there is none."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    if not found:
        pytest.skip("no chromium here; install one to test the page, on Debian: apt-get install chromium")
    expect.set_options(timeout=15_000)  # for slow machines: no test waits that long unless it fails
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Opens pages of one service; its end fails if any said something on the console or asked for something elsewhere.

    A violated Content-Security-Policy is told on the console. So is every answer with an error's status: the
    statuses in `refused`, which may grow while pages are open, are expected.
    """

    def __init__(self, browser: Browser, address: str, refused: Set[int] = frozenset()) -> None:
        self.browser, self.address, self.refused = browser, address, refused
        self.contexts: list[BrowserContext] = []
        self.complaints: list[str] = []

    def visit(self, path: str = "/", **options: Any) -> Page:
        """A page in a context of its own; options are those of Browser.new_context."""
        context = self.browser.new_context(**options)
        self.contexts.append(context)
        page = context.new_page()
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", self._watch)
        page.goto(self.address + path)
        return page

    def _hear(self, message: ConsoleMessage) -> None:
        refusal = re.fullmatch(r"Failed to load resource: .* status of (\d+) .*", message.text)
        if not (refusal and int(refusal[1]) in self.refused):
            self.complaints.append(f"{message.type}: {message.text}")

    def _watch(self, request: Request) -> None:
        if not request.url.startswith(self.address):
            self.complaints.append(f"request to {request.url}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for context in self.contexts:
            context.close()
        if error is None:
            assert self.complaints == []
