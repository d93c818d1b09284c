"""Figures of features and tokens: pure functions of tensors."""

from lightly_ext.metrics.health import (
    LocalizationEntropy,
    PrototypeUsage,
    effective_rank,
    health_figures,
    localization_entropy,
    mean_token_cosine,
    nearest_token_distance,
    prototype_usage,
)
from lightly_ext.metrics.knn import Voters, check_knn_options, knn_accuracy

__all__ = [
    "LocalizationEntropy",
    "PrototypeUsage",
    "Voters",
    "check_knn_options",
    "effective_rank",
    "health_figures",
    "knn_accuracy",
    "localization_entropy",
    "mean_token_cosine",
    "nearest_token_distance",
    "prototype_usage",
]
