"""What a model makes of images for an index, and of a query alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.finite import not_finite
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import centre_crop
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.numerics import image_versions, known_image, numerics
from lightly_ext.evaluate.parts import Cut, Parts, choose_cut
from lightly_ext.evaluate.sizes import image_sizes
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.scoring import sketch_matrix, unit_length
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import CropProtocol

# The shorter side becomes the crop: nothing of it is cut off.
IMAGES = CropProtocol(name="search", source="our choice", resize=224, crop=224)
# Numbers that are kept of each vector of the known image.
KNOWN_DIM = 16


class Encoded(NamedTuple):
    """Images as a model sees them.

    Attributes:
        parts: Their tokens, or clusters of patches.
        cls: CLS tokens, float32 with shape (batch_size, cls_dim), cls_dim 0 without.
    """

    parts: Parts
    cls: Tensor


@dataclass(frozen=True)
class ImageEncoder:
    """A model, and how images come to it: the whole of the shorter side, the centre.

    Attributes:
        model:
            The model.
        devices:
            Where it runs.
        cut:
            What it cuts images into.
        protocol:
            In which size it gets them.
    """

    model: FrozenModel
    devices: Devices
    cut: Cut
    protocol: CropProtocol

    @classmethod
    def of(
        cls,
        model: FrozenModel,
        devices: Devices,
        crop: int | None = None,
        clusters: int | None = None,
        seed: int = 0,
    ) -> ImageEncoder:
        """Chooses size and cut.

        Args:
            model:
                The model.
            devices:
                Where it runs.
            crop:
                Side of the images in px. None takes the model's own, else 224.
            clusters:
                As for `choose_cut`.
            seed:
                As for `choose_cut`.

        Raises:
            ValueError: If the model does not take such images, or has fewer patches
                than clusters.
        """
        side = image_sizes(model.origin, IMAGES, None, crop)["crop"]
        protocol = IMAGES.replace(resize=side, crop=side)
        model.check_size(side)
        cut = choose_cut(model, side, clusters, seed)
        return cls(model.to(devices.device), devices, cut, protocol)

    @classmethod
    def of_card(cls, card: IndexCard, devices: Devices, where: str) -> ImageEncoder:
        """Loads the model of an index, and checks that it is still the same.

        Args:
            card:
                The card of the index.
            devices:
                Where the model runs.
            where:
                The index, for messages.

        Raises:
            FileNotFoundError: If its weights are gone.
            ValueError: If it makes other tokens than those of the index.
        """
        clusters = card.identity["clusters"]
        model = load_frozen_model(**card.model)
        seed = card.model.get("seed", 0)
        encoder = cls.of(model, devices, card.crop, clusters, seed)
        card.check_same(encoder.card(Path(card.images), card.model), where)
        return encoder

    @property
    def transform(self) -> v2.Transform:
        """Cuts a uint8 image (3, height, width)."""
        return centre_crop(self.protocol, self.model.origin.interpolation)

    def __call__(self, images: Tensor) -> Encoded:
        """Encodes images.

        Args:
            images:
                uint8 tensor with shape (batch_size, 3, crop, crop), on any device.

        Returns:
            What they are, finite or not, on the device.
        """
        with torch.no_grad(), self.devices.fabric.autocast():
            result = self.model.unchecked(self.devices.fabric.to_device(images))
            return Encoded(self.cut(result), _cls(result))

    def checked(self, images: Tensor, names: list[str]) -> Encoded:
        """Encodes images of files.

        Args:
            images:
                As for `__call__`.
            names:
                Their files, for the message.

        Raises:
            RuntimeError: If what is made of one is not finite.
        """
        found = self(images)
        parts = found.parts
        values = torch.cat([parts.vectors.flatten(1), parts.masses, found.cls], dim=1)
        finite = values.isfinite().all(dim=1).tolist()
        if not all(finite):
            name = names[finite.index(False)]
            what = f"Features of '{name}' by '{self.model.origin.label}'"
            raise not_finite(what, self.devices.precision)
        return found

    def card(self, images: Path, model: Mapping[str, Any]) -> IndexCard:
        """The card of an index of such tokens.

        Args:
            images:
                Folder of the images.
            model:
                Arguments of `load_frozen_model` that load the model.
        """
        image = self.transform(known_image())
        with torch.no_grad(), self.devices.fabric.autocast():
            result = self.model(self.devices.fabric.to_device(image))
        parts, cls = self(image)
        vectors = [result.dense.float().mean(dim=1), cls]
        if not self.cut.clusters:  # rounding may move a patch to another cluster
            vectors += parts.vectors.unbind(dim=1)
        known = torch.cat([_short(v.cpu()) for v in vectors], dim=1)[0]
        return IndexCard(
            num_tokens=self.cut.num_parts,
            dim=parts.vectors.shape[-1],
            cls_dim=cls.shape[1],
            grid_size=parts.grid_size,
            resize=self.protocol.resize,
            crop=self.protocol.crop,
            identity={
                **numerics(self.model, self.devices),
                "parts": self.cut.kind,
                "clusters": self.cut.num_parts if self.cut.clusters else None,
            },
            images=str(images.resolve()),
            model=dict(model),
            known=[round(value, 6) for value in known.tolist()],
            versions=image_versions(),
        )


def _cls(result: Factorization) -> Tensor:
    if result.cls is None:
        return torch.empty(len(result.dense), 0, device=result.dense.device)
    return result.cls.float()


def _short(vectors: Tensor) -> Tensor:
    """Some numbers of the directions of vectors (1, dim)."""
    dim = vectors.shape[1]
    return unit_length(vectors) @ sketch_matrix(dim)[:, :KNOWN_DIM]
