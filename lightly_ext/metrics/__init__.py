"""Figures of features and tokens: pure functions of tensors."""

from lightly_ext.metrics.collapse import (
    effective_rank,
    mean_token_cosine,
    prototype_usage,
    signs_of_collapse,
)
from lightly_ext.metrics.knn import Voters, check_knn_options, knn_accuracy

__all__ = [
    "Voters",
    "check_knn_options",
    "effective_rank",
    "knn_accuracy",
    "mean_token_cosine",
    "prototype_usage",
    "signs_of_collapse",
]
