"""STELLAR: an image as a few sparse tokens ("what") and where they are ("where")."""

from stellar_plugin.decoder import PixelDecoder, TokenDecoder
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.model import Stellar
from stellar_plugin.tokenizer import MaskGITVQGAN

__all__ = [
    "Factorization",
    "MaskGITVQGAN",
    "PixelDecoder",
    "Stellar",
    "StellarEncoder",
    "TokenDecoder",
]
__version__ = "0.1.0"
