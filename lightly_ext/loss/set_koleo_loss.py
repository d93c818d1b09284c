from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8


class SetKoLeoLoss(nn.Module):
    """KoLeo regularizer over the tokens of one image, as in STELLAR [0].

    Spreads the tokens of each image over the unit sphere: each is pushed away from its
    nearest neighbour in the same image. lightly's `KoLeoLoss` [1] does the same over a
    batch of vectors.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (section 3.6)
    - [1]: Spreading vectors for similarity search, 2019, https://arxiv.org/abs/1806.03198

    Examples:
        >>> criterion = SetKoLeoLoss()
        >>> loss = criterion(tokens)  # (batch_size, num_tokens, embed_dim)
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """Computes the loss, always in float32 or wider.

        Args:
            tokens:
                Tensor with shape (..., num_tokens, embed_dim); leading dimensions are
                images or views.

        Returns:
            Scalar, mean over all tokens.

        Raises:
            ValueError: If an image has fewer than two tokens, or there is no image.
        """
        if tokens.shape[-2] < 2 or 0 in tokens.shape:
            raise ValueError(
                "SetKoLeoLoss needs at least two tokens per image, got shape "
                f"{tuple(tokens.shape)}; switch it off (koleo_weight=0) for a single "
                "token."
            )
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            x = _widen(tokens, dtype)
            x = F.normalize(x, dim=-1, eps=EPS)
            neighbour = x.gather(-2, _nearest(x.detach())[..., None].expand_as(x))
            # The epsilon inside the norm keeps the gradient of identical tokens finite.
            distance = F.pairwise_distance(x, neighbour, eps=EPS)
            return -(0.5 * distance + EPS).log().mean()


def _widen(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts, and keeps gradients finite on their way back into half precision."""
    x = tokens.to(dtype)
    if x is not tokens and x.requires_grad:
        # That of identical tokens is 1e7 and more. What adds to it must fit in, too.
        largest = torch.finfo(tokens.dtype).max / 2
        x.register_hook(lambda gradient: gradient.clamp(-largest, largest))
    return x


def _nearest(x: Tensor) -> Tensor:
    """Index of the most similar other token, (..., r, d) -> (..., r)."""
    similarity = x @ x.mT
    similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return similarity.argmax(dim=-1)
