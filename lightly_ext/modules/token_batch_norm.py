from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.utils.dist import gather, world_size
from torch import Tensor, nn


class TokenBatchNorm(nn.Module):
    """Batch normalisation over all tokens of all images of all processes.

    For heads that are thrown away after training: nothing is remembered, what a token
    becomes always depends on its batch. Works on CPUs and GPUs, unlike SyncBatchNorm.

    Attributes:
        dim:
            Width of the tokens.
        affine:
            Whether scale and offset of each dimension are learned.
        eps:
            Added to the variance.
    """

    def __init__(self, dim: int, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each dimension.

        Args:
            x:
                Floating-point tensor with shape (..., dim), with as many tokens in
                every process.

        Returns:
            Tensor with the shape and dtype of `x`.

        Raises:
            ValueError: If there is but one token.
        """
        rows = x.flatten(0, -2)
        processes = world_size()
        if len(rows) * processes < 2:
            raise ValueError(
                "Batch normalisation needs two tokens or more: raise the batch size, "
                "or set the head's batch_norm to false."
            )
        if processes == 1:
            rows = F.batch_norm(
                *(rows, None, None, self.weight, self.bias, True, 0.0, self.eps)
            )
            return rows.view_as(x)
        values = rows.to(torch.promote_types(x.dtype, torch.float32))
        mean = _mean_of_processes(values.mean(dim=0))
        variance = _mean_of_processes((values - mean).square().mean(dim=0))
        values = (values - mean) * (variance + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            values = values * self.weight + self.bias
        return values.to(x.dtype).view_as(x)


def _mean_of_processes(x: Tensor) -> Tensor:
    return torch.stack(gather(x)).mean(dim=0)
