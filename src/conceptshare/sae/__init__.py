"""Stages `sae` and `stream`: sparse autoencoders on the residual stream, trained on stored or streamed tokens.

f = ReLU((x - b_dec) W_enc) and x_hat = TopK(f) W_dec + b_dec, trained on mean squared error; W_enc is [D, F] and
W_dec is [F, D]. Only active latents, such as the k largest of a token, reach the decoder, so decoding and both weight
gradients only touch these; the only dense product of a step is x W_enc.
"""

from typing import TYPE_CHECKING

from conceptshare._on_demand import on_demand

if TYPE_CHECKING:
    from conceptshare.sae._activations import Activation, Active, BatchTopK, JumpReLU, ReLU, TopK
    from conceptshare.sae._metrics import Quality, evaluate
    from conceptshare.sae._model import SAE, load_sae, save_sae
    from conceptshare.sae._stream import train_stream
    from conceptshare.sae._train import train, train_sae

__all__ = [
    "SAE",
    "Activation",
    "Active",
    "BatchTopK",
    "JumpReLU",
    "Quality",
    "ReLU",
    "TopK",
    "evaluate",
    "load_sae",
    "save_sae",
    "train",
    "train_sae",
    "train_stream",
]

__getattr__ = on_demand(
    __name__,
    _activations=["Activation", "Active", "BatchTopK", "JumpReLU", "ReLU", "TopK"],
    _metrics=["Quality", "evaluate"],
    _model=["SAE", "load_sae", "save_sae"],
    _stream=["train_stream"],
    _train=["train", "train_sae"],
)
