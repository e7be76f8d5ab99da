"""A Chromium, a made-up site, and pages on which every complaint of the browser is an error."""

import os
import shutil
from pathlib import Path

import pytest

from . import made_up

NARROW = {"width": 360, "height": 740}


def pytest_collection_modifyitems(items):
    """Run these in one process: they share a browser."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium. Where there is none, tests are skipped, but in CI that is a failure."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        reason = "no Chromium on this machine; on Debian: apt-get install chromium"
        (pytest.fail if os.getenv("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    # Chromium refuses its sandbox to root alone.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of a made-up study's pages, which no test changes."""
    folder = tmp_path_factory.mktemp("pages") / "site"
    made_up.write_site(folder)
    return folder


@pytest.fixture(scope="session")
def large_site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "large"
    table = made_up.write_large_site(folder)
    return folder, table


class Tab:
    """Pages of one browser context, with all that went wrong in them.

    Attributes:
        allowed: Files that are not there; that the browser tells of them is no error. One thumbnail never is.
    """

    def __init__(self, context, folder):
        self.context = context
        self.folder = folder
        self.allowed = [f"{made_up.MISSING_THUMBNAIL:06d}.webp"]
        self.wrong = []
        self.page = self.new_page()

    def new_page(self):
        page = self.context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("requestfailed", self._failed)
        page.on("request", lambda request: self._asked(request.url))
        return page

    def _heard(self, message):
        # Chromium says nothing but that a resource is missing; which one, the failed request says.
        missing = message.text.startswith("Failed to load resource") and any(
            name in message.location["url"] for name in self.allowed
        )
        if message.type in ("error", "warning") and not missing:
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
        page.goto("about:blank")
        page.goto(self.address(route))
        page.wait_for_selector("main:not([aria-busy]) h1")
        return page


@pytest.fixture
def open_tab(browser):
    """Open tabs on sites; at the end nothing may have gone wrong, nor any caption have run."""
    tabs = []

    def open_one(folder, **options):
        tabs.append(Tab(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)), folder))
        return tabs[-1]

    yield open_one
    wrong = [what for tab in tabs for what in tab.wrong]
    ran = [page.evaluate("window.pwned") for tab in tabs for page in tab.context.pages if page.url != "about:blank"]
    for tab in tabs:
        tab.context.close()
    assert wrong == []
    assert ran == [None] * len(ran)


@pytest.fixture
def tab(open_tab, site):
    return open_tab(site)


@pytest.fixture
def broken_site(site, tmp_path):
    """A copy from which a test may take files: links to the same ones, which it must not write to."""
    return shutil.copytree(site, tmp_path / "site", copy_function=os.link)
