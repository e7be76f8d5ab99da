"""How Sphinx makes a site of this folder: without a network, and without one to look at it.

The pages are also read where the repository is, so their links are those of its files. `rewrite_links` turns what leads
out of this folder into what the site has.
"""

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib.metadata import version as version_of
from pathlib import Path, PurePosixPath
from typing import Any

import typer.main
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from typer.testing import CliRunner

from conceptshare.cli import app as cli

DOCS = Path(__file__).parent
CLONE = DOCS.parent
# Pages of the site that include a file from elsewhere in the repository.
INCLUDED = {
    CLONE / "config/README.md": DOCS / "configuration.md",
    CLONE / "results/README.md": DOCS / "results.md",
    CLONE / "demo/README.md": DOCS / "demo.md",
}

project = "conceptshare"
author = "The conceptshare developers"
version = release = version_of("conceptshare")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # `_signature` has them
maximum_signature_line_length = 100
default_role = "code"
highlight_language = "none"

html_theme = "furo"
html_title = "conceptshare"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"


def rewrite_links(text: str, file: Path, page: Path) -> str:
    """Links of a file of the repository as they have to be on a page of the site.

    What the site has as a page is linked as that page; any other file becomes a download, which Sphinx copies; a folder
    is named without a link.

    Args:
        text: Markdown.
        file: the file that it is from, which its links are relative to.
        page: the page that it gets on.
    """

    def rewritten(link: re.Match[str]) -> str:
        words, target, anchor = link["words"], link["target"], link["anchor"] or ""
        path = (file.parent / target).resolve()
        if path.is_dir():
            return words
        if not path.is_file():
            return link[0]
        place = os.path.relpath(INCLUDED.get(path, path), page.parent)
        return f"[{words}]({PurePosixPath(place)}{anchor})"

    return re.sub(r"(?<!!)\[(?P<words>[^][]*)\]\((?P<target>[^():#\s]+)(?P<anchor>#[^()\s]*)?\)", rewritten, text)


def _on_source(app: Sphinx, page: str, source: list[str]) -> None:
    file = DOCS / f"{page}.md"
    source[0] = rewrite_links(source[0], file, file)
    if page == "command-line":
        source[0] = source[0].replace("<!-- commands -->", _commands())


def _commands() -> str:
    """What `conceptshare COMMAND --help` prints of every command, as Markdown."""
    runner = CliRunner(env={"COLUMNS": "80"})
    return "\n".join(
        f"## `{name}`\n\n```text\n{runner.invoke(cli, [*name.split(), '--help'], prog_name='conceptshare').stdout}```\n"
        for name in _names(typer.main.get_command(cli))
    )


def _names(command: Any, name: str = "") -> Iterator[str]:
    """The names of all commands that do something, in the order of `--help`."""
    for part, below in getattr(command, "commands", {}).items():
        full = f"{name} {part}".strip()
        yield from _names(below, full) if hasattr(below, "commands") else [full]


def _on_include(app: Sphinx, file: Path, page: str, source: list[str]) -> None:
    source[0] = rewrite_links(source[0], (DOCS / file).resolve(), DOCS / f"{page}.md")


def _signature(app: Sphinx, what: str, name: str, thing: Any, *_: object) -> tuple[str, str | None] | None:
    """A signature as the source has it: what Sphinx makes of the type `ArrayLike` is ten lines long."""
    if what not in {"class", "function", "method"} or not thing.__module__.startswith("conceptshare."):
        return None
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body
    if isinstance(found, ast.FunctionDef):
        return _arguments(found), ast.unparse(found.returns).strip("'") if found.returns else None
    assert isinstance(found, ast.ClassDef)
    for part in found.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return _arguments(part), None
    if is_dataclass(thing) or issubclass(thing, tuple):
        fields = [ast.unparse(part) for part in found.body if isinstance(part, ast.AnnAssign)]
        return f"({', '.join(fields)})", None
    return "", None  # of a part of a study, the keys are in the reference of configuration


def _arguments(function: ast.FunctionDef) -> str:
    given = function.args
    given.args = [argument for argument in given.args if argument.arg not in {"self", "cls"}]
    return f"({ast.unparse(given)})"


def _attribute(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    if what not in {"attribute", "data", "property"} or not lines:
        return
    if lines[0].startswith("Alias for field number"):  # what Python says of a field of which nothing is said
        lines.clear()
    else:
        # Napoleon takes what stands before an attribute's first colon for its type; this says that there is none.
        lines[0] = f":{lines[0]}"


def _inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("source-read", _on_source)
    app.connect("include-read", _on_include)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _attribute, priority=400)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
