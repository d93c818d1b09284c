from lightly_ext.modules.heads import STELLARProjectionHead
from lightly_ext.modules.masked_autoencoder import MaskedAutoencoder, MaskedPrediction
from lightly_ext.modules.masking import focal_bump, random_focal_mask

__all__ = [
    "MaskedAutoencoder",
    "MaskedPrediction",
    "STELLARProjectionHead",
    "focal_bump",
    "random_focal_mask",
]
