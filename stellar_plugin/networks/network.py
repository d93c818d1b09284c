"""What evaluation and segmentation need of a network that is no `StellarEncoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stellar_plugin.encoder import Factorization


class Network(nn.Module):
    """A network behind the interface of an encoder, without localization.

    Attributes:
        embed_dim: Width of the dense features.
        stride: Side of a cell of the map of dense features, in px of the image.
        image_size: Height and width in px of the images that it was made for, None if
            it has no size of its own.
        num_queries: Number of sparse tokens.
        has_localization: Whether they have places, which no other method's have.
    """

    embed_dim: int
    stride: int
    image_size: tuple[int, int] | None = None
    num_queries: int = 0
    has_localization: bool = False

    @property
    def named(self) -> nn.Module:
        """The module by whose names files have its tensors."""
        return self

    def forward(self, images: Tensor) -> Factorization:
        """Computes the features of images.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width).

        Returns:
            CLS or what is pooled, sparse tokens if there are some, and dense features.

        Raises:
            ValueError: If it does not take images of this size.
        """
        raise NotImplementedError

    def fitted(
        self, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Brings the tensors of a file to the sizes of this network.

        Args:
            state:
                Tensors by the names of `named`.

        Returns:
            The tensors, and in words what was resampled.
        """
        return dict(state), []


class TimmNetwork(Network):
    """A model of timm: CLS is what it pools, dense its last map.

    Args:
        model:
            The model, without classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        timm_model: Any = model
        self.embed_dim = timm_model.num_features

    @property
    def stride(self) -> int:  # type: ignore[override]
        """Side of a cell of the last map, in px of the image."""
        model: Any = self.model
        return model.feature_info[-1]["reduction"]

    @property
    def named(self) -> nn.Module:
        """The model of timm."""
        return self.model

    def forward(self, images: Tensor) -> Factorization:
        """Computes pooled features and the feature map of normalised images."""
        model: Any = self.model
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True).flatten(1)
        if features.ndim == 4:
            if getattr(model, "output_fmt", "NCHW") == "NCHW":
                features = features.permute(0, 2, 3, 1)
            grid_size = (features.shape[1], features.shape[2])
            dense = features.flatten(1, 2)
        else:
            dense = features[:, getattr(model, "num_prefix_tokens", 0) :]
            grid_size = _grid_size(dense.shape[1], images)
        return unlocalized(pooled, dense, grid_size)


def unlocalized(
    cls: Tensor | None, dense: Tensor, grid_size: tuple[int, int]
) -> Factorization:
    """A factorization without sparse tokens; see `Factorization`."""
    return Factorization(cls, dense[:, :0], dense, grid_size, no_localization)


def no_localization(dense: Tensor, sparse: Tensor) -> Tensor:
    """The localization of no tokens, (batch_size, num_patches, 0)."""
    return dense.new_zeros(*dense.shape[:2], 0)


def _grid_size(num_patches: int, images: Tensor) -> tuple[int, int]:
    """Grid of patches in the shape of the image."""
    height, width = images.shape[-2:]
    rows = max(1, round((num_patches * height / width) ** 0.5))
    return rows, num_patches // rows
