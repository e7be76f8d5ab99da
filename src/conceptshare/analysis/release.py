"""A study's SAEs as a folder for a model hub, with a model card that describes them."""

import difflib
import json
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pandas as pd

from conceptshare.analysis.tables import read_table
from conceptshare.config.catalog import GlobalToken, is_path
from conceptshare.config.study import Study
from conceptshare.io import layout, provenance
from conceptshare.io.errors import StoreError, StudyError
from conceptshare.io.files import RELEASE, atomic_output, link, read_object
from conceptshare.io.hub import STUDY
from conceptshare.io.layout import coded, path, sae_place
from conceptshare.io.readers import FEATURES, read_spec
from conceptshare.io.seals import MANIFEST
from conceptshare.sae.folder import sae_file, sae_of

_TOKENS: dict[GlobalToken, str] = {
    "first": "the first token",
    "last_token": "the last token",
    "last_position": "the last position, padding included",
    "mean": "the mean of all tokens",
    "max": "the maximum of all tokens",
    "reference": "position 0",
    "given": "the one vector of each sample",
}

# Identifiers that the hub accepts in a model card, from https://huggingface.co/docs/hub/repositories-licenses.
_LICENCES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other
    pddl postgresql unknown unlicense wtfpl zlib
"""

_CARD = """\
---
{data}
---

# SAEs of the study {study}

Sparse autoencoders (SAEs) on the residual stream of {encoders}, one per layer and seed, trained with conceptshare.
`provenance.json` has all settings and versions.

## Load one

```python
from sae_lens import SAE
sae = SAE.from_pretrained("{repository}", "{first}")
latents = sae.encode(x)  # x: [tokens, {width}] float32
```

Its inputs are the residual stream after the block `layer-NN`, counted from 0.

## Encoders

The study compares features at one token of each sample, the global token.

{of_encoders}

## Data

{of_data}

## SAEs

FVU is the fraction of variance that an SAE leaves unexplained. Dead latents reach the decoder for none of the tokens.
SAEs that the study imported are not in this repository: the table names their sources.

{of_saes}

## Floors

The share of an encoder's features that another has (wMPPC), and what to expect by chance: the floor, with the samples
of one encoder shifted, the null, the mean over 20 random orders of the samples, and the excess
(wMPPC - null) / (1 - null).
Features are latents {code}.

{of_floors}

## Licence

{licence}. The encoders and the data have licences of their own.
"""


def check_licence(licence: str) -> None:
    """Make sure that the hub knows a licence.

    Raises:
        StudyError: naming similar identifiers.
    """
    known = _LICENCES.split()
    if licence not in known:
        near = difflib.get_close_matches(licence.casefold(), known, n=3, cutoff=0.5) or ["mit", "apache-2.0"]
        raise StudyError(
            f"--licence {licence}: not an identifier of the hub; take one such as {', '.join(near)}, or other, from "
            f"https://huggingface.co/docs/hub/repositories-licenses"
        )


def write_release(study: Study, results: Path, repository: str, licence: str, features: bool, out: Path) -> None:
    """Write a folder with the SAEs of a finished study and a model card, `README.md`.

    The files are hard links to the results, or copies if the disk allows no links:
    `saes/{dataset}/{sae}/{encoder}/layer-NN/seed-S/` and, with ``features``, `features/{dataset}/{sae}/{member}.zarr`
    and `names/{dataset}/{sae}/{member}.parquet`.

    Args:
        study: the study.
        results: the folder of all results.
        repository: the hub id in the card, ``OWNER/NAME``.
        licence: identifier of the SAEs' licence on the hub.
        features: whether to include feature stores and names.
        out: the folder.

    Raises:
        StoreError: if a result is missing or damaged.
    """
    from huggingface_hub import ModelCardData

    whole = path(layout.PROVENANCE, results, study=study.study)
    if not whole.is_file():
        raise StoreError(f"{whole}: no such file, so the study is not complete; run it with snakemake first")
    with atomic_output(out, RELEASE) as partial:
        link(whole, partial / provenance.FILE)
        saes = _link_saes(study, results, partial)
        if features:
            _link_features(study, results, partial)
        data = ModelCardData(
            license=licence,
            library_name="saelens",
            tags=["sparse-autoencoder", "conceptshare"],
            datasets=_on_hub(spec.source for spec in study.datasets.values()) or None,
            base_model=_on_hub(spec.model for spec in study.encoders.values()) or None,
        )
        data[STUDY] = study.study
        card = _CARD.format(
            data=data,
            study=study.study,
            encoders=", ".join(dict.fromkeys(saes.encoder[saes.here])),
            repository=repository,
            first=saes.SAE[saes.here].iloc[0].strip("`"),
            width=saes.width[saes.here].iloc[0],
            code={"before_topk": "before TopK", "after_topk": "after TopK"}[study.features[0]],
            of_encoders=_encoders(study, results).to_markdown(index=False),
            of_data=_data(study, results).to_markdown(index=False),
            of_saes=saes.drop(columns=["encoder", "here"]).to_markdown(index=False, floatfmt=".3f"),
            of_floors=_floors(study, results).to_markdown(index=False, floatfmt=".3f"),
            licence=licence,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")


def _link_saes(study: Study, results: Path, out: Path) -> pd.DataFrame:
    """Link the files of the SAEs that the study trained; return the size and quality of all."""
    rows = []
    pattern = layout.STREAMED_SAES if study.stream else layout.SAES
    for dataset, sae, (encoder, seed) in product(study.datasets, study.saes, study.members()):
        imported = study.pretrained(sae, encoder)
        folder = path(pattern, results, dataset=dataset, sae=sae, encoder=encoder)
        for layer in study.encoders[encoder].layer_numbers():
            one, record = sae_of(folder, layer, seed)
            place = Path("saes", dataset, sae, encoder, sae_place(layer, seed))
            for name in () if imported else (*record["files"], MANIFEST, provenance.FILE):
                link(sae_file(one, name, record) if name in record["files"] else one / name, out / place / name)
            metrics, config = (json.loads((one / name).read_bytes()) for name in ("metrics.json", "cfg.json"))
            name = f"`{place.as_posix()}`"
            if imported:
                name = f"{encoder}, layer {layer}, seed {seed}: {provenance.shown(imported[layer, seed])}"
            row = {"encoder": encoder, "here": not imported, "SAE": name}
            row |= {"width": config["d_in"], "latents": config["d_sae"], "architecture": config["architecture"]}
            row["trained on"] = "imported" if imported else f"{study.saes[sae].train_on} tokens"
            for key, label in (("fvu", "FVU"), ("dead", "dead")):
                row |= {f"{label}, {which} tokens": metrics[f"{which}_tokens"][key] for which in ("all", "global")}
            rows.append(row | {"measured on": metrics["measured_on"]})
    if not any(row["here"] for row in rows):
        raise StoreError(f"{study.study}: no SAEs to publish, as all were imported; name a study that trains some")
    return pd.DataFrame(rows)


def _link_features(study: Study, results: Path, out: Path) -> None:
    """Link all feature stores, and the tables of names that pages show."""
    named = study.coded(study.features[0])
    for dataset, sae, member in product(study.datasets, study.coded(), study.members()):
        place = {"dataset": dataset, "sae": sae, "member": member}
        store = path(layout.FEATURES, results, **place)
        read_spec(store, FEATURES)
        for file in sorted(store.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                link(file, out / "features" / dataset / sae / store.name / file.relative_to(store))
        if sae in named:
            names = path(layout.NAMES, results, **place)
            read_table(names, "names", columns=["name"])
            link(names, out / "names" / dataset / sae / names.name)


def _encoders(study: Study, results: Path) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "encoder": name,
            "model": provenance.shown(spec.model),
            "revision": read_object(path(layout.WEIGHTS, results, encoder=name)).get("revision") or "",
            "reads": spec.modality,
            "layers": spec.layers,
            "global token": _TOKENS[spec.global_token],
            "prompt": f"`{spec.template!r}`" if spec.template else "",
        }
        for name, spec in study.encoders.items()
    )


def _data(study: Study, results: Path) -> pd.DataFrame:
    manifests = {name: read_object(path(layout.DATA, results, dataset=name) / MANIFEST) for name in study.datasets}
    return pd.DataFrame(
        {
            "data set": name,
            "source": provenance.shown(study.datasets[name].source),
            "revision": manifest.get("revision") or "",
            "samples": manifest.get("rows"),
        }
        for name, manifest in manifests.items()
    )


def _floors(study: Study, results: Path) -> pd.DataFrame:
    """wMPPC with floor and null: of matrices, over all layers, and of layerwise analyses, averaged over layers."""
    tables = []
    for dataset, sae in product(study.datasets, study.saes):
        place = {"study": study.study, "dataset": dataset, "sae": coded(sae, study.features[0])}
        folder = path(layout.ANALYSES, results, **place)
        for name in study.analyses.matrices:
            table = read_table(folder / "matrices" / f"{name}.parquet", "matrix", filters=[("reading", "==", "pooled")])
            tables.append(table.assign(**place, layers="all together"))
        for name in study.analyses.layerwise:
            table = read_table(folder / "layerwise" / f"{name}.parquet", "layerwise")
            mean = table.groupby(["source", "target"], sort=False, as_index=False).mean(numeric_only=True)
            tables.append(mean.assign(**place, layers="mean over pairs"))
    columns = ["dataset", "sae", "source", "target", "layers", "wmppc", "floor", "null", "excess"]
    found = pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)
    return found.drop_duplicates(columns[:5]).rename(columns={"dataset": "data set", "sae": "SAEs", "wmppc": "wMPPC"})


def _on_hub(names: Iterable[str]) -> list[str]:
    """The names that are ids of a hub, each once."""
    plain = (name.removeprefix("hf-hub:") for name in names if not is_path(name))
    return [name for name in dict.fromkeys(plain) if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
