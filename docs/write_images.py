"""Make the images of the documentation from the default study's results, after `make demo`.

Run as `python docs/write_images.py`; needs Chromium, and Playwright as the tests do.
"""

import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

CLONE = Path(__file__).parents[1]
STUDY = CLONE / "results" / "studies" / "openclipart"
TABLES = STUDY / "openclipart" / "small"
IMAGES = CLONE / "docs" / "images"

FIGURES = {
    "layers": TABLES / "layerwise" / "layers.png",
    "between-encoders": TABLES / "layerwise" / "between-encoders.png",
    "sharedness": TABLES / "sharedness" / "seen-and-said.png",
}
FEATURE = "#/feature/openclipart/small/tiny-clip-image@0/3/445"
# The address within the site, and the section to show; without one, the upper part of the page.
PAGES = {
    "overview": ("#/", None),
    "feature": (FEATURE, None),
    "matches": (FEATURE, "Best match in every other member"),
    "ranking": ("#/ranking/openclipart/small/seen-and-said", None),
}
WIDTH, HEIGHT = 1000, 1200


def main() -> None:
    """Write `docs/images/`."""
    for name, figure in FIGURES.items():
        image = Image.open(figure)
        image.thumbnail((1400, 1400))
        image.save(IMAGES / f"{name}.png", optimize=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (place, section) in PAGES.items():
            # High enough for everything to be in view: the rest is not loaded.
            page = browser.new_page(viewport={"width": WIDTH, "height": 3 * HEIGHT})
            page.goto(f"{(STUDY / 'pages' / 'index.html').as_uri()}{place}")
            page.wait_for_selector("main:not([aria-busy]) h1")
            page.wait_for_timeout(2000)
            if section:
                page.locator("section", has_text=section).last.screenshot(path=IMAGES / f"{name}.png")
            else:
                upper = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT}
                page.screenshot(path=IMAGES / f"{name}.png", clip=upper)


if __name__ == "__main__":
    main()
