"""Damaged, missing and swapped results give an unchanged study, or one line that says which stage to run again."""

import itertools
import os
import re
import shutil
from functools import partial

import pytest

from conceptshare.activations.extraction import extract_activations
from conceptshare.analysis.formats import write_matrices
from conceptshare.analysis.similarity import compare_stores
from conceptshare.analysis.tables import (
    Stores,
    averages_table,
    layerwise_table,
    matrix_table,
    modality_means,
    pair_table,
    read_direction,
    read_table,
    sae_table,
    sharedness_table,
    write_table,
)
from conceptshare.concepts.examples import record_examples
from conceptshare.concepts.names import name_features
from conceptshare.config.catalog import DatasetSpec
from conceptshare.config.members import GroupedMember, Member
from conceptshare.config.settings import SAESettings
from conceptshare.correlations import correlate_stores
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.figures._saes import _read_training
from conceptshare.io.errors import ConceptshareError
from conceptshare.io.layout import layer_name
from conceptshare.pages import write_member, write_pair
from conceptshare.sae import train_sae
from conceptshare.sae.exchange import import_sae
from conceptshare.sae.features import record_features
from tests.helpers import models
from tests.helpers.samples import contents, write_rows

DAMAGES = 12
"""Damages tried on the inputs of each stage, one at a time."""
SAMPLES, LAYERS, SEEDS = 24, (0, 2), (0, 1)
LINE = r"{}/\S+.*: .*(run .* stages?( again)?|name the folder of one SAE).*"
SETTINGS = SAESettings(expansion=2, k=3, learning_rate=1e-2, batch_samples=8, batch_captions=8)
MEMBERS = ("bert@0", "vit@0", "vit@1")
WEIGHTS = "sae_weights.safetensors"


def write_data(folder):
    write_rows(folder / "rows.parquet", SAMPLES, models.WORDS)
    make_dataset(DatasetSpec(source=str(folder / "rows.parquet")), folder / "data")


def stores_in(study):
    return Stores(study / "features", study / "correlations", study / "similarity")


class Stages:
    """Each stage reads results in one folder and writes its own to another, or returns them."""

    def __init__(self, encoders):
        self._encoders = encoders

    def activations(self, study, out):
        extract_activations(
            self._encoders["bert"], Data(study / "data"), out / "bert.zarr", out / "tokens" / "bert.zarr"
        )

    def sae(self, study, out):
        train_sae(study / "tokens" / "vit.zarr", 2, SETTINGS, 0, out / "sae")

    def importing(self, study, out):
        import_sae(study / "saes" / "vit" / "layer-02" / "seed-0", out / "imported")

    def features(self, study, out):
        record_features(study / "activations" / "vit.zarr", study / "saes" / "vit", 0, out / "vit@0.zarr")

    def similarity(self, study, out):
        stores = (study / "activations" / f"{encoder}.zarr" for encoder in ("bert", "vit"))
        compare_stores(*stores, out / "bert__vit.csv")

    def correlations(self, study, out):
        stores = (study / "features" / f"{member}.zarr" for member in ("bert@0", "vit@0"))
        correlate_stores(*stores, out / "bert@0__vit@0.zarr")

    def names(self, study, out):
        name_features(study / "features" / "vit@0.zarr", study / "data", out / "vit@0.parquet")

    def examples(self, study, out):
        of_vit = study / "features" / "vit@0.zarr", study / "saes" / "vit"
        record_examples(self._encoders["vit"], Data(study / "data"), *of_vit, out / "vit@0")

    def tables(self, study, out):
        stores = stores_in(study)
        grouped = [GroupedMember("bert@0", "text", "language"), GroupedMember("vit@0", "image", "vision", ("vit@1",))]
        write_table(matrix_table(grouped, stores), out / "all.csv")
        write_table(layerwise_table([("bert@0", "vit@0")], stores), out / "layers.csv")
        write_table(pair_table("bert@0", "vit@0", stores), out / "bert@0__vit@0.csv")
        write_table(sharedness_table("vit@0", ["vit@1"], ["bert@0"], stores), out / "shared.csv")
        write_table(sae_table([Member("vit", 0)], study / "saes", stores), out / "saes.csv")

    def averages(self, study, out):
        matrix = read_table(study / "tables" / "all.parquet", "matrix")
        write_table(averages_table(matrix, study / "correlations"), out / "a.csv")

    def formats(self, study, out):
        matrix = read_table(study / "tables" / "all.parquet", "matrix")
        write_matrices(matrix, modality_means(matrix), out / "all")

    def figures(self, study, out):
        rows = read_table(study / "tables" / "saes.parquet", "saes").itertuples()
        found = [str(_read_training(row, study / "saes")) for row in rows]
        found.append(read_direction(study / "tables", "bert@0", "vit@0").to_csv())
        (out / "read").write_text("\n".join(found))

    def pages(self, study, out):
        inputs = [study / name for name in ("features/vit@0.zarr", "examples/vit@0", "names/vit@0.parquet", "tables")]
        write_member(*inputs, ["bert@0"], {"shared": study / "tables" / "shared.parquet"}, "vit@0", out / "vit@0")
        write_pair(study / "correlations" / "bert@0__vit@0.zarr", "vit@0", "bert@0", "pair", out / "pair")


# The inputs of each stage.
READS = {
    "activations": ["data"],
    "sae": ["tokens/vit.zarr"],
    "importing": ["saes/vit/layer-02/seed-0"],
    "features": ["activations/vit.zarr", "saes/vit"],
    "similarity": ["activations"],
    "correlations": ["features"],
    "names": ["features/vit@0.zarr", "data"],
    "examples": ["features/vit@0.zarr", "saes/vit", "data"],
    "tables": ["features", "correlations", "similarity", "saes"],
    "averages": ["tables/all.parquet", "correlations"],
    "formats": ["tables/all.parquet"],
    "figures": ["tables/bert@0__vit@0.parquet", "tables/saes.parquet", "saes/vit"],
    "pages": ["features/vit@0.zarr", "examples", "names", "tables", "correlations/bert@0__vit@0.zarr"],
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    encoders = {}
    for make in (models.vit, models.bert):
        spec = make(folder / make.__name__).spec
        encoders[make.__name__] = load_encoder(spec.model_copy(update={"batch_size": 5, "use_layers": list(LAYERS)}))
    return Stages(encoders)


@pytest.fixture(scope="module")
def complete(stages, tmp_path_factory):
    """The results of a study of two encoders, one with two seeds."""
    study = tmp_path_factory.mktemp("complete")
    write_data(study)
    for name, encoder in stages._encoders.items():
        places = study / "activations" / f"{name}.zarr", study / "tokens" / f"{name}.zarr"
        extract_activations(encoder, Data(study / "data"), *places)
        for layer, seed in itertools.product(LAYERS, SEEDS):
            train_sae(places[1], layer, SETTINGS, seed, study / "saes" / name / layer_name(layer) / f"seed-{seed}")
    for member in MEMBERS:
        name, _, seed = member.rpartition("@")
        features = study / "features" / f"{member}.zarr"
        record_features(study / "activations" / f"{name}.zarr", study / "saes" / name, int(seed), features)
    for a, b in itertools.combinations(MEMBERS, 2):
        stores = (study / "features" / f"{member}.zarr" for member in (a, b))
        correlate_stores(*stores, study / "correlations" / f"{a}__{b}.zarr")
    for stage, out in (
        ("similarity", "similarity"),
        ("names", "names"),
        ("examples", "examples"),
        ("tables", "tables"),
        ("averages", "tables"),
    ):
        (study / out).mkdir(exist_ok=True)
        getattr(stages, stage)(study, study / out)
    return study


def files_of(result):
    """The files of a result, except provenance records, which no stage reads."""
    paths = result.rglob("*") if result.is_dir() else [result]
    return [path for path in paths if path.is_file() and not path.name.endswith("provenance.json")]


def outcome(stage, study, out):
    """The result of a stage, or the message of its error."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        stage(study, out)
    except ConceptshareError as error:
        return str(error)
    return contents(out)


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def cut(path, rng):
    os.truncate(path, rng.integers(path.stat().st_size))


def zero(path, rng):
    """As after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


def lose(path, rng):
    path.unlink()


def exchange(one, other):
    temporary = one.with_name("temporary")
    one.rename(temporary)
    other.rename(one)
    temporary.rename(other)


@pytest.mark.parametrize("name", READS)
def test_any_damage_is_a_one_line_error_or_changes_nothing(name, stages, complete, tmp_path, rng):
    stage, study = getattr(stages, name), tmp_path / "study"
    shutil.copytree(complete, study)
    expected = outcome(stage, study, tmp_path / "out")
    assert isinstance(expected, dict), expected
    files = sorted(path for read in READS[name] for path in files_of(study / read) if path.stat().st_size)
    damages = itertools.cycle((flip, flip, flip, cut, lose, zero))
    for damage, path in zip(damages, rng.choice(files, DAMAGES), strict=False):
        kept = path.read_bytes()
        damage(path, rng)
        found = outcome(stage, study, tmp_path / "out")
        what = f"{damage.__name__} {path.relative_to(study)}: {found if isinstance(found, str) else 'another result'}"
        assert found == expected or re.fullmatch(LINE.format(study), str(found)), what
        path.write_bytes(kept)


EXCHANGES = [
    ("sae", "tokens/vit.zarr", "tokens/bert.zarr"),
    ("sae", "tokens/vit.zarr/layer-00", "tokens/vit.zarr/layer-02"),
    ("features", "activations/vit.zarr", "activations/bert.zarr"),
    ("features", "activations/vit.zarr/layer-00", "activations/vit.zarr/layer-02"),
    ("features", "saes/vit", "saes/bert"),
    ("features", "saes/vit/layer-00", "saes/vit/layer-02"),
    ("features", "saes/vit/layer-00/seed-0", "saes/vit/layer-00/seed-1"),
    (
        "features",
        "saes/vit/layer-00/seed-0/sae_weights.safetensors",
        "saes/vit/layer-02/seed-0/sae_weights.safetensors",
    ),
    ("similarity", "activations/vit.zarr", "activations/bert.zarr"),
    ("correlations", "features/vit@0.zarr", "features/vit@1.zarr"),
    ("correlations", "features/vit@0.zarr/layer-00", "features/vit@0.zarr/layer-02"),
    ("correlations", "features/vit@0.zarr/layer-00/features", "features/vit@0.zarr/layer-02/features"),
    ("names", "features/vit@0.zarr", "features/bert@0.zarr"),
    ("examples", "features/vit@0.zarr", "features/vit@1.zarr"),
    ("examples", "saes/vit/layer-00/seed-0", "saes/vit/layer-00/seed-1"),
    ("tables", "features/vit@0.zarr", "features/vit@1.zarr"),
    ("tables", "correlations/bert@0__vit@0.zarr", "correlations/bert@0__vit@1.zarr"),
    ("tables", "saes/vit/layer-00/seed-0", "saes/vit/layer-00/seed-1"),
    ("averages", "correlations/bert@0__vit@0.zarr", "correlations/bert@0__vit@1.zarr"),
    ("averages", "tables/all.parquet", "tables/layers.parquet"),
    ("formats", "tables/all.parquet", "tables/layers.parquet"),
    ("figures", "saes/vit/layer-00/seed-0", "saes/vit/layer-00/seed-1"),
    ("pages", "examples/vit@0/layer-00.parquet", "examples/vit@0/layer-02.parquet"),
    ("pages", "tables/shared.parquet", "tables/layers.parquet"),
]


@pytest.mark.parametrize(("name", "one", "other"), EXCHANGES)
def test_swapped_results_are_a_one_line_error(name, one, other, stages, complete, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(complete, study)
    exchange(study / one, study / other)
    found = outcome(getattr(stages, name), study, tmp_path / "out")
    assert isinstance(found, str)
    assert re.fullmatch(LINE.format(study), found), found
    assert (one.rpartition("/")[2] in found) or (other.rpartition("/")[2] in found), found


def test_does_not_mix_results_of_two_runs(stages, complete, tmp_path):
    """New features of retrained SAEs, and results made from the old ones."""
    study = tmp_path / "study"
    shutil.copytree(complete, study)
    settings = SETTINGS.model_copy(update={"k": 4})
    shutil.rmtree(study / "saes" / "vit" / "layer-00" / "seed-0")
    train_sae(study / "tokens" / "vit.zarr", 0, settings, 0, study / "saes" / "vit" / "layer-00" / "seed-0")
    again = partial(outcome, study=study, out=tmp_path / "out")
    assert "layer-00/seed-0: not the SAE of the features" in again(stages.examples)
    assert "layer-02/seed-0: an SAE trained with other settings (k is 3, not 4)" in again(stages.features)
    shutil.rmtree(study / "saes" / "vit" / "layer-02" / "seed-0")
    train_sae(study / "tokens" / "vit.zarr", 2, settings, 0, study / "saes" / "vit" / "layer-02" / "seed-0")
    shutil.rmtree(study / "features" / "vit@0.zarr")
    stages.features(study, study / "features")
    for name, what in (("tables", "vit@0.zarr"), ("pages", "names/vit@0.parquet")):
        error = again(getattr(stages, name))
        assert re.search(rf"{what}: made from other features of vit@0 than the current ones; delete it and run", error)
