"""Any encoder behind one interface: STELLAR, the ViTs of other methods, timm models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lightly_ext.evaluate.finite import not_finite, running_precision
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import FEATURES


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, and what its images are like.

    Attributes:
        source: What the user named.
        method: Name of the method, or the layout of weights that do not tell it.
        sha256: Hash of the weight file or, where there is none, of the weights.
        mean: Per-channel mean of the images, of [0, 1] intensities.
        std: Per-channel standard deviation of the images.
        interpolation: How images are resized, "bicubic" or "bilinear".
        name: Name in tables.
        seed: Seed of random weights, None for a model that is trained.
        feature: The feature that "auto" stands for, None if it is not known.
        image_size: Height and width in px of the images that the model was made for,
            None if it has no size of its own.
        crop_pct: timm's share of the resized image that is cut out, None if its config
            does not tell.
        facts: How the weights were read: what told the method, what was taken,
            resampled or assumed; by name, in words.
        arguments: Arguments of the encoder that the user gave.
    """

    source: str
    method: str
    sha256: str
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    name: str = ""
    seed: int | None = None
    feature: str | None = None
    image_size: tuple[int, int] | None = None
    crop_pct: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether the weights are random."""
        return self.seed is not None

    @property
    def is_stellar(self) -> bool:
        """Whether it is a STELLAR model."""
        return self.method == "STELLAR"

    @property
    def label(self) -> str:
        """What the user named, and whether the weights are random."""
        return f"{self.source} (untrained)" if self.untrained else self.source

    @property
    def reading(self) -> str:
        """How the weights were read and what "auto" is, in one line."""
        facts = {"features auto": self.feature or "to be named", **self.facts}
        texts = "; ".join(f"{name}: {text}" for name, text in facts.items())
        return f"Model, {self.name}: {texts}."


class FrozenModel(nn.Module):
    """An encoder in evaluation mode and without gradients.

    Attributes:
        backbone:
            Maps normalised images to a `Factorization`.
        origin:
            Where it comes from.
        has_decoder:
            Whether its checkpoint has a decoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, origin: Origin, has_decoder: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.origin = origin
        self.has_decoder = has_decoder
        for name in ("mean", "std"):
            value = torch.tensor(getattr(origin, name)).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def train(self, mode: bool = True) -> FrozenModel:
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Factorization:
        """Factorizes images.

        Args:
            images:
                uint8 tensor, or intensities in [0, 1], with shape (batch_size, 3,
                height, width); normalised here.

        Raises:
            RuntimeError: If features are not finite; the localization raises it too,
                when it is read.
        """
        result = self.unchecked(images)

        def localize(dense: Tensor, sparse: Tensor) -> Tensor:
            localization = result._localize(dense, sparse)
            self._check_finite("Localizations", localization)
            return localization

        tokens = [t for t in (result.cls, result.sparse, result.dense) if t is not None]
        self._check_finite("Features", *tokens)
        return replace(result, _localize=localize)

    @torch.no_grad()
    def unchecked(self, images: Tensor) -> Factorization:
        """The same, finite or not: for training, where a check would wait for CUDA."""
        return self.backbone(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises images, uint8 or in [0, 1], by the mean and std of the model."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std

    def pooled(self, images: Tensor, feature: str) -> Tensor:
        """One vector per image: the mean over tokens, float32 (batch_size, dim).

        Args:
            images:
                As for `forward`.
            feature:
                One of `FEATURES`; "cls+dense" is the CLS token beside the mean of the
                patches.
        """
        pooled = pool(self(images), feature)
        self._check_finite("Features", pooled)
        return pooled

    def _check_finite(self, what: str, *values: Tensor) -> None:
        if not torch.stack([v.isfinite().all() for v in values]).all():
            precision = running_precision(values[0].device)
            raise not_finite(f"{what} of '{self.origin.label}'", precision)

    def check_size(self, side: int) -> None:
        """Checks that the model takes square images of a size, with a black one.

        Raises:
            ValueError: If it does not.
        """
        black = torch.zeros(1, 3, side, side, device=self.mean.device)
        try:
            self.unchecked(black)
        except (AssertionError, RuntimeError, ValueError) as error:
            own = self.origin.image_size
            size = f" Its own size is {own[0]} x {own[1]} px." if own else ""
            raise ValueError(
                f"'{self.origin.label}' does not take images of {side} x {side} px: "
                f"{error}{size} Name another --crop."
            ) from error

    @torch.no_grad()
    def map_size(self, side: int) -> tuple[int, int]:
        """Rows and columns of the map of dense features of images of a side in px."""
        black = torch.zeros(1, 3, side, side, device=self.mean.device)
        return self.unchecked(black).grid_size

    def resolve_feature(self, feature: str) -> str:
        """Checks the name of a feature, and says what "auto" is.

        Args:
            feature:
                "auto" or one of `FEATURES`.

        Raises:
            ValueError: If there is no such feature, the model does not have it, or
                the weights do not tell which method they come from.
        """
        check_feature_name(feature)
        if feature == "auto":
            if self.origin.feature is None:
                raise ValueError(
                    f"'{self.origin.label}' does not tell which method trained it "
                    f"(read as {self.origin.method}), so features 'auto' are not "
                    f"known: name --features, one of {', '.join(FEATURES)}."
                )
            return self.origin.feature
        if feature in ("sparse", "lowrank") and not self.num_queries:
            raise ValueError(
                f"'{self.origin.label}' has no latent queries, so no {feature} "
                "features: name dense or cls."
            )
        if feature == "lowrank":
            self.require_localization()
        return feature

    def require_localization(self) -> None:
        """Checks that there are tokens S and a localization L.

        Raises:
            ValueError: If there are not.
        """
        origin = self.origin
        if not self.num_queries:
            raise ValueError(
                f"'{origin.label}' ({origin.method}) has no latent queries, so neither "
                "tokens S nor a localization L: name a STELLAR model."
            )
        if not self.has_localization and not origin.is_stellar:
            raise ValueError(
                f"'{origin.label}' ({origin.method}) has tokens but no localization of "
                "them, they are nowhere in the image: name a STELLAR model."
            )
        if not self.has_localization:
            raise ValueError(
                f"'{origin.label}' has tokens but no localization of them, which only "
                "reconstruction trains: name a STELLAR model that was trained with it."
            )

    @property
    def num_queries(self) -> int:
        """Number of latent queries, 0 for every model that is not STELLAR."""
        return int(getattr(self.backbone, "num_queries", 0))

    @property
    def has_localization(self) -> bool:
        """Whether there is a localization of tokens on patches."""
        return bool(getattr(self.backbone, "has_localization", False))


def check_feature_name(feature: str) -> None:
    """Raises a ValueError unless a feature is "auto" or one of `FEATURES`."""
    if feature not in ("auto", *FEATURES):
        raise ValueError(
            f"features must be 'auto' or one of {', '.join(FEATURES)}, got '{feature}'."
        )


def select_tokens(result: Factorization, feature: str) -> Tensor:
    """Tokens of a factorization, (batch_size, num_tokens, dim).

    Args:
        result:
            The factorization.
        feature:
            One of `FEATURES` except "cls+dense".

    Raises:
        ValueError: If the encoder has no such tokens.
    """
    if feature != "cls":
        return getattr(result, feature)
    if result.cls is None:
        raise ValueError("The encoder has no CLS token: name dense features.")
    return result.cls[:, None]


def pool(result: Factorization, feature: str) -> Tensor:
    """One vector per image, see `FrozenModel.pooled`."""
    names = feature.split("+")
    tokens = [select_tokens(result, name).float() for name in names]
    return torch.cat([t.mean(dim=1) for t in tokens], dim=1)
