"""The site of a study as one file."""

from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from conceptshare.config.study import Study
from conceptshare.io import layout
from conceptshare.io.errors import StoreError
from conceptshare.io.files import ZIP, atomic_output
from conceptshare.io.layout import path

_NOTE = """\
Unpack this folder and open index.html in any browser, or copy it to a static web host.

It shows {shown} of these data sets:
{data}

The rights to captions and images remain with their owners: see the licence of each data set before you pass them on.
"""


def pack_site(study: Study, results: Path, with_images: bool, out: Path) -> None:
    """Write a study's site to a zip, in a folder with the study's name, with a note on its origin as `README.txt`.

    Without images, the site shows an empty frame for each.

    Raises:
        StoreError: if the study has no site yet.
    """
    site = path(layout.PAGES, results, study=study.study)
    if not (site / "index.html").is_file():
        raise StoreError(f"{site}: no site there; run the study first")
    data = "\n".join(f"- {name}: {spec.source}" for name, spec in study.datasets.items())
    shown = "captions and thumbnails" if with_images else "captions, but no images,"
    with atomic_output(out, ZIP) as partial, ZipFile(partial, "w") as packed:
        packed.writestr(_entry(study.study, "README.txt", ZIP_DEFLATED), _NOTE.format(shown=shown, data=data))
        for file in sorted(site.rglob("*")):
            image = file.suffix == ".webp"
            hidden = any(part.startswith(".") for part in file.relative_to(site).parts)
            if file.is_file() and not hidden and (with_images or not image):
                name = file.relative_to(site).as_posix()
                packed.writestr(_entry(study.study, name, ZIP_STORED if image else ZIP_DEFLATED), file.read_bytes())


def _entry(study: str, name: str, compression: int) -> ZipInfo:
    """A file without the time at which it was made, so that equal sites have equal zips."""
    entry = ZipInfo(f"{study}/{name}")
    entry.compress_type = compression
    entry.external_attr = 0o644 << 16
    return entry
