"""Encoders: load one from its catalog entry and record the residual stream after each of its blocks.

Arrays that were computed elsewhere can take the place of an encoder.
"""

from typing import TYPE_CHECKING

from conceptshare._on_demand import on_demand

if TYPE_CHECKING:
    from conceptshare.encoders._arrays import Arrays
    from conceptshare.encoders._encoder import Activations, Batch, Encoder
    from conceptshare.encoders._load import load_encoder, load_source, try_encoder

__all__ = ["Activations", "Arrays", "Batch", "Encoder", "load_encoder", "load_source", "try_encoder"]

__getattr__ = on_demand(
    __name__,
    _arrays=["Arrays"],
    _encoder=["Activations", "Batch", "Encoder"],
    _load=["load_encoder", "load_source", "try_encoder"],
)
