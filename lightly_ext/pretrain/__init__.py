"""Pretraining of STELLAR with Lightning."""

from lightly_ext.pretrain.module import StellarPretraining

__all__ = ["StellarPretraining"]
