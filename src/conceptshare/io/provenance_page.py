"""A study's `provenance.json` as a page to read and print: what it was made with, and every parameter it has."""

from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

_NAMED = {
    "Data sets": ("datasets",),
    "Encoders": ("encoders",),
    "SAEs": ("saes",),
    "wMPPC matrices": ("analyses", "matrices"),
    "Layerwise heatmaps": ("analyses", "layerwise"),
    "Comparative Sharedness": ("analyses", "sharedness"),
}
"""Parts of a study that hold things by name."""
_ABOUT = (
    "Names and values are those of the config, with the defaults and the catalog's entries filled in. Each result has "
    "a provenance.json of its own, in its folder or beside it: the command and seed of its job, when it ran, how long, "
    "in how much memory, and on which machine."
)
_STYLE = """
body { font: 13px/1.4 system-ui, sans-serif; color: #222; background: white; margin: 1.5em; max-width: 75em; }
h1 { font-size: 1.5em; }
h2 { font-size: 1.15em; margin: 1.6em 0 0.4em; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.4em 0 0.8em; }
th, td { text-align: left; vertical-align: top; padding: 0.15em 0.9em 0.15em 0; border-bottom: 1px solid #ddd; }
th { font-weight: 600; white-space: nowrap; }
p { margin: 0.4em 0; }
@media print { body { margin: 0; font-size: 8pt; } tr { break-inside: avoid; } }
"""


def as_page(account: Mapping[str, Any]) -> str:
    """HTML of what `conceptshare.io.provenance.record_study` writes, whole in one file.

    A parameter that has one value for all encoders, say, is listed once; one that differs between them has a column.
    Names and values are those of the config.
    """
    study = account["study"]
    general = {key: value for key, value in study.items() if key not in {path[0] for path in _NAMED.values()}}
    library = account["conceptshare"]
    versions = {"conceptshare": library["version"], "commit": library["commit"], "changed since": library["dirty"]}
    versions |= {"python": account["python"], **account["versions"]}
    machine = {"platform": account["platform"], **account["hardware"], "slurm": account["slurm"]}
    parts = [
        _words(_ABOUT),
        _heading("Versions"),
        _list(_known(versions)),
        _heading("Machine that the study was started on"),
        _list(_known(machine)),
        _heading("The study"),
        _list(_flat(general)),
    ]
    for title, path in _NAMED.items():
        things = study
        for key in path:
            things = things[key]
        if things:
            parts += [_heading(title), _things({name: _flat(values) for name, values in things.items()})]
    title = escape(f"Study {study['study']}: versions and parameters")
    head = f'<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(values).items() if value is not None}


def _heading(words: str) -> str:
    return f"<h2>{escape(words)}</h2>"


def _words(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def _list(values: Mapping[str, Any]) -> str:
    """A table with a row for each value."""
    return _table([], [[key, _text(value)] for key, value in values.items()])


def _things(things: Mapping[str, Mapping[str, Any]]) -> str:
    """What differs between things, a row a thing, and then what is the same for all."""
    texts = {name: {key: _text(value) for key, value in values.items()} for name, values in things.items()}
    one = next(iter(texts.values()))  # all have the same keys
    same = {key: value for key, value in one.items() if all(values[key] == value for values in texts.values())}
    columns = [key for key in one if key not in same]
    differing = [[name, *(values[key] for key in columns)] for name, values in texts.items()]
    parts = [_table(["", *columns], differing) if columns else _words(", ".join(texts))]
    if same:
        parts += [_words("The same for all:") if columns else "", _table([], [[*row] for row in same.items()])]
    return "\n".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys of keys, joined by dots, as messages about the config name them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:
    """A value as a config has it."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{top}</tr>"] if head else []
    for first, *cells in rows:
        lines.append(f"<tr><th>{escape(first)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<div><table>\n" + "\n".join(lines) + "\n</table></div>"
