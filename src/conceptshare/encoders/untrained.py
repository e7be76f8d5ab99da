"""Untrained models: those of a configuration, as their library initialises them, with weights written once to files.

The `weights` stage writes them, so that all later jobs read the same weights, on any machine and with any version of
the library.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conceptshare.config.catalog import ModelSpec
from conceptshare.encoders._encoder import in_one_line
from conceptshare.encoders._load import free_memory, limit_parameters
from conceptshare.io.errors import ConceptshareError, EncoderError


def write_untrained(spec: ModelSpec, base: Path, folder: Path) -> None:
    """Initialise the model that ``spec.library`` builds from its configuration, and write its weights in float32.

    The random numbers are those of torch on the CPU, from ``spec.untrained_seed``.

    Args:
        spec: the model.
        base: the folder with its configuration.
        folder: an existing folder, where the library will find the weights.

    Raises:
        EncoderError: if the library cannot build the model, or this machine lacks the memory.
    """
    free = free_memory()
    fault = f"drawing its weights needs more than the {free / 2**30:.1f} GiB of free memory; use a machine with more"
    try:
        # Weights in float32, and their copy in the file.
        with limit_parameters(spec, base, free // 8, fault), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.untrained_seed)
            _WRITERS[spec.library](spec, base, folder)
    except ConceptshareError:
        raise
    except Exception as error:  # the libraries raise many types
        raise EncoderError(f"{spec.model}: {spec.library} cannot build {base}: {in_one_line(error)}") from error


def _write_transformers(spec: ModelSpec, base: Path, folder: Path) -> None:
    from transformers import AutoModel

    from conceptshare.encoders._transformers import class_and_config

    kind, config = class_and_config(spec, base)
    model = AutoModel.from_config(config, dtype=torch.float32) if kind is AutoModel else kind(config).float()
    model.save_pretrained(folder)


def _write_open_clip(_spec: ModelSpec, base: Path, folder: Path) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{base}", load_weights=False, pretrained_text=False)
    _save(model, folder / "open_clip_model.safetensors")


def _write_timm(_spec: ModelSpec, base: Path, folder: Path) -> None:
    import timm

    _save(timm.create_model(f"local-dir:{base}", pretrained=False), folder / "model.safetensors")


_WRITERS = {"transformers": _write_transformers, "open_clip": _write_open_clip, "timm": _write_timm}


def _save(model: Any, file: Path) -> None:
    # Parameters that share memory are stored as copies, which the libraries expect.
    save_file({name: x.clone(memory_format=torch.contiguous_format) for name, x in model.state_dict().items()}, file)
