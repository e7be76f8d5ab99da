"""Encoders: load one from its specification and read the residual stream after each of its blocks."""

from conceptshare.encoders._encoder import Activations, Encoder
from conceptshare.encoders._load import load_encoder

__all__ = ["Activations", "Encoder", "load_encoder"]
