"""What the first view of concept pages takes in Chromium, with 8,192 features per layer."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch
from urllib.parse import unquote, urlparse

from playwright.sync_api import Browser, sync_playwright
from tests.pages import made_up

FEATURES = 8192
SPARE_MS = 300


def measure_site(folder: Path) -> None:
    """Print what each view takes, in a browser that was started for it."""
    with patch.object(made_up, "FEATURES", FEATURES):
        made_up.write_site(folder)
    here = f"{made_up.DATASET}/{made_up.SAE}"
    views = {
        "overview": "#/",
        "features of a layer": f"#/layer/{here}/seer-clip@1/5",
        "feature of an image encoder": f"#/feature/{here}/seer-clip@1/5/{FEATURES // 2}",
        "the same with where it fires": f"#/feature/{here}/seer-clip@1/5/{FEATURES // 2}?overlay=yes",
        "feature of a text encoder": f"#/feature/{here}/reader-clip@1/5/{FEATURES // 2}",
        "two layers": f"#/pair/{here}/seer-clip@1/5/reader-clip@1/3",
        "a layer and all layers of another member": f"#/pair/{here}/seer-clip@1/5/reader-clip@1/any",
        "ranking": f"#/ranking/{here}/shared-with-text",
    }
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        for what, route in views.items():
            seen = []
            for _ in range(3):
                browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
                seen.append(first_view(browser, f"{(folder / 'index.html').as_uri()}{route}"))
                browser.close()
            seconds, size, files = sorted(seen)[1]
            print(f"{what} (under 2 s and 5 MB): {seconds:.2f} s, {size / 1e6:.2f} MB in {files} files", flush=True)


# All that is in the window is there: the view, what waited to be seen, and its pictures.
READY = """() => {
    const seen = (element) => {
        const box = element.getBoundingClientRect();
        return box.top < innerHeight && box.bottom > 0;
    };
    return document.querySelector('main:not([aria-busy]) h1')
        && [...document.querySelectorAll('.strip, .samples')].every((part) => !seen(part) || part.childNodes.length)
        && [...document.images].every((image) => !seen(image) || (image.complete && image.naturalWidth))
        && performance.now();
}"""


def first_view(browser: Browser, address: str) -> tuple[float, int, int]:
    """Seconds until all of the window is there, and the bytes and number of files that were read by then and after."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    read: set[str] = set()
    page.on("request", lambda request: read.add(unquote(urlparse(request.url).path)))
    page.goto(address, wait_until="commit")
    seconds: float = page.wait_for_function(READY).json_value() / 1000
    page.wait_for_timeout(SPARE_MS)
    return seconds, sum(Path(file).stat().st_size for file in read), len(read)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        measure_site(Path(folder) / "site")
