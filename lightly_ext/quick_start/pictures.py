"""Pictures of a try: what an encoder sees in photos, and what is near to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.loading import load_stellar
from lightly_ext.quick_start.scores import Seen, reconstructions
from stellar_plugin.pca import pca_pictures
from stellar_plugin.visualize import (
    ABSENT_PATCHES,
    Uint8Array,
    overlay_localization,
    scale_maps,
    shown_mass,
    strongest_token,
    to_pictures,
    token_maps,
    token_masses,
    token_palette,
    without_absent,
)

NUM_PHOTOS, NUM_TOKEN_PHOTOS = 6, 3
NUM_QUERIES, NUM_NEIGHBOURS = 5, 7
# Random tokens that the distinct ones are chosen from.
NUM_CANDIDATES = 1024
# Side of a picture on the page in px.
SIDE = 144
# What is left of a photo's contrast under the colour of a token, and how much of the
# colour covers it at most.
CONTRAST, OPACITY = 0.55, 0.6


@dataclass(frozen=True)
class Gallery:
    """Rows of small pictures.

    Attributes:
        title:
            What is shown.
        text:
            How to read it.
        rows:
            Pictures with shape (num_pictures, SIDE, SIDE, 3) by the title of the row.
        notes:
            What to say below each picture of a row, by its title.
        compares:
            Whether pictures below one another are of the same photo.
    """

    title: str
    text: str
    rows: Mapping[str, Uint8Array]
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    compares: bool = False


@dataclass(frozen=True)
class Shown:
    """Photos, what a model makes of them, and what they are called.

    Attributes:
        images:
            uint8 tensor with shape (num_photos, 3, side, side).
        seen:
            What the model makes of them.
        files:
            Their files.
    """

    images: Tensor
    seen: Seen
    files: ImageFiles

    def title(self, number: int) -> str:
        """Class of a photo, or the name of its file."""
        if self.files.labels is None:
            return Path(self.files.names[number]).name
        return self.files.classes[self.files.labels[number]].replace("_", " ")

    def picture(self, number: int) -> Uint8Array:
        """A photo, (SIDE, SIDE, 3)."""
        return photo_pictures(self.images[number : number + 1])[0]


@dataclass(frozen=True)
class Closely:
    """What an encoder makes of the photos that are shown.

    Attributes:
        dense:
            Patch features with shape (num_photos, num_patches, dim).
        grid_size:
            Height and width of the patch grid.
        localization:
            Localization with shape (num_photos, num_patches, num_queries), None of a
            model without queries.
        decoded:
            Reconstructions in [0, 1] with shape (num_photos, 3, side, side), or None.
    """

    dense: Tensor
    grid_size: tuple[int, int]
    localization: Tensor | None
    decoded: Tensor | None


def look_closely(model: FrozenModel, images: Tensor) -> Closely:
    """Runs a model over a few photos, uint8 (num_photos, 3, side, side)."""
    inputs = images.to(model.mean.device)
    result = model(inputs)
    localization = decoded = None
    if model.num_queries and model.has_localization:
        localization = result.localization.float().cpu()
        decoded = reconstructions(load_stellar(model), model.normalize(inputs))
    return Closely(result.dense.float().cpu(), result.grid_size, localization, decoded)


def photo_pictures(images: Tensor) -> Uint8Array:
    """Photos as pictures of the page.

    Args:
        images:
            uint8, or in [0, 1], with shape (num_photos, 3, side, side).
    """
    scale = 255 if images.dtype == torch.uint8 else 1
    resized = F.interpolate(
        images.float() / scale, size=(SIDE, SIDE), mode="bicubic", antialias=True
    )
    return to_pictures(resized)


def spread(total: int, count: int) -> list[int]:
    """Numbers of at most so many photos, spread evenly."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def token_gallery(test: Shown, which: str) -> Gallery:
    """Where each token of some photos is, one photo per row."""
    rows: dict[str, Uint8Array] = {}
    notes: dict[str, list[str]] = {}
    num_patches, num_tokens = _localization(test)[0].shape
    for number in spread(len(test.images), NUM_TOKEN_PHOTOS):
        masses = token_masses(_localization(test)[number]).tolist()
        title = f"{len(rows) + 1}. {test.title(number)}"
        maps = [_marked(test, number, token) for token in range(num_tokens)]
        rows[title] = np.stack([test.picture(number), *maps])
        shares = [shown_mass(mass, num_patches) for mass in masses]
        notes[title] = ["photo", *(f"token {i}: {x}" for i, x in enumerate(shares))]
    text = (
        f"What each of the {num_tokens} tokens of the {which} model stands for, in its "
        "colour: full where the token has the most of a patch, so every map is scaled "
        "to its own maximum. Below: the share of the photo that the token has, all of "
        f"them together 100 %. One that has less than {ABSENT_PATCHES} of one patch is "
        "absent, and nowhere in colour."
    )
    return Gallery("Token by token", text, rows, notes)


def strongest_gallery(
    titles: Sequence[str], images: Tensor, closely: Mapping[str, Closely]
) -> Gallery:
    """Each patch in the colour of the token that it belongs to most.

    Args:
        titles:
            What the photos are called.
        images:
            uint8 tensor with shape (num_photos, 3, side, side).
        closely:
            What models with tokens make of them, by their names.
    """
    photos = photo_pictures(images)
    rows = {"photo": photos}
    for name, found in closely.items():
        assert found.localization is not None
        tokens = strongest_token(found.localization)
        rows[name] = overlay_localization(photos, tokens, found.grid_size)
    text = (
        "Each patch in the colour of the token that it belongs to most. A token has "
        "the same colour in all photos of a row; between rows colours say nothing."
    )
    notes = {"photo": titles}
    return Gallery("Strongest token per patch", text, rows, notes, compares=True)


def pca_gallery(
    titles: Sequence[str], images: Tensor, closely: Mapping[str, Closely]
) -> Gallery:
    """Patch features as colours, arguments as of `strongest_gallery`."""
    rows = {"photo": photo_pictures(images)}
    for name, found in closely.items():
        rows[name] = pca_pictures(found.dense, found.grid_size, (SIDE, SIDE))
    text = (
        "The first three principal components of the patches as red, green and blue. "
        "Patches of one colour have similar features, in all photos of a row; between "
        "rows colours say nothing. Colours that follow the parts of things mean more "
        "than colours that follow brightness, which random weights have too."
    )
    notes = {"photo": titles}
    return Gallery("Patch features", text, rows, notes, compares=True)


def reconstruction_gallery(
    titles: Sequence[str], images: Tensor, closely: Mapping[str, Closely]
) -> Gallery:
    """Photos decoded from their tokens, arguments as of `strongest_gallery`."""
    rows = {"photo": photo_pictures(images)}
    num_tokens = 0
    for name, found in closely.items():
        assert found.decoded is not None and found.localization is not None
        rows[name] = photo_pictures(found.decoded)
        num_tokens = found.localization.shape[2]
    text = (
        f"Decoded from {num_tokens} tokens and their maps alone: what of a photo is in "
        "them. Training asks for this only in part; sharp it does not become."
    )
    notes = {"photo": titles}
    return Gallery("Reconstruction", text, rows, notes, compares=True)


def near_photos(bank: Shown, test: Shown) -> Gallery:
    """Test photos, and the nearest training photos by the mean of the sparse tokens."""
    asked = F.normalize(test.seen.features["sparse"], dim=1)
    kept = F.normalize(bank.seen.features["sparse"], dim=1)
    rows: dict[str, Uint8Array] = {}
    notes: dict[str, list[str]] = {}
    for number in spread(len(test.images), NUM_QUERIES):
        similarity = kept @ asked[number]
        count = min(NUM_NEIGHBOURS, len(kept))
        found = similarity.argsort(descending=True, stable=True)[:count].tolist()
        title = f"{len(rows) + 1}. {test.title(number)}"
        pictures = [test.picture(number), *map(bank.picture, found)]
        rows[title] = np.stack(pictures)
        texts = [f"{bank.title(i)}, {similarity[i]:.2f}" for i in found]
        notes[title] = ["test photo", *texts]
    text = (
        "The first of each row is a test photo; behind it the training photos that the "
        "trained model finds most similar, by the mean of the sparse tokens. Numbers "
        "are cosines."
    )
    return Gallery("Nearest images", text, rows, notes)


def near_tokens(bank: Shown, seed: int) -> Gallery:
    """Distinct tokens of training photos, and the nearest ones of other photos."""
    units = F.normalize(bank.seen.sparse.float(), dim=-1)
    # A token that is absent from a photo has nothing to show there.
    present = without_absent(_localization(bank)).sum(dim=1) > 0
    places = present.nonzero().tolist()
    chosen = distinct_tokens(units[present], NUM_QUERIES, seed)
    rows: dict[str, Uint8Array] = {}
    notes: dict[str, list[str]] = {}
    for i, (image, token) in enumerate(places[number] for number in chosen):
        cosines = units @ units[image, token]
        similarity, nearest = cosines.masked_fill(~present, -torch.inf).max(dim=1)
        similarity[image] = -torch.inf
        count = min(NUM_NEIGHBOURS, len(units) - 1)
        found = similarity.argsort(descending=True, stable=True)[:count]
        images = [image, *found.tolist()]
        tokens = [token, *nearest[found].tolist()]
        marked = [_marked(bank, *pair) for pair in zip(images, tokens, strict=True)]
        title = f"{i + 1}. token {token} of a photo"
        rows[title] = np.stack(marked)
        shown = [f", {value:.2f}" for value in similarity[found].tolist()]
        texts = zip(map(bank.title, images), ["", *shown], strict=True)
        notes[title] = [name + cosine for name, cosine in texts]
    text = (
        "Tokens of training photos that differ most from one another, and the most "
        "similar tokens of other training photos, one of each photo; numbers are "
        "cosines. What neighbours share is what the token stands for."
    )
    return Gallery("Nearest tokens", text, rows, notes)


def distinct_tokens(units: Tensor, number: int, seed: int) -> list[int]:
    """Chooses tokens greedily, each the farthest from those chosen before.

    Args:
        units:
            Tokens of unit length with shape (num_tokens, dim).
        number:
            How many to choose, at most all of them.
        seed:
            Draws those to choose from; the first of them is the first.

    Returns:
        Their numbers.
    """
    rng = np.random.default_rng(seed)
    count = min(NUM_CANDIDATES, len(units))
    drawn = torch.from_numpy(rng.choice(len(units), count, replace=False))
    vectors = units[drawn]
    chosen, closest = [0], vectors @ vectors[0]
    while len(chosen) < min(number, count):
        closest[chosen[-1]] = torch.inf
        chosen.append(int(closest.argmin()))
        closest = torch.maximum(closest, vectors @ vectors[chosen[-1]])
    return drawn[chosen].tolist()


def marked_token(
    picture: Uint8Array, weights: Tensor, colour: Uint8Array
) -> Uint8Array:
    """A pale photo with a token in its colour, which shows on dark photos too.

    Args:
        picture:
            Photo with shape (height, width, 3).
        weights:
            Map of the token with shape (height, width), in [0, 1].
        colour:
            RGB colour with shape (3,).
    """
    grey = picture.mean(axis=2, keepdims=True)
    pale = 255 - CONTRAST * (255 - grey)
    covers = OPACITY * weights.numpy()[..., None]
    return (pale + covers * (colour - pale)).round().astype(np.uint8)


def _localization(shown: Shown) -> Tensor:
    assert shown.seen.localization is not None
    return shown.seen.localization


def _marked(shown: Shown, number: int, token: int) -> Uint8Array:
    localization = without_absent(_localization(shown)[number : number + 1])
    maps = scale_maps(token_maps(localization, shown.seen.grid_size, (SIDE, SIDE)))[0]
    colour = token_palette(len(maps))[token]
    return marked_token(shown.picture(number), maps[token], colour)
