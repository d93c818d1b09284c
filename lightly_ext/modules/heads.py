from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn

from lightly_ext.modules.token_batch_norm import TokenBatchNorm
from stellar_plugin.encoder import L2_NORM_EPS


class STELLARProjectionHead(ProjectionHead):
    """Projection head and prototypes of STELLAR [0].

    An MLP followed by L2 normalisation. The prototypes are a bias-free linear map whose
    rows are not normalised; pass `head.prototypes.weight` to `STELLARLoss`.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (section 3.4)

    Attributes:
        input_dim:
            Width of the tokens.
        hidden_dim:
            Width of the hidden layer.
        output_dim:
            Width of the embeddings.
        num_prototypes:
            Number K of prototypes; None makes none, `prototypes` is None then.
        batch_norm:
            Whether both layers are followed by a :class:`TokenBatchNorm` (not in the
            paper; short runs learn more with it).

    Raises:
        ValueError: If `num_prototypes` is less than 1.

    Examples:
        >>> head = STELLARProjectionHead(768)
        >>> embeddings = head(tokens)  # (..., 768) -> (..., 256), unit length
    """

    prototypes: nn.Linear

    def __init__(
        self,
        input_dim: int = 768,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        num_prototypes: int | None = 16384,
        batch_norm: bool = False,
    ) -> None:
        if num_prototypes is not None and num_prototypes < 1:
            raise ValueError(f"num_prototypes must be 1 or more, got {num_prototypes}.")
        hidden_norm = TokenBatchNorm(hidden_dim) if batch_norm else None
        norm = TokenBatchNorm(output_dim, affine=False) if batch_norm else None
        super().__init__(
            [
                (input_dim, hidden_dim, hidden_norm, nn.GELU()),
                (hidden_dim, output_dim, norm, None),
            ]
        )
        if num_prototypes is None:
            self.prototypes = None  # type: ignore[assignment]
        else:
            self.prototypes = nn.Linear(output_dim, num_prototypes, bias=False)
            nn.init.normal_(self.prototypes.weight, std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds tokens.

        Args:
            x:
                Tensor with shape (..., input_dim).

        Returns:
            Unit vectors with shape (..., output_dim), at least float32.
        """
        x = self.layers(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.normalize(x.to(dtype), dim=-1, eps=L2_NORM_EPS)
