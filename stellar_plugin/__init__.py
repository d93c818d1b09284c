"""STELLAR: an image as a few sparse tokens ("what") and where they are ("where")."""

from stellar_plugin.decoder import PixelDecoder
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.model import Stellar, create_model

__all__ = [
    "Factorization",
    "PixelDecoder",
    "Stellar",
    "StellarEncoder",
    "create_model",
]
