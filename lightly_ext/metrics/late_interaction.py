"""How alike two sets of tokens are."""

from __future__ import annotations

from torch import Tensor


def best_matches(query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of a query the most similar one of each image.

    A token of zeros, which is in place of one that an image does not have, is like
    nothing: no token is less similar.

    Args:
        query:
            Tokens of the query, of unit length, float with shape (num_query_tokens,
            dim).
        tokens:
            Tokens of images, of unit length or zeros, float with shape (num_images,
            num_tokens, dim).

    Returns:
        Cosines with shape (num_images, num_query_tokens), and the numbers of the
        tokens, int64 with the same shape; of equals the first.
    """
    cosines = tokens @ query.mT
    cosines = cosines.masked_fill((tokens == 0).all(dim=2, keepdim=True), -1)
    best, matched = cosines.max(dim=1)
    return best, matched


def maxsim(query: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """Late interaction: each token of a query looks for its like in each image.

    Args:
        query:
            As for `best_matches`.
        weights:
            Weight of each token of the query, float with shape (num_query_tokens,).
        tokens:
            As for `best_matches`.

    Returns:
        Sum over i of weights[i] max over j of <query[i], tokens[:, j]>, with shape
        (num_images,).
    """
    return best_matches(query, tokens)[0] @ weights
