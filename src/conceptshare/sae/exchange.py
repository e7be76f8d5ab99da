"""Exchange of SAEs with other libraries: SAELens, whose layout is also ours, EleutherAI's sparsify, and saev."""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conceptshare.config.pretrained import (
    BATCH_TOPK,
    SAE_LENS,
    SAEV,
    SPARSIFY,
    ForeignSAE,
    Source,
    check_fit,
    read_foreign,
)
from conceptshare.io import provenance
from conceptshare.io.errors import StoreError, reading
from conceptshare.io.files import SAE_FOLDER, SPARSIFY_FOLDER, Kind, atomic_output
from conceptshare.io.hub import fetch_files
from conceptshare.sae._activations import TopK, saved_activation
from conceptshare.sae._model import SAE, load_sae, save_sae
from conceptshare.sae.folder import sae_file

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of an SAE, and keys of its activation, as SAELens saves them."""


def export_to_sparsify(folder: Path | str, out: Path | str) -> None:
    """Write an SAE in the format of sparsify's `SparseCoder.load_from_disk`: `cfg.json` and `sae.safetensors`.

    Raises:
        StoreError: if the folder holds no TopK SAE, or ``out`` exists.
    """
    sae = load_sae(folder)
    if not isinstance(sae.activation, TopK):
        raise StoreError(
            f"{folder}: its architecture is {sae.activation.architecture}, but sparsify has only TopK SAEs; SAELens "
            f"reads the folder as it is"
        )
    metadata = json.loads((Path(folder) / "cfg.json").read_text(encoding="utf-8")).get("metadata", {})
    F, D = sae.W_dec.shape
    config = {
        "activation": "topk",
        "expansion_factor": F // D,
        "normalize_decoder": False,
        "num_latents": F,
        "k": sae.activation.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
        # sparsify has no such keys and ignores them.
        "model_name": metadata.get("model_name", "unknown"),
        "hook_name": metadata.get("hook_name", "unknown"),
    }
    tensors = {"encoder.weight": sae.W_enc_T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    with _new_folder(Path(out), SPARSIFY_FOLDER) as partial:
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, partial / SPARSIFY)
        (partial / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def import_sae(source: Path | str, out: Path | str, width: int | None = None, layer: int | None = None) -> None:
    """Convert an SAE of SAELens, sparsify or saev to the format of `load_sae`, with weights in float32.

    Operations beyond those of `load_sae` are folded into the weights if that is exact, and rejected otherwise.

    Args:
        source: its folder, or saev's file; as text also on a hub, see `conceptshare.config.pretrained.Source`.
        out: the folder to write. Its `manifest.json` records the source with the commit and the SHA-256 of its files.
        width: D of an encoder, which the SAE's must equal; by default any.
        layer: the layer of that encoder that it must read.

    Raises:
        StoreError: if the folder holds no SAE or one that cannot be expressed or does not fit, or if ``out`` exists.
        HubError: if it cannot be fetched.
    """
    where = Source(str(source)) if isinstance(source, Path) else Source.parse(source)
    place, revision = Path(where.place).expanduser(), None
    if where.repository is not None:
        remedy = f"./{where.repository.rpartition('/')[2]}"
        found = fetch_files(where.repository, "model", where.revision, where.patterns(), remedy).folder
        place, revision = found / where.place, found.name
    for name in ("cfg.json", SAE_LENS):
        if (place / name).is_file():
            sae_file(place, name)
    foreign = read_foreign(place)
    if width is not None and layer is not None:
        check_fit(place, foreign, width, layer)
    with reading(
        StoreError,
        f"{place}: its settings and {foreign.weights.name} do not match or are damaged",
        "; fetch or save the folder again",
    ):
        tensors, config = _READERS[foreign.library](foreign)
        d_sae = len(tensors["W_dec"])
        sae = SAE(foreign.width, d_sae, saved_activation(config | {"d_sae": d_sae}))
        sae.load_saved(tensors)
    files = [foreign.weights, *([] if foreign.library == SAEV else [place / "cfg.json"])]
    origin = {
        "source": str(source),
        "revision": revision,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    with _new_folder(Path(out), SAE_FOLDER) as partial:
        save_sae(sae, partial, foreign.model_name, foreign.hook_name, {"imported_from": origin})
        provenance.record(partial)


def _from_sae_lens(foreign: ForeignSAE) -> Saved:
    folder, config, tensors = foreign.weights.parent, foreign.config, load_file(foreign.weights)
    if config["architecture"] in BATCH_TOPK:
        # Saved in training; SAELens's own inference folder has this threshold too.
        config = config | {"architecture": "jumprelu"}
        tensors["threshold"] = tensors.pop("topk_threshold").expand(len(tensors["b_enc"]))
    # Some versions of SAELens saved a factor per latent, which is 1 if unused.
    if not (tensors.pop("scaling_factor", torch.ones(1)) == 1).all():
        raise StoreError(f"{folder}: its scaling_factor is not 1, which is not supported; name another SAE")
    W_enc, W_dec, b_enc, b_dec = (tensors.pop(name).double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    if not config.get("apply_b_dec_to_input", True):
        b_enc = _subtracted(W_enc, b_enc, b_dec)
    if ((config.get("metadata") or {}).get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        # It reads tokens minus the mean of their dimensions: (x - mean(x) - b_dec) W = (x - b_dec) V + b_dec (V - W),
        # where V is W minus the mean row of W.
        b_enc = b_enc - b_dec @ W_enc.mean(0, keepdim=True).expand_as(W_enc)
        W_enc = W_enc - W_enc.mean(0)
    if config.get("rescale_acts_by_decoder_norm", False):
        # Latents are multiplied by the norm of their decoder row before TopK and divided by it before decoding.
        lengths = W_dec.norm(dim=1)
        if (lengths == 0).any():
            raise StoreError(
                f"{folder}: cfg.json has rescale_acts_by_decoder_norm, but {int((lengths == 0).sum())} decoder rows "
                "have norm 0, by which SAELens divides; set these rows to a non-zero direction, and save the folder "
                "again"
            )
        W_enc, b_enc, W_dec = W_enc * lengths, b_enc * lengths, W_dec / lengths[:, None]
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors}, config


def _from_sparsify(foreign: ForeignSAE) -> Saved:
    tensors = load_file(foreign.weights)
    W_enc, b_enc = tensors.pop("encoder.weight").T, tensors.pop("encoder.bias")
    return {"W_enc": W_enc, "b_enc": b_enc, **tensors}, {"architecture": "topk", "k": foreign.config["k"]}


def _from_saev(foreign: ForeignSAE) -> Saved:
    with foreign.weights.open("rb") as file:
        file.readline()
        tensors = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    tensors["b_enc"] = _subtracted(*(tensors[name].double() for name in ("W_enc", "b_enc", "b_dec")))
    activation = foreign.config["activation"]
    if activation["cls"] == "TopK":
        return tensors, {"architecture": "topk", "k": activation["params"]["top_k"]}
    if activation["cls"] == "Relu":
        return tensors, {"architecture": "standard"}
    threshold = tensors.pop("activation.threshold", None)
    if threshold is None:
        raise StoreError(f"{foreign.weights}: BatchTopK without a threshold, of an older saev; name another SAE")
    return {**tensors, "threshold": threshold.expand(len(tensors["W_dec"]))}, {"architecture": "jumprelu"}


def _subtracted(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """``[F]`` encoder bias if b_dec is subtracted from the input: x W + b = (x - b_dec) W + (b + b_dec W)."""
    return b_enc + b_dec @ W_enc


_READERS = {SAE_LENS: _from_sae_lens, SPARSIFY: _from_sparsify, SAEV: _from_saev}


@contextmanager
def _new_folder(out: Path, kind: Kind) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``out`` on success."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreError(f"{out}: exists already; name another folder, or remove it")
    with atomic_output(out, kind) as partial:
        partial.mkdir()
        yield partial
