"""Exchange of SAEs with other libraries: SAELens, whose layout is also ours, and EleutherAI's sparsify."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conceptshare.io.errors import ConceptshareError, StoreError
from conceptshare.io.files import SAE_FOLDER, SPARSIFY, Kind, atomic_output
from conceptshare.sae._activations import TopK, saved_activation
from conceptshare.sae._model import SAE, load_sae, save_sae
from conceptshare.sae.folder import other_meaning, sae_file

_SAE_LENS_WEIGHTS = "sae_weights.safetensors"
_SPARSIFY_WEIGHTS = "sae.safetensors"
_BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
# Keys of sparsify's cfg.json that change what an SAE computes, with their required values. Older versions use `signed`.
_SPARSIFY_MEANING = {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False}


class _Imported(NamedTuple):
    """Tensors and keys of an SAE as SAELens names them, and its origin."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model_name: str
    hook_name: str


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
    with _new_folder(Path(out), SPARSIFY) as partial:
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, partial / _SPARSIFY_WEIGHTS)
        (partial / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def import_sae(folder: Path | str, out: Path | str) -> None:
    """Convert an SAE of SAELens or sparsify to the format of `load_sae`, with weights in float32.

    Operations beyond those of `load_sae` are folded into the weights if that is exact, and rejected otherwise.

    Raises:
        StoreError: if the folder holds no SAE or one that cannot be expressed, or if ``out`` exists.
    """
    folder = Path(folder)
    if (folder / _SPARSIFY_WEIGHTS).is_file():
        read, weights = _from_sparsify, _SPARSIFY_WEIGHTS
    elif (folder / _SAE_LENS_WEIGHTS).is_file():
        read, weights = _from_sae_lens, _SAE_LENS_WEIGHTS
    else:
        raise StoreError(
            f"{folder}: contains neither {_SAE_LENS_WEIGHTS} (SAELens) nor {_SPARSIFY_WEIGHTS} (sparsify); "
            "name the folder of one SAE"
        )
    try:
        config = json.loads(sae_file(folder, "cfg.json").read_text(encoding="utf-8"))
        imported = read(folder, config, load_file(sae_file(folder, weights)))
        d_sae = len(imported.tensors["W_dec"])
        sae = SAE(config["d_in"], d_sae, saved_activation(imported.config | {"d_sae": d_sae}))
        sae.load_saved(imported.tensors)
    except ConceptshareError:
        raise
    except Exception as error:  # damaged files raise many types
        message = " ".join(str(error).split())
        raise StoreError(
            f"{folder}: cfg.json and {weights} do not match or are damaged ({type(error).__name__}: {message}); "
            "fetch or save the folder again"
        ) from error
    with _new_folder(Path(out), SAE_FOLDER) as partial:
        save_sae(sae, partial, imported.model_name, imported.hook_name)


def _from_sae_lens(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Imported:
    if "activation_fn_kwargs" in config:
        raise StoreError(
            f"{folder}: cfg.json is from SAELens before version 6; load it with a newer version (SAE.load_from_disk) "
            "and save it again (save_model)"
        )
    if config.get("architecture") in _BATCH_TOPK:
        # Saved in training; SAELens's own inference folder has this threshold too.
        config = config | {"architecture": "jumprelu"}
        tensors["threshold"] = tensors.pop("topk_threshold").expand(len(tensors["b_enc"]))
    other = other_meaning(config)
    subtracted = other.pop("apply_b_dec_to_input", True)
    rescaled = other.pop("rescale_acts_by_decoder_norm", False)
    # Some versions of SAELens saved a factor per latent, which is 1 if unused.
    if not (tensors.pop("scaling_factor", torch.ones(1)) == 1).all():
        other["scaling_factor"] = "not 1"
    _reject(folder, other, "SAELens's TopK, JumpReLU and standard SAEs on unnormalised activations")
    W_enc, W_dec = tensors.pop("W_enc"), tensors.pop("W_dec")
    b_enc, b_dec = tensors.pop("b_enc"), tensors.pop("b_dec")
    if not subtracted:
        # x W + b = (x - b_dec) W + (b + b_dec W)
        b_enc = b_enc.double() + b_dec.double() @ W_enc.double()
    if rescaled:
        # Latents are multiplied by the norm of their decoder row before TopK and divided by it before decoding.
        lengths = W_dec.double().norm(dim=1)
        if (lengths == 0).any():
            raise StoreError(
                f"{folder}: cfg.json has rescale_acts_by_decoder_norm, but {int((lengths == 0).sum())} decoder rows "
                "have norm 0, by which SAELens divides; set these rows to a non-zero direction, and save the folder "
                "again"
            )
        W_enc, b_enc, W_dec = W_enc.double() * lengths, b_enc.double() * lengths, W_dec.double() / lengths[:, None]
    metadata = config.get("metadata", {})
    return _Imported(
        {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors},
        config,
        metadata.get("model_name") or "unknown",
        metadata.get("hook_name") or "unknown",
    )


def _from_sparsify(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Imported:
    settings = _SPARSIFY_MEANING | config
    other = {key: settings[key] for key, expected in _SPARSIFY_MEANING.items() if settings[key] != expected}
    _reject(folder, other, "sparsify's TopK SAEs, without transcoding, skips, groups or signs,")
    W_enc, b_enc = tensors.pop("encoder.weight").T, tensors.pop("encoder.bias")
    return _Imported(
        {"W_enc": W_enc, "b_enc": b_enc, **tensors},
        {"architecture": "topk", "k": config["k"]},
        config.get("model_name", "unknown"),
        # sparsify names a folder after the module that its SAE was trained on.
        config.get("hook_name", folder.resolve().name),
    )


def _reject(folder: Path, other: dict[str, Any], importable: str) -> None:
    if other:
        settings = ", ".join(f"{key} = {value!r}" for key, value in other.items())
        raise StoreError(f"{folder}: {settings} is not supported; only {importable} can be imported")


@contextmanager
def _new_folder(out: Path, kind: Kind) -> Iterator[Path]:
    """Yield a temporary folder, which becomes ``out`` on success."""
    if out.exists():
        raise StoreError(f"{out}: exists already; name another folder, or remove it")
    with atomic_output(out, kind) as partial:
        partial.mkdir()
        yield partial
