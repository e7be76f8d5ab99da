"""Results that were made with other settings than a study asks for.

Snakemake reruns jobs whose settings differ from those recorded in `.snakemake`. Without these records, or for results
copied from elsewhere, it accepts existing files as they are. The results themselves record their settings.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from conceptshare.config.catalog import ModelSpec, Spec
from conceptshare.config.study import Study
from conceptshare.io import layout
from conceptshare.io.files import PROVENANCE, read_object
from conceptshare.io.layout import path, sae_place
from conceptshare.io.provenance import shown

_LISTED = 100


class Difference(NamedTuple):
    """A result whose recorded setting differs from the study's."""

    result: Path
    """Path to delete so that the result is made again."""
    file: Path
    """The output under which Snakemake records it."""
    key: str
    """The parameter that Snakemake records for the study's setting."""
    setting: str
    found: Any
    wanted: Any


def differences(study: Study, results: Path) -> Iterator[Difference]:
    """The existing results of a study whose recorded settings differ from it.

    Args:
        study: the study.
        results: the folder of all results.
    """
    for encoder, spec in study.encoders.items():
        record = path(layout.WEIGHTS, results, encoder=encoder)
        found, wanted = read_object(record).get("settings"), json.loads(spec.model_key())
        yield from _compared(record, record, spec.activations_key(), ModelSpec, found, wanted)
    for dataset, of_dataset in study.datasets.items():
        data, key = path(layout.DATA, results, dataset=dataset), study.dataset_key(dataset)
        found = read_object(data / "manifest.json").get("settings")
        yield from _compared(data, data / "samples.arrow", key, type(of_dataset), found, json.loads(key))
        for encoder, spec in study.encoders.items():
            key = spec.activations_key()
            for store in {
                path(_activations(study, sae), results, dataset=dataset, sae=sae, encoder=encoder): None
                for sae in study.saes
            }:
                yield from _compared(store, store, key, type(spec), _spec(store).get("encoder"), json.loads(key))
        for sae in study.saes:
            at = partial(path, results=results, dataset=dataset, sae=sae)
            yield from _of_saes(study, sae, at)
        for sae in study.coded():
            at = partial(path, results=results, dataset=dataset, sae=sae)
            yield from _of_features(study, sae, at)
            yield from _of_correlations(study, sae, at)
            yield from _of_names(study, at)
    yield from _of_analyses(study, results)


def _activations(study: Study, sae: str) -> str:
    return layout.STREAMED_ACTIVATIONS if study.stream else layout.ACTIVATIONS


def _of_saes(study: Study, sae: str, at: Callable[..., Path]) -> Iterator[Difference]:
    settings = study.saes[sae]
    for encoder, spec in study.encoders.items():
        sources = study.pretrained(sae, encoder)
        place = at(layout.STREAMED_SAES if study.stream else layout.SAES, encoder=encoder)
        for layer in spec.layer_numbers():
            for seed in spec.seeds:
                one, source = place / sae_place(layer, seed), sources.get((layer, seed))
                found = read_object(one / "metrics.json").get("settings")
                file = place if study.stream else one / "cfg.json"
                key = study.sae_key(sae, *(sources.values() if study.stream else filter(None, [source])))
                yield from _compared(place, file, key, type(settings), found, settings.of_training(source))
                if source is not None:
                    copy = at(layout.PRETRAINED, encoder=encoder) / sae_place(layer, seed)
                    made = read_object(copy / "manifest.json").get("spec", {}).get("imported_from")
                    found = made and {"pretrained": made["source"]}
                    yield from _compared(copy, copy / "cfg.json", source, None, found, {"pretrained": source})


def _of_features(study: Study, sae: str, at: Callable[..., Path]) -> Iterator[Difference]:
    name, code = layout.uncoded(sae)
    wanted = {"code": code}
    for member in study.members():
        store = at(layout.FEATURES, member=member)
        if spec := _spec(store):
            found = {"code": spec.get("code", "before_topk")}
            yield from _compared(store, store, study.features_options(sae), type(study.saes[name]), found, wanted)


def _of_correlations(study: Study, sae: str, at: Callable[..., Path]) -> Iterator[Difference]:
    chosen, of_saes = study.correlations, study.saes[layout.uncoded(sae)[0]]
    wanted: list[tuple[str, str, Spec]] = [("precision", chosen.precision, chosen)]
    wanted.append(("unexplained_layers", study.unexplained_options(sae), chosen))
    if chosen.unexplained_layers == "leave_out":
        wanted.append(("max_fvu_global", study.unexplained_options(sae), of_saes))
    for first, second in study.pairs():
        store = at(layout.CORRELATIONS, a=first, b=second)
        spec = _spec(store)
        for name, key, settings in wanted if spec else ():
            found = {name: spec[name]} if name in spec else {}
            yield from _compared(store, store, key, type(settings), found, {name: getattr(settings, name)})


def _of_names(study: Study, at: Callable[..., Path]) -> Iterator[Difference]:
    wanted = shown(study.names.command or "")
    for member in study.members():
        file = at(layout.NAMES, member=member)
        given = read_object(file.with_suffix(f".{PROVENANCE}")).get("job", {}).get("arguments")
        if given:
            found = given[given.index("--command") + 1] if "--command" in given else ""
            key = f"--command {quote(study.names.command)}" if study.names.command else ""
            yield from _compared(file, file, key, None, {"names.command": found}, {"names.command": wanted})


def _of_analyses(study: Study, results: Path) -> Iterator[Difference]:
    """Differences of tables and figures, which record no settings, from the study's provenance record."""
    folder = path(layout.STUDY_FOLDER, results, study=study.study)
    file, key = folder / PROVENANCE, study.study_key()
    recorded, wanted = read_object(file).get("study"), json.loads(key)
    if not isinstance(recorded, dict):
        return
    for kind, entries in wanted["analyses"].items():
        for name, entry in entries.items():
            found = recorded["analyses"][kind].get(name)
            model = type(getattr(study.analyses, kind)[name])
            for one in _compared(folder, file, key, model, found, entry):
                yield one._replace(setting=f"analyses.{kind}.{name}.{one.setting}")
    for name, settings in study.saes.items():
        found = recorded["saes"].get(name, {}).get("max_fvu_global", settings.max_fvu_global)
        wanted_bound = {f"saes.{name}.max_fvu_global": settings.max_fvu_global}
        yield from _compared(folder, file, key, None, dict.fromkeys(wanted_bound, found), wanted_bound)
    if any(matrix.members is None for matrix in study.analyses.matrices.values()):
        first = [
            {f"{name}@{spec['seeds'][0]}" for name, spec in asked["encoders"].items()} for asked in (recorded, wanted)
        ]
        for member in sorted(first[0] - first[1]):  # Snakemake detects added members by their missing files
            yield Difference(folder, file, key, "encoders", member, "without it")


def _compared(
    result: Path, file: Path, key: str, model: type[Spec] | None, found: Any, wanted: dict[str, Any]
) -> Iterator[Difference]:
    """The first setting, if any, that differs; a key that is left out has its default."""
    if not isinstance(found, dict):
        return
    fields = model.model_fields if model is not None else {}
    for name in sorted({*found, *wanted}):
        default = fields[name].get_default(call_default_factory=True) if name in fields else None
        values = found.get(name, default), wanted.get(name, default)
        if json.dumps(values[0], default=str) != json.dumps(values[1], default=str):
            yield Difference(result, file, key, name, *values)
            return


def _spec(store: Path) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = read_object(store / "zarr.json").get("attributes", {}).get("spec", {})
    return spec


def in_words(found: Iterable[Difference]) -> str:
    """Lines that name each result, its setting, the study's setting and the remedy; empty without differences."""
    by_folder: dict[Path, dict[Path, Difference]] = {}
    for one in found:
        by_folder.setdefault(one.result.parent, {}).setdefault(one.result, one)
    lines = []
    for folder, results in by_folder.items():
        listed = results if len(results) <= _LISTED else {folder: next(iter(results.values()))}
        lines += [
            f"{path}: made with {one.setting}: {_plain(one.found)}, not {_plain(one.wanted)}"
            for path, one in listed.items()
        ]
    if lines:
        lines.append("delete these and run again, which makes again what depends on them; or restore the settings")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
