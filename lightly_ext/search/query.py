"""What is asked of an index, checked and brought into the form that is compared."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightly_ext.evaluate.options import check_positive
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.scoring import unit_length

By = Literal["maxsim", "mean", "cls"]


class Query(NamedTuple):
    """What is asked of an index.

    Attributes:
        tokens:
            Tokens that have a weight, of unit length, float64 with shape
            (num_query_tokens, dim).
        weights:
            Their weights, float64 with shape (num_query_tokens,).
        pooled:
            What stands for the whole query, of unit length, float64 with shape (dim,)
            or (cls_dim,); None by "maxsim".
    """

    tokens: Tensor
    weights: Tensor
    pooled: Tensor | None

    @classmethod
    def of(
        cls,
        card: IndexCard,
        tokens: Tensor,
        weights: Tensor | None,
        by: By,
        pooled: Tensor | None,
    ) -> Query:
        """Checks a query; arguments as for `TokenIndex.search`.

        Raises:
            ValueError: If tokens, weights and pooled do not fit the index or are not
                finite, or it has no CLS tokens.
        """
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != card.dim:
            raise ValueError(
                f"tokens must be (num_query_tokens, {card.dim}), got "
                f"{tuple(tokens.shape)}."
            )
        tokens = _finite("tokens", tokens)
        weights = _weights(weights, len(tokens))
        if by != "maxsim":
            dim = _pooled_dim(card, by)
            if by == "mean" and pooled is None:
                pooled = weights @ tokens
            if pooled is None or pooled.shape != (dim,):
                got = None if pooled is None else tuple(pooled.shape)
                raise ValueError(f"pooled must be ({dim},) by {by}, got {got}.")
            pooled = unit_length(_finite("pooled", pooled))
        elif pooled is not None:
            raise ValueError("pooled is for by='mean' and 'cls': leave it out.")
        counting = weights > 0
        return cls(unit_length(tokens[counting]), weights[counting], pooled)

    @property
    def heaviest(self) -> int:
        """Number of the token with the largest weight; of equals the first."""
        return int(self.weights.argmax())


def check_asked(
    place: str, num_images: int, k: int, candidates: int | None = None
) -> None:
    """Checks that there is something to find, and that something is asked for.

    Raises:
        ValueError: If the index is empty, or k or candidates are not positive.
    """
    if not num_images:
        raise ValueError(
            f"The index in '{place}' has no image: `stellar index` puts images there."
        )
    check_positive(k=k, candidates=candidates)


def _finite(name: str, values: Tensor) -> Tensor:
    """Values of a query in float64, without what made them."""
    values = values.detach().double().cpu()
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity.")
    return values


def _weights(weights: Tensor | None, num_tokens: int) -> Tensor:
    if weights is None:
        return torch.full((num_tokens,), 1 / num_tokens, dtype=torch.float64)
    if weights.shape != (num_tokens,):
        raise ValueError(
            f"weights must be one for each of {num_tokens} tokens, got "
            f"{tuple(weights.shape)}."
        )
    weights = _finite("weights", weights)
    if not (weights >= 0).all() or not weights.any():
        raise ValueError(
            f"weights must be at least 0, and one of them more, got {weights.tolist()}."
        )
    return weights


def _pooled_dim(card: IndexCard, by: By) -> int:
    dims = {"mean": card.dim, "cls": card.cls_dim}
    if by not in dims:
        raise ValueError(f"by must be one of maxsim, mean, cls, got '{by}'.")
    if not dims[by]:
        raise ValueError(
            "The model of the index has no CLS token: search by maxsim or mean."
        )
    return dims[by]
