"""Stages `sae` and `stream`: TopK sparse autoencoders on the residual stream, from stored tokens or as they are made.

f = ReLU((x - b_dec) W_enc) and x_hat = TopK(f) W_dec + b_dec, trained on mean squared error; W_enc is [D, F] and
W_dec is [F, D]. Only the k largest latents of a token reach the decoder, so decoding and both weight gradients touch
those alone; the one dense product of a step is x W_enc.
"""

from conceptshare.sae._metrics import Quality, evaluate
from conceptshare.sae._model import TopK, TopKSAE, load_sae, save_sae
from conceptshare.sae._stream import train_stream
from conceptshare.sae._train import train, train_sae

__all__ = [
    "Quality",
    "TopK",
    "TopKSAE",
    "evaluate",
    "load_sae",
    "save_sae",
    "train",
    "train_sae",
    "train_stream",
]
