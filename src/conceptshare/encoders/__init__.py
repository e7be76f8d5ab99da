"""Encoders: load one from its specification and read the residual stream after each of its blocks."""

from conceptshare.encoders._encoder import Activations, Batch, Encoder
from conceptshare.encoders._load import load_encoder, try_encoder

__all__ = ["Activations", "Batch", "Encoder", "load_encoder", "try_encoder"]
