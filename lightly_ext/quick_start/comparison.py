"""Encoders side by side on the same photos: scores and pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightly_ext.data.views import SingleViewTransform
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles
from lightly_ext.evaluate.loading import load_stellar
from lightly_ext.quick_start import scores as measured
from lightly_ext.quick_start.files import PhotoSets
from lightly_ext.quick_start.pictures import (
    NUM_PHOTOS,
    Closely,
    Gallery,
    Shown,
    look_closely,
    near_photos,
    near_tokens,
    pca_gallery,
    reconstruction_gallery,
    spread,
    strongest_gallery,
    token_gallery,
)
from lightly_ext.quick_start.scores import RAW, TRAINED, UNTRAINED, Scores, Seen


class Comparison:
    """What encoders make of the photos of a try.

    Attributes:
        photos:
            The copies.
        side:
            Side of the photos as encoders get them, in px.
        scores:
            Scores by the names of the encoders.
    """

    def __init__(self, photos: PhotoSets, side: int) -> None:
        self.photos = photos
        self.side = side
        self.scores: dict[str, Scores] = {}
        self._bank, self._test = (read(f, side) for f in (photos.bank, photos.test))
        self._shown = spread(len(self._test), NUM_PHOTOS)
        self._closely: dict[str, Closely] = {}
        self._seen: dict[str, tuple[Seen, Seen]] = {}

    def add_raw(self) -> None:
        """Scores raw pixels, which are no model."""
        self._score(RAW, measured.look_raw)
        guess = (self._bank.float().mean(dim=0) / 255).expand(self._test.shape)
        self.scores[RAW]["psnr"] = measured.psnr(guess, self._test)

    def add(self, name: str, model: FrozenModel) -> None:
        """Scores an encoder, and keeps what it makes of the photos that are shown."""
        self._score(name, lambda images: measured.look(model, images))
        closely = look_closely(model, self._test[self._shown])
        self._closely[name] = closely
        if closely.decoded is not None:
            inputs = model.normalize(self._test.to(model.mean.device))
            decoded = measured.reconstructions(load_stellar(model), inputs)
            self.scores[name]["psnr"] = measured.psnr(decoded, self._test)

    def galleries(self, seed: int) -> list[Gallery]:
        """Pictures of the encoders so far; those of one are of the trained, if it is.

        Args:
            seed:
                Draws tokens to find others near to.
        """
        name = TRAINED if TRAINED in self._seen else UNTRAINED
        bank, test = (
            Shown(images, seen, files)
            for images, seen, files in zip(
                (self._bank, self._test),
                self._seen[name],
                (self.photos.bank, self.photos.test),
                strict=True,
            )
        )
        titles, images = [test.title(i) for i in self._shown], self._test[self._shown]
        localizing = {
            name: closely
            for name, closely in self._closely.items()
            if closely.localization is not None
        }
        found = [
            token_gallery(test, name),
            strongest_gallery(titles, images, localizing),
            pca_gallery(titles, images, self._closely),
            reconstruction_gallery(titles, images, localizing),
        ]
        if name == TRAINED:
            found += [near_photos(bank, test), near_tokens(bank, seed)]
        return found

    def _score(self, name: str, look: Callable[[Tensor], Seen]) -> None:
        bank, test = look(self._bank), look(self._test)
        scores = measured.unlabelled_scores(test)
        if self.photos.unlabelled:
            first, second = map(look, measured.crops(self._test))
            scores |= measured.found_again(first, second)
        else:
            scores |= measured.labelled_scores(bank, test, self.photos)
        self.scores[name], self._seen[name] = scores, (bank, test)


def read(files: ImageFiles, side: int) -> Tensor:
    """Photos as encoders get them, uint8 (num_photos, 3, side, side)."""
    photos = EvaluationImages(files, SingleViewTransform(side))
    return torch.stack([photos[i].image for i in range(len(files))])
