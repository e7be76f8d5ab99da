"""A Chromium, and pages on which every browser warning or error fails the test."""

import base64
import json
import os
import shutil
import zlib

import pytest

from tests.pages.made_up import MISSING_THUMBNAIL

PATIENCE_MS = 60_000  # for slow and busy machines


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium. Without one, tests are skipped, or fail in CI."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        reason = "no Chromium on this machine; on Debian: apt-get install chromium"
        (pytest.fail if os.getenv("CI") else pytest.skip)(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    # Chromium's sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


SIZE = {"width": 1280, "height": 900}


class Tab:
    """Pages of one browser context, and the problems that occurred in them.

    Attributes:
        allowed: Files that may be missing without an error. One thumbnail always is.
        expected: Prefixes of console messages that are not errors.
    """

    def __init__(self, context, folder):
        self.context = context
        self.folder = folder
        self.allowed = [f"{MISSING_THUMBNAIL:06d}.webp"]
        self.expected = ()
        self.wrong = []
        handlers = {
            "console": self._on_console,
            "weberror": lambda error: self.wrong.append(f"error: {error.error}"),
            "requestfailed": self._on_failure,
            "request": lambda request: self._on_request(request.url),
        }
        for event, handler in handlers.items():
            context.on(event, handler)
        self._handlers = handlers
        self.page = context.pages[0] if context.pages else self.new_page()

    def new_page(self):
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        return page

    def close(self):
        """Stop listening, and reset the context for its next tab."""
        for event, handler in self._handlers.items():
            self.context.remove_listener(event, handler)
        first, *others = self.context.pages
        for page in others:
            page.close()
        first.set_viewport_size(SIZE)
        first.emulate_media(color_scheme="light")
        first.goto("about:blank")

    def _on_console(self, message):
        # Chromium only reports that a resource is missing; the failed request names it.
        missing = message.text.startswith("Failed to load resource") and any(
            name in message.location["url"] for name in self.allowed
        )
        if message.type in ("error", "warning") and not missing and not message.text.startswith(self.expected):
            self.wrong.append(f"console: {message.text}")

    def _on_failure(self, request):
        # Leaving a page aborts loading its images.
        left = request.failure == "net::ERR_ABORTED"
        if not left and not any(name in request.url for name in self.allowed):
            self.wrong.append(f"failed: {request.url}, {request.failure}")

    def _on_request(self, url):
        if not url.startswith((self.folder.as_uri() + "/", "data:")):
            self.wrong.append(f"outside: {url}")

    def address(self, route):
        return f"{(self.folder / 'index.html').as_uri()}{route}"

    def open(self, route="#/", page=None):
        """Open a route and wait for its view."""
        page = page or self.page
        if page.url != "about:blank":
            page.goto("about:blank")
        page.goto(self.address(route))
        page.wait_for_selector("main:not([aria-busy]) h1")
        return page


@pytest.fixture
def open_tab(browser):
    """Opens tabs on sites; afterwards checks that nothing went wrong and that no caption ran as code."""
    # Tabs without options share a context, as creating one takes a quarter of a second.
    shared = browser.contexts[0] if browser.contexts else browser.new_context(viewport=SIZE)
    tabs = []

    def open_one(folder, **options):
        context = shared
        if options or any(tab.context is shared for tab in tabs):
            context = browser.new_context(**({"viewport": SIZE} | options))
        tabs.append(Tab(context, folder))
        return tabs[-1]

    yield open_one
    wrong = [what for tab in tabs for what in tab.wrong]
    ran = []
    for tab in tabs:
        for page in tab.context.pages:
            if page.url != "about:blank":
                ran.append(page.evaluate("window.pwned"))
                page.evaluate("() => { try { localStorage.clear(); } catch {} }")
        tab.close()
        if tab.context is not shared:
            tab.context.close()
    assert wrong == []
    assert ran == [None] * len(ran)


def read_data(folder, key):
    """The value of a data file, parsed in Python."""
    text = (folder / f"{key}.js").read_text(encoding="ascii").strip()
    before = f"conceptshare.add({json.dumps(key)}, "
    assert text.startswith(before)
    return json.loads(zlib.decompress(base64.b64decode(json.loads(text[len(before) : -2]))))
