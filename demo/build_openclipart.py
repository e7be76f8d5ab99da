"""Makes `openclipart.parquet`, the demo's image-caption pairs, from two Debian packages.

The packages `openclipart-png` and `openclipart-svg` hold the same public domain drawings twice: as pictures
and as SVG files, whose metadata keep the title, the description and the keywords that a person wrote. The
script joins the two and writes one Parquet file, with the same bytes every time:

    python demo/build_openclipart.py
    python demo/build_openclipart.py --packages FOLDER_WITH_THE_TWO_DEB_FILES
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import html
import io
import json
import re
import struct
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops

VERSION = "1:0.18+dfsg-19"
PACKAGES = ("openclipart-png", "openclipart-svg")
ROOT = Path("usr/share/openclipart")

# Folders of icons, arrows, gradients and the like, or of what nobody has sorted. Of some, the parts that show
# things are kept; the empty name stands for the files that lie in the folder itself.
LEFT_OUT: dict[str, frozenset[str]] = {
    "computer": frozenset({"hardware"}),
    "decorations": frozenset(),
    "shapes": frozenset(),
    "signs_and_symbols": frozenset({"flags", "weather", "clocks", "money"}),
    "special": frozenset(),
    "unsorted": frozenset(),
}

# Flags look alike, and would be every other feature that image and text encoders share.
FEWER = {"signs_and_symbols/flags": 40}

MAX_PIXELS = 16_000_000  # some pictures have hundreds of megapixels, and would fill the memory
SIDE = 128
COLOURS = 256
MAX_CAPTION = 300
SAME_CAPTION = 3  # drawings of one thing by one author often share their words; a few of them are welcome

DC = "{http://purl.org/dc/elements/1.1/}"
RDF_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


def phrases(text: str) -> frozenset[str]:
    """Returns the phrases of a list with a comma after each."""
    return frozenset(" ".join(phrase.split()) for phrase in text.split(","))


BOILERPLATE_KEYWORDS = phrases(
    """appicon, clip art, clipart, externalsource, hash, icon, iconset, icons, image, images, inkscape,
    map symbol, md, media, menu, object, openclipart, png, public domain, sign, signs and symbols, svg,
    symbol, symbols, united nations member, unsorted, vector, vectorized"""
)
BOILERPLATE_TITLES = phrases(
    """advertising, aiga symbol signs, card, clip art, clipart, drawing, etiquette, etiquette icons, icon,
    image, lemon svg theme, lemon theme, map symbols, menu clip art collection example, new document,
    no title, none, people, picture, road signs, svg road signs, symbol, test, title, unknown, untitled,
    various cliparts"""
)
# "Printer symbol" adds nothing to the title "printer".
EMPTY_WORDS = frozenset({"symbol", "sign", "icon", "clipart", "image", "picture"})
# The archive's own classes, such as "weathersym".
CLASS_KEYWORD = re.compile(r"^\w+sym(bol)?$")
# A demo is shown to anybody, in class and at work.
UNSUITABLE = re.compile(r"\bsex|\bnude|pantyhose|\bnazi|swastika", re.IGNORECASE)
# The archive's submission rounds, such as "R15 General".
ROUND_TITLE = re.compile(r"^r\d+ (general|su?b?i?b?mission.*)$", re.IGNORECASE)
SIGNED_TITLE = re.compile(r"^clipart by (?P<author>.+?) - (?P<title>.+)$", re.IGNORECASE)
# What the archive's own software left where a text should be.
PERL_REFERENCE = re.compile(r"^(hash|array)?\s*\(?0x[0-9a-f]+\)?$", re.IGNORECASE)
ADDRESS = re.compile(r"\S+@\S+\.\S+|(?:https?://|www\.)\S*|\b\w[\w-]*\.(?:org|com|net|de|fr|it)\b\S*", re.IGNORECASE)
MARKUP = re.compile(r"<[^>]{1,200}>")
BOILERPLATE_SENTENCE = re.compile(
    r"public domain|creative ?commons|copyright|licen[cs]e|inkscape|sodipodi|\bsvg\b|open ?clip ?art|"
    r"converted|vectori[sz]|\beps\b|screensho|your (web)?site|wikipedia|enjoy it",
    re.IGNORECASE,
)


# A picture file of the author's that the drawing shows; the PNG has only a warning in its place.
LINKED_PICTURE = re.compile(r"""<(?:svg:)?image\b[^>]*?href\s*=\s*["'](?!data:|#)""")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a person wrote about a drawing."""

    title: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()
    creator: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of the table, and what the selection needs to know about it."""

    id: str
    image: bytes
    caption: str
    folder: str
    creator: str


def fetch(folder: Path) -> None:
    """Downloads the two packages, in the version whose counts the README gives."""
    names = [f"{name}={VERSION}" for name in PACKAGES]
    subprocess.run(["apt-get", "download", *names], cwd=folder, check=True)


def unpack(packages: Path, folder: Path) -> Path:
    """Unpacks the two packages into `folder` and returns the folder that holds `png` and `svg`."""
    for name in PACKAGES:
        files = sorted(packages.glob(f"{name}_*.deb"))
        if len(files) != 1:
            raise SystemExit(f"{packages} holds {len(files)} files {name}_*.deb, and needs one")
        version = subprocess.run(
            ["dpkg-deb", "-f", files[0], "Version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        if version != VERSION:
            raise SystemExit(f"{files[0].name} has version {version}, and this script is for {VERSION}")
        subprocess.run(["dpkg-deb", "-x", files[0], folder], check=True)
    return folder / ROOT


def squeeze(text: str | None) -> str:
    """Returns the text on one line, without markup and without entities that were escaped twice."""
    text = html.unescape(html.unescape(text or ""))
    return " ".join(MARKUP.sub(" ", text).split())


def read_work(svg: Path) -> Work:
    """Reads the metadata of a drawing, also of one whose XML is broken somewhere."""
    content = svg.read_bytes()
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return read_broken_work(content.decode("utf-8", errors="replace"))
    work = next((element for element in root.iter() if element.tag.endswith("}Work")), None)
    if work is None:
        return Work()
    creator = work.find(f"{DC}creator")
    subject = work.find(f"{DC}subject")
    return Work(
        title=squeeze(work.findtext(f"{DC}title")),
        description=squeeze(work.findtext(f"{DC}description")),
        keywords=tuple(squeeze(item.text) for item in subject.iter(RDF_ITEM)) if subject is not None else (),
        creator=squeeze(" ".join(creator.itertext())) if creator is not None else "",
    )


def read_broken_work(text: str) -> Work:
    """Reads by pattern what the XML parser refused."""

    def first(tag: str) -> str:
        found = re.search(rf"<dc:{tag}\b[^>/]*>(.*?)</dc:{tag}>", text, re.DOTALL)
        return found[1] if found else ""

    keywords = re.findall(r"<rdf:li\b[^>/]*>(.*?)</rdf:li>", first("subject"), re.DOTALL)
    return Work(
        title=squeeze(first("title")),
        description=squeeze(first("description")),
        keywords=tuple(squeeze(keyword) for keyword in keywords),
        creator=squeeze(first("creator")),
    )


def words_of(text: str) -> list[str]:
    """Returns the words of a text in a form in which "Apples" and "apple" are the same."""
    return [word.removesuffix("s") if len(word) > 3 else word for word in re.findall(r"\w+", text.casefold())]


def clean_title(work: Work, uses: collections.Counter[str]) -> str:
    """Returns the title as one would write it, or nothing where it says nothing.

    Args:
        work: What is known of the drawing.
        uses: How many drawings have each title, as written.
    """
    title = work.title
    signed = SIGNED_TITLE.match(title)
    if signed:
        # This author drew one file over the last, so that several drawings bear the title of one.
        if uses[title] > 1:
            return ""
        title = signed["title"]
    title = re.sub(r"\.(svg|png|eps|jpe?g)\b", " ", title, flags=re.IGNORECASE)
    title = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", title.replace("_", " "))
    title = re.sub(r"\([^)]*$", "", ADDRESS.sub(" ", title))
    title = " ".join(re.sub(r"[\s#-]*\d+[a-z]?$", "", title).split()).strip(" -.,;:")
    says_nothing = (
        title.casefold() in BOILERPLATE_TITLES
        or title.casefold() == work.creator.casefold()
        or ROUND_TITLE.match(title)
        or PERL_REFERENCE.match(title)
        or not re.search(r"[^\W\d]{2}", title)
    )
    return "" if says_nothing else title


def clean_description(work: Work, title: str, uses: collections.Counter[str]) -> str:
    """Returns the sentences of the description that tell of the drawing and do not repeat the title."""
    if PERL_REFERENCE.match(work.description) or uses[work.description] > 6:
        return ""
    text = ADDRESS.sub(" ", work.description)
    said = set(words_of(title))
    sentences = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        sentence = " ".join(sentence.split()).strip(" -,;:.")
        words = set(words_of(sentence))
        by_author = sentence.casefold() == work.creator.casefold()
        if words - said - EMPTY_WORDS and not by_author and not BOILERPLATE_SENTENCE.search(sentence):
            sentences.append(sentence)
            said |= words
    return ". ".join(sentences)


def clean_keywords(work: Work, said: str) -> list[str]:
    """Returns the keywords that are words about the drawing and add to what is already said."""
    known = set(words_of(said))
    kept = []
    for keyword in (part for item in work.keywords for part in re.split(r"[,;]", item)):
        keyword = " ".join(keyword.replace("_", " ").casefold().split())
        words = words_of(keyword)
        if (
            not re.search(r"[^\W\d]{2}", keyword)
            or keyword in BOILERPLATE_KEYWORDS
            or keyword == work.creator.casefold()
            or ADDRESS.search(keyword)
            or PERL_REFERENCE.match(keyword)
            or CLASS_KEYWORD.match(keyword)
            or known.issuperset(set(words) - EMPTY_WORDS)
        ):
            continue
        kept.append(keyword)
        known |= set(words)
    return kept


def shorten(text: str, length: int = MAX_CAPTION) -> str:
    """Cuts a text at the last word that fits."""
    return text if len(text) <= length else text[: length + 1].rsplit(" ", 1)[0].rstrip(" ,.;:-")


def write_caption(work: Work, titles: collections.Counter[str], descriptions: collections.Counter[str]) -> str:
    """Joins title, description and keywords, or returns nothing for a drawing whose title says nothing."""
    title = clean_title(work, titles)
    if not title:
        return ""
    title = title[0].upper() + title[1:]
    description = clean_description(work, title, descriptions)
    keywords = clean_keywords(work, f"{title} {description}")
    return shorten(". ".join(part for part in (title, description, ", ".join(keywords)) if part))


def png_size(png: Path) -> tuple[int, int]:
    """Reads width and height from the header, without decoding anything."""
    with png.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:8] != b"\x89PNG\r\n\x1a\n":
        return 0, 0
    return struct.unpack(">II", header[16:24])


def drawn_box(layer: Image.Image, image: Image.Image) -> tuple[int, int, int, int] | None:
    """Returns the box of what is drawn, or None where nothing is.

    Args:
        layer: The drawing with its transparency.
        image: The same drawing on white.
    """
    visible = layer.getchannel("A").point(lambda value: 255 if value > 12 else 0)
    white = Image.new("RGB", image.size, "white")
    box = ImageChops.difference(image, white).convert("L").point(lambda value: 255 if value > 12 else 0).getbbox()
    if box is None or visible.getbbox() != (0, 0, *image.size):
        return box and visible.getbbox()
    # White all around is a page. White on some sides only is part of the drawing.
    is_page = box[0] > 0 and box[1] > 0 and box[2] < image.width and box[3] < image.height
    return box if is_page else (0, 0, *image.size)


def draw(png: Path, trim: bool) -> Image.Image | None:
    """Returns the drawing on white, at most 128 pixels wide and high, or None where nothing is drawn.

    Args:
        png: The picture.
        trim: Whether to cut off the empty page around the drawing.
    """
    with Image.open(png) as file:
        layer = file.convert("RGBA")
    page = Image.new("RGBA", layer.size, "white")
    page.alpha_composite(layer)
    image = page.convert("RGB")
    box = drawn_box(layer, image)
    if box is None:
        return None
    if not trim:
        box = (0, 0, *image.size)
    # Many drawings are a small thing on a letter page, of which 128 pixels would leave nothing.
    margin = max(1, round(0.04 * max(box[2] - box[0], box[3] - box[1])))
    left, top = max(0, box[0] - margin), max(0, box[1] - margin)
    image = image.crop((left, top, min(image.width, box[2] + margin), min(image.height, box[3] + margin)))
    scale = min(1.0, SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image


def encode(image: Image.Image) -> bytes:
    """Encodes a drawing as a PNG with a palette: lines stay sharp, and flat colours take little space."""
    buffer = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def is_pictorial(id: str) -> bool:
    """Says whether a drawing lies in a folder of pictures of things."""
    top, *below = id.split("/")[:-1]
    return top not in LEFT_OUT or (below[0] if below else "") in LEFT_OUT[top]


def shuffle_key(id: str, seed: int) -> str:
    """Returns a key whose order is random to us and the same on every machine."""
    return hashlib.sha256(f"{seed}:{id}".encode()).hexdigest()


def find(folder: Path, suffix: str) -> dict[str, Path]:
    """Returns the files below a folder by their relative path without the suffix."""
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob(f"*{suffix}")}


def usable_pairs(root: Path, dropped: collections.Counter[str], seed: int) -> Iterator[Pair]:
    """Yields every pair that is worth having, in an order that no folder governs.

    Args:
        root: The folder that holds `png` and `svg`.
        dropped: Receives the number of pairs left out, by reason.
        seed: Decides the order, and with it which one of several equal pairs is kept.
    """
    svgs, pngs = find(root / "svg", ".svg"), find(root / "png", ".png")
    both = sorted(svgs.keys() & pngs.keys(), key=lambda id: shuffle_key(id, seed))
    dropped["without a partner"] = len(svgs.keys() ^ pngs.keys())
    works = {id: read_work(svgs[id]) for id in both if is_pictorial(id)}
    dropped["folder without pictures"] = len(both) - len(works)
    titles = collections.Counter(work.title for work in works.values())
    descriptions = collections.Counter(work.description for work in works.values())
    captions: collections.Counter[str] = collections.Counter()
    images: set[bytes] = set()
    for id, work in works.items():
        width, height = png_size(pngs[id])
        caption = write_caption(work, titles, descriptions)
        if not 0 < width * height <= MAX_PIXELS:
            dropped["picture too large"] += 1
        elif not caption:
            dropped["title says nothing"] += 1
        elif UNSUITABLE.search(caption):
            dropped["unsuitable"] += 1
        elif LINKED_PICTURE.search(svgs[id].read_text(encoding="utf-8", errors="replace")):
            dropped["linked picture missing"] += 1
        elif captions[caption.casefold()] == SAME_CAPTION:
            dropped[f"caption used {SAME_CAPTION} times already"] += 1
        elif (image := draw(pngs[id], trim="/flags/" not in id)) is None:  # the white of a flag is its own
            dropped["picture is empty"] += 1
        elif min(image.size) * 6 < max(image.size):
            dropped["picture is a line"] += 1
        elif (content := hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()) in images:
            dropped["same picture"] += 1
        else:
            captions[caption.casefold()] += 1
            images.add(content)
            yield Pair(id, encode(image), caption, "/".join(id.split("/")[:-1][:2]), work.creator)


def select(pairs: Iterable[Pair], per_folder: int) -> list[Pair]:
    """Takes at most `per_folder` pairs of a folder, or as `FEWER` says, from its authors in turns."""
    folders: dict[str, list[tuple[int, Pair]]] = collections.defaultdict(list)
    turns: collections.Counter[tuple[str, str]] = collections.Counter()
    for pair in pairs:
        turns[pair.folder, pair.creator] += 1
        folders[pair.folder].append((turns[pair.folder, pair.creator], pair))
    chosen = []
    for folder, ranked in folders.items():
        ranked.sort(key=lambda item: item[0])  # stable: within a turn the order stays the shuffled one
        chosen += [pair for _, pair in ranked[: FEWER.get(folder, per_folder)]]
    return sorted(chosen, key=lambda pair: pair.id)


def write_table(pairs: list[Pair], path: Path) -> None:
    """Writes the pairs with the schema by which the library `datasets` decodes the pictures."""
    text = {"dtype": "string", "_type": "Value"}
    info = {"info": {"features": {"id": text, "image": {"_type": "Image"}, "caption": text}}}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("id", pa.string()), ("image", picture), ("caption", pa.string())],
        metadata={"huggingface": json.dumps(info)},
    )
    rows = [
        {"id": pair.id, "image": {"bytes": pair.image, "path": f"{pair.id}.png"}, "caption": pair.caption}
        for pair in pairs
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", row_group_size=500)


def report(pairs: list[Pair], usable: int, dropped: collections.Counter[str], path: Path) -> None:
    """Prints what was dropped and what is left."""
    for reason, number in dropped.items():
        print(f"{number:6d}  {reason}")
    print(f"{usable - len(pairs):6d}  beyond a folder's share")
    print(f"{len(pairs):6d}  pairs written, {path.stat().st_size / 1e6:.2f} MB")
    for name in ("folder", "creator"):
        largest = collections.Counter(getattr(pair, name) for pair in pairs).most_common(5)
        print(f"largest by {name}: {', '.join(f'{key} {number}' for key, number in largest)}")


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with the two .deb files, instead of a download")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().with_name("openclipart.parquet"))
    parser.add_argument("--per-folder", type=int, default=100, help="most pairs of a folder of the second level")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dropped: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.packages is None:
            fetch(Path(folder))
        root = unpack(arguments.packages or Path(folder), Path(folder))
        usable = list(usable_pairs(root, dropped, arguments.seed))
    pairs = select(usable, arguments.per_folder)
    write_table(pairs, arguments.output)
    report(pairs, len(usable), dropped, arguments.output)


if __name__ == "__main__":
    main()
