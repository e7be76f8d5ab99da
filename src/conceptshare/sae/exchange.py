"""SAEs from and for other libraries: SAELens, whose layout is ours, and EleutherAI's sparsify."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conceptshare.io.errors import ConceptshareError, StoreError
from conceptshare.io.files import SAE, SPARSIFY, Kind, atomic_output
from conceptshare.sae._model import TopKSAE, load_sae, save_sae
from conceptshare.sae.folder import other_meaning, sae_file

_SAE_LENS_WEIGHTS = "sae_weights.safetensors"
_SPARSIFY_WEIGHTS = "sae.safetensors"
# Keys of sparsify's cfg.json that change what an SAE computes, with what they must say. `signed` is of older versions.
_SPARSIFY_MEANING = {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False}


class _Found(NamedTuple):
    """An SAE as `TopKSAE` has it, and where it is from."""

    tensors: dict[str, Tensor]
    k: int
    model_name: str
    hook_name: str


def export_to_sparsify(folder: Path | str, out: Path | str) -> None:
    """Write an SAE as sparsify's `SparseCoder.load_from_disk` reads it: `cfg.json` and `sae.safetensors`.

    Raises:
        StoreError: where the folder holds no SAE, or ``out`` exists.
    """
    sae = load_sae(folder)
    metadata = json.loads((Path(folder) / "cfg.json").read_text(encoding="utf-8")).get("metadata", {})
    F, D = sae.W_dec.shape
    config = {
        "activation": "topk",
        "expansion_factor": F // D,
        "normalize_decoder": False,
        "num_latents": F,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
        # sparsify has no keys for these, and leaves them alone.
        "model_name": metadata.get("model_name", "unknown"),
        "hook_name": metadata.get("hook_name", "unknown"),
    }
    tensors = {"encoder.weight": sae.W_enc_T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    with _new_folder(Path(out), SPARSIFY) as aside:
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, aside / _SPARSIFY_WEIGHTS)
        (aside / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def import_sae(folder: Path | str, out: Path | str) -> None:
    """Write an SAE of SAELens's or sparsify's as `load_sae` reads it, with weights in float32.

    What either library computes besides a TopK SAE is folded into the weights where that is exact, and refused
    elsewhere.

    Raises:
        StoreError: where the folder holds no SAE, or one that cannot be expressed, or where ``out`` exists.
    """
    folder = Path(folder)
    if (folder / _SPARSIFY_WEIGHTS).is_file():
        read, weights = _from_sparsify, _SPARSIFY_WEIGHTS
    elif (folder / _SAE_LENS_WEIGHTS).is_file():
        read, weights = _from_sae_lens, _SAE_LENS_WEIGHTS
    else:
        raise StoreError(
            f"{folder}: neither {_SAE_LENS_WEIGHTS} (SAELens) nor {_SPARSIFY_WEIGHTS} (sparsify) is there; "
            "name the folder of one SAE"
        )
    try:
        config = json.loads(sae_file(folder, "cfg.json").read_text(encoding="utf-8"))
        found = read(folder, config, load_file(sae_file(folder, weights)))
        sae = TopKSAE(config["d_in"], len(found.tensors["W_dec"]), found.k)
        sae.load_state_dict(found.tensors)
    except ConceptshareError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        said = " ".join(str(error).split())
        raise StoreError(
            f"{folder}: cfg.json and {weights} hold no SAE that fits together ({type(error).__name__}: {said}); "
            "fetch or save the folder again"
        ) from error
    with _new_folder(Path(out), SAE) as aside:
        save_sae(sae, aside, found.model_name, found.hook_name)


def _from_sae_lens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Found:
    if "activation_fn_kwargs" in config:
        raise StoreError(
            f"{folder}: cfg.json is of SAELens before version 6; load it with a newer one (SAE.load_from_disk) "
            "and save it again (save_model)"
        )
    other = other_meaning(config)
    subtracted = other.pop("apply_b_dec_to_input", True)
    rescaled = other.pop("rescale_acts_by_decoder_norm", False)
    # For some time SAELens saved a factor for each latent, which is 1 where it means nothing.
    if not (tensors.pop("scaling_factor", torch.ones(1)) == 1).all():
        other["scaling_factor"] = "not 1"
    _refuse(folder, other, "SAELens's TopK SAEs on activations as they are")
    W_enc, W_dec = tensors.pop("W_enc"), tensors.pop("W_dec")
    b_enc, b_dec = tensors.pop("b_enc"), tensors.pop("b_dec")
    if not subtracted:
        # x W + b = (x - b_dec) W + (b + b_dec W)
        b_enc = b_enc.double() + b_dec.double() @ W_enc.double()
    if rescaled:
        # Latents are multiplied by the length of their decoder row before the largest are chosen, and divided by it
        # before they are decoded.
        lengths = W_dec.double().norm(dim=1)
        if (lengths == 0).any():
            raise StoreError(
                f"{folder}: cfg.json has rescale_acts_by_decoder_norm, and {int((lengths == 0).sum())} decoder rows "
                "have length 0, by which SAELens divides; give those latents some direction, and save the folder again"
            )
        W_enc, b_enc, W_dec = W_enc.double() * lengths, b_enc.double() * lengths, W_dec.double() / lengths[:, None]
    metadata = config.get("metadata", {})
    return _Found(
        {"W_enc_T": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors},
        config["k"],
        metadata.get("model_name") or "unknown",
        metadata.get("hook_name") or "unknown",
    )


def _from_sparsify(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Found:
    said = _SPARSIFY_MEANING | config
    other = {key: said[key] for key, expected in _SPARSIFY_MEANING.items() if said[key] != expected}
    _refuse(folder, other, "sparsify's TopK SAEs, without transcoding, skips, groups or signs,")
    named = {"encoder.weight": "W_enc_T", "encoder.bias": "b_enc"}
    return _Found(
        {named.get(name, name): tensor for name, tensor in tensors.items()},
        config["k"],
        config.get("model_name", "unknown"),
        # A folder of sparsify's is named after the module that its SAE is of.
        config.get("hook_name", folder.resolve().name),
    )


def _refuse(folder: Path, other: dict[str, Any], what_can: str) -> None:
    if other:
        said = ", ".join(f"{key} = {value!r}" for key, value in other.items())
        raise StoreError(f"{folder}: {said}, which our SAEs do not compute; only {what_can} can be imported")


@contextmanager
def _new_folder(out: Path, kind: Kind) -> Iterator[Path]:
    """A folder beside ``out`` to write in, which becomes ``out`` if all went well."""
    if out.exists():
        raise StoreError(f"{out}: exists already; name another folder, or remove it")
    with atomic_output(out, kind) as aside:
        aside.mkdir()
        yield aside
