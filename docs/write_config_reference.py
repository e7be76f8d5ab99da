"""Write the table of every key into config/README.md, from the models that check it.

Run as `python docs/write_config_reference.py`.
"""

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from conceptshare.config.catalog import DatasetSpec, Download, EncoderSpec, Spec
from conceptshare.config.settings import (
    CorrelationSettings,
    Layerwise,
    Matrix,
    NameSettings,
    SAESettings,
    Samples,
    Sharedness,
)
from conceptshare.config.study import Study

README = Path(__file__).parents[1] / "config" / "README.md"
BEGIN, END = "<!-- keys -->\n", "<!-- end of keys -->\n"
SECTIONS: dict[str, type[BaseModel]] = {
    "The study": Study,
    "`datasets.NAME`": DatasetSpec,
    "`datasets.NAME.download`": Download,
    "`encoders.NAME`": EncoderSpec,
    "`saes.NAME`": SAESettings,
    "`correlations`": CorrelationSettings,
    "`names`": NameSettings,
    "`analyses.matrices.NAME`": Matrix,
    "`analyses.layerwise.NAME`": Layerwise,
    "`analyses.sharedness.NAME`": Sharedness,
    "`analyses.samples.NAME`": Samples,
}


def reference() -> str:
    """The tables, as Markdown."""
    return "\n".join(_table(place, model) for place, model in SECTIONS.items())


def with_reference(text: str) -> str:
    """A README's text with its tables replaced."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{reference()}\n{END}", text, flags=re.DOTALL)


def _table(place: str, model: type[BaseModel]) -> str:
    rows = [f"### {place}\n", "| key | meaning | default |", "|---|---|---|"]
    meanings = _meanings(model)
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_as_yaml(field.get_default(call_default_factory=True))}`"
        meaning = " ".join(meanings[name].replace("``", "`").split())
        choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
        if choices:
            meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `{name}` | {meaning} | {default} |")
    return "\n".join(rows) + "\n"


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring below each field. Pydantic could collect them too, at a tenth of a second in every process."""
    bodies = [ast.parse(inspect.getsource(part)).body[0].body for part in model.__mro__ if issubclass(part, Spec)]
    return {
        field.target.id: text.value.value
        for body in bodies
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _as_yaml(value: object) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    return {None: "none", "": '""'}.get(value, str(value)) if isinstance(value, str | None) else str(value)


if __name__ == "__main__":
    README.write_text(with_reference(README.read_text(encoding="utf-8")), encoding="utf-8")
