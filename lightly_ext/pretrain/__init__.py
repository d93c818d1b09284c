"""Pretraining of STELLAR with Lightning."""

from lightly_ext.pretrain.mae import MAEPretraining
from lightly_ext.pretrain.module import StellarPretraining

__all__ = ["MAEPretraining", "StellarPretraining"]
