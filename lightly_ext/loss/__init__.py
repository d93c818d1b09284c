from lightly_ext.loss.masked_patches import masked_patch_loss, normalized_patches
from lightly_ext.loss.prototype_cross_entropy import (
    PrototypeTarget,
    assign_prototypes,
    contract_targets,
    prototype_cross_entropy,
)
from lightly_ext.loss.set_koleo_loss import SetKoLeoLoss
from lightly_ext.loss.set_matching import TokenMatching, match_tokens
from lightly_ext.loss.sinkhorn import sinkhorn_knopp
from lightly_ext.loss.stellar_loss import STELLARLoss
from lightly_ext.loss.stellar_terms import (
    MATCHING_FIGURES,
    CLSViews,
    SparseViews,
    STELLARLossTerms,
    TeacherTargets,
)

__all__ = [
    "MATCHING_FIGURES",
    "CLSViews",
    "PrototypeTarget",
    "STELLARLoss",
    "STELLARLossTerms",
    "SetKoLeoLoss",
    "SparseViews",
    "TeacherTargets",
    "TokenMatching",
    "assign_prototypes",
    "contract_targets",
    "masked_patch_loss",
    "match_tokens",
    "normalized_patches",
    "prototype_cross_entropy",
    "sinkhorn_knopp",
]
