from lightly_ext.modules.heads import STELLARProjectionHead
from lightly_ext.modules.masked_autoencoder import MaskedAutoencoder, MaskedPrediction
from lightly_ext.modules.masking import (
    focal_bump,
    num_kept_patches,
    random_focal_mask,
)
from lightly_ext.modules.token_batch_norm import TokenBatchNorm

__all__ = [
    "MaskedAutoencoder",
    "MaskedPrediction",
    "STELLARProjectionHead",
    "TokenBatchNorm",
    "focal_bump",
    "num_kept_patches",
    "random_focal_mask",
]
