"""A Chromium, and pages on which every complaint of the browser is an error."""

import base64
import json
import os
import shutil
import zlib

import pytest

from tests.pages.made_up import MISSING_THUMBNAIL

PATIENCE_MS = 60_000  # on a machine that is slow and busy


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium. Where there is none, tests are skipped, but in CI that is a failure."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        reason = "no Chromium on this machine; on Debian: apt-get install chromium"
        (pytest.fail if os.getenv("CI") else pytest.skip)(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    # Chromium refuses its sandbox to root alone.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


SIZE = {"width": 1280, "height": 900}


class Tab:
    """Pages of one browser context, with all that went wrong in them.

    Attributes:
        allowed: Files that are not there; that the browser tells of them is no error. One thumbnail never is.
        expected: Beginnings of messages on the console that are no error.
    """

    def __init__(self, context, folder):
        self.context = context
        self.folder = folder
        self.allowed = [f"{MISSING_THUMBNAIL:06d}.webp"]
        self.expected = ()
        self.wrong = []
        heard = {
            "console": self._heard,
            "weberror": lambda error: self.wrong.append(f"error: {error.error}"),
            "requestfailed": self._failed,
            "request": lambda request: self._asked(request.url),
        }
        for event, handler in heard.items():
            context.on(event, handler)
        self._heard_by = heard
        self.page = context.pages[0] if context.pages else self.new_page()

    def new_page(self):
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        return page

    def leave(self):
        """Stop listening, and let nothing of this be there for the next tab of the same context."""
        for event, handler in self._heard_by.items():
            self.context.remove_listener(event, handler)
        first, *others = self.context.pages
        for page in others:
            page.close()
        first.set_viewport_size(SIZE)
        first.emulate_media(color_scheme="light")
        first.goto("about:blank")

    def _heard(self, message):
        # Chromium says nothing but that a resource is missing; which one, the failed request says.
        missing = message.text.startswith("Failed to load resource") and any(
            name in message.location["url"] for name in self.allowed
        )
        if message.type in ("error", "warning") and not missing and not message.text.startswith(self.expected):
            self.wrong.append(f"console: {message.text}")

    def _failed(self, request):
        # One who leaves a page does not wait for its pictures.
        left = request.failure == "net::ERR_ABORTED"
        if not left and not any(name in request.url for name in self.allowed):
            self.wrong.append(f"failed: {request.url}, {request.failure}")

    def _asked(self, url):
        if not url.startswith((self.folder.as_uri() + "/", "data:")):
            self.wrong.append(f"outside: {url}")

    def address(self, route):
        return f"{(self.folder / 'index.html').as_uri()}{route}"

    def open(self, route="#/", page=None):
        """Go there and wait for the view."""
        page = page or self.page
        if page.url != "about:blank":
            page.goto("about:blank")
        page.goto(self.address(route))
        page.wait_for_selector("main:not([aria-busy]) h1")
        return page


@pytest.fixture
def open_tab(browser):
    """Open tabs on sites; at the end nothing may have gone wrong, nor any caption have run."""
    # One context for all tabs without options of their own, as each takes a quarter of a second.
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
        tab.leave()
        if tab.context is not shared:
            tab.context.close()
    assert wrong == []
    assert ran == [None] * len(ran)


def read_data(folder, key):
    """A data file's value, by Python and from the file alone."""
    text = (folder / f"{key}.js").read_text(encoding="ascii").strip()
    before = f"conceptshare.add({json.dumps(key)}, "
    assert text.startswith(before)
    return json.loads(zlib.decompress(base64.b64decode(json.loads(text[len(before) : -2]))))
