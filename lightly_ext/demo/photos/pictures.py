"""Pictures of photos: before and after, token by token, and what is near to what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.demo.photos.scores import Seen, reconstructions
from lightly_ext.demo.report import Gallery
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.loading import load_stellar
from stellar_plugin.visualize import (
    Uint8Array,
    highlight,
    overlay_localization,
    shown_mass,
    strongest_token,
    to_pictures,
    token_maps,
    token_masses,
    token_palette,
    without_absent,
)

NUM_PHOTOS, NUM_TOKEN_PHOTOS = 8, 4
NUM_QUERIES, NUM_NEIGHBOURS = 6, 7
# Random tokens that the distinct ones are chosen from.
NUM_CANDIDATES = 1024
# Side of a picture on the page in px, at most.
SIDE = 128


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
        """A photo, (side, side, 3)."""
        return to_pictures(self.images[number : number + 1].float() / 255)[0]


def spread(total: int, count: int) -> list[int]:
    """Numbers of at most so many photos, spread evenly."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def before_after_gallery(
    untrained: FrozenModel, trained: FrozenModel, before: Shown, after: Shown
) -> Gallery:
    """Photos, reconstructions and tokens, before STELLAR's training and after.

    Args:
        untrained:
            The model with random weights.
        trained:
            The trained model.
        before:
            Test photos as the untrained model sees them.
        after:
            The same photos as the trained one sees them.
    """
    chosen = spread(len(after.images), NUM_PHOTOS)
    images = after.images[chosen]
    pictures = to_pictures(images.float() / 255)
    rows = {"photo": pictures}
    for title, model in (("random weights", untrained), ("trained", trained)):
        inputs = model.normalize(images.to(model.mean.device))
        decoded = reconstructions(load_stellar(model), inputs)
        rows[f"reconstruction, {title}"] = to_pictures(decoded)
    for title, shown in (("random weights", before), ("trained", after)):
        assert shown.seen.localization is not None
        tokens = strongest_token(shown.seen.localization[chosen])
        rows[f"strongest token per patch, {title}"] = overlay_localization(
            pictures, tokens, shown.seen.grid_size
        )
    return Gallery(rows, {"photo": [after.title(i) for i in chosen]})


def token_gallery(test: Shown) -> Gallery:
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
        notes[title] = ["photo", *(f"{i}: {x}" for i, x in enumerate(shares))]
    return Gallery(rows, notes)


def near_tokens(bank: Shown, seed: int) -> Gallery:
    """Distinct tokens of training photos, and the nearest ones of other photos."""
    units = F.normalize(bank.seen.sparse.float(), dim=-1)
    rows: dict[str, Uint8Array] = {}
    notes: dict[str, list[str]] = {}
    for i, (image, token) in enumerate(distinct_tokens(units, NUM_QUERIES, seed)):
        similarity, nearest = (units @ units[image, token]).max(dim=1)
        similarity[image] = -torch.inf
        count = min(NUM_NEIGHBOURS, len(units) - 1)
        found = similarity.argsort(descending=True, stable=True)[:count]
        images = [image, *found.tolist()]
        tokens = [token, *nearest[found].tolist()]
        marked = [_marked(bank, *pair) for pair in zip(images, tokens, strict=True)]
        title = f"token {token} of a photo, and the tokens nearest to it"
        rows[f"{i + 1}. {title}"] = np.stack(marked)
        cosines = [f", {value:.2f}" for value in similarity[found].tolist()]
        texts = zip(map(bank.title, images), ["", *cosines], strict=True)
        notes[f"{i + 1}. {title}"] = [name + cosine for name, cosine in texts]
    return Gallery(rows, notes)


def distinct_tokens(units: Tensor, number: int, seed: int) -> list[tuple[int, int]]:
    """Chooses tokens greedily, each the farthest from those chosen before.

    Args:
        units:
            Tokens of unit length with shape (num_photos, num_tokens, dim).
        number:
            How many to choose, at most all of them.
        seed:
            Draws those to choose from; the first of them is the first.

    Returns:
        Photo and number of each.
    """
    vectors = units.flatten(0, 1)
    rng = np.random.default_rng(seed)
    count = min(NUM_CANDIDATES, len(vectors))
    drawn = torch.from_numpy(rng.choice(len(vectors), count, replace=False))
    vectors = vectors[drawn]
    chosen, closest = [0], vectors @ vectors[0]
    while len(chosen) < min(number, count):
        closest[chosen[-1]] = torch.inf
        chosen.append(int(closest.argmin()))
        closest = torch.maximum(closest, vectors @ vectors[chosen[-1]])
    return [divmod(place, units.shape[1]) for place in drawn[chosen].tolist()]


def near_photos(bank: Shown, test: Shown) -> Gallery:
    """Test photos, and the training photos whose mean token is nearest."""
    rows: dict[str, Uint8Array] = {}
    notes: dict[str, list[str]] = {}
    units = F.normalize(bank.seen.features["sparse"], dim=1)
    for number in spread(len(test.images), NUM_QUERIES):
        query = F.normalize(test.seen.features["sparse"][number], dim=0)
        cosines, nearest = (units @ query).topk(min(NUM_NEIGHBOURS, len(units)))
        found = list(map(bank.picture, nearest.tolist()))
        title = f"{len(rows) + 1}. {test.title(number)}, and the photos nearest to it"
        rows[title] = np.stack([test.picture(number), *found])
        texts = zip(map(bank.title, nearest.tolist()), cosines.tolist(), strict=True)
        notes[title] = [test.title(number), *(f"{n}, {c:.2f}" for n, c in texts)]
    return Gallery(rows, notes)


def _localization(shown: Shown) -> Tensor:
    assert shown.seen.localization is not None
    return shown.seen.localization


def _marked(shown: Shown, number: int, token: int) -> Uint8Array:
    """A photo with a token in its colour, as strong as the patches have it."""
    localization = without_absent(_localization(shown)[number : number + 1])
    picture = shown.picture(number)[None]
    maps = token_maps(localization, shown.seen.grid_size, picture.shape[1:3])
    return highlight(picture, maps[:, token], token_palette(maps.shape[1])[token])[0]
