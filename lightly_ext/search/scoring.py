"""Tokens in a byte per number."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from stellar_plugin.encoder import L2_NORM_EPS

LARGEST = 127
# Numbers of a token that candidates are found by. On 100 000 images of 16 x 768, all of
# the exact first ten were among 1000 candidates; by pooled tokens a third of them.
SKETCH_DIM = 64


def quantised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of vectors in a byte per number.

    Args:
        vectors:
            Vectors with shape (..., dim).

    Returns:
        int8 tensor with the same shape, and float32 factors with shape (...,), so that
        their product has unit length; both are zero where the vector is.
    """
    peak = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=L2_NORM_EPS)
    steps = (vectors.float() / peak * LARGEST).round()
    lengths = steps.norm(dim=-1)  # at least the peak, or zero
    return steps.to(torch.int8), (lengths > 0) / lengths.clamp(min=1)


def restored(steps: Tensor, factors: Tensor) -> Tensor:
    """The vectors that `quantised` gives the bytes and factors of, of their dtype."""
    return steps.to(factors.dtype) * factors[..., None]


def cosines(query: Tensor, steps: Tensor, factors: Tensor) -> Tensor:
    """Cosines of tokens with those of images in bytes; see `best_matches`.

    As if the tokens were restored, which takes longer.

    Args:
        query:
            Tokens of the query, of unit length, float with shape (num_query_tokens,
            dim).
        steps:
            Tokens of images, int8 with shape (num_images, num_tokens, dim).
        factors:
            Their factors, float32 with shape (num_images, num_tokens); a token with 0
            is like nothing.

    Returns:
        Tensor with shape (num_images, num_tokens, num_query_tokens), of the query's
        dtype.
    """
    found = (steps.to(query.dtype) @ query.mT).mul_(factors[..., None])
    return found.masked_fill_((factors == 0)[..., None], -1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute on one thread.

    Blocks that fit into the cache of a core are too small to be shared: on two threads
    they took longer, and twenty times as long beside other programs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=4)
def sketch_matrix(dim: int) -> Tensor:
    """Orthonormal directions that vectors are shortened by, float32 (dim, short).

    Random but always the same: no images decide on them, so an index may grow by images
    of any other kind.
    """
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q[:, : min(dim, SKETCH_DIM)].float()


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors scaled to unit length, in at least float32."""
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    return F.normalize(vectors, dim=-1, eps=L2_NORM_EPS)
