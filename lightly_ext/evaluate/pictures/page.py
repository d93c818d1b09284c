"""What a model sees in images, as one page: photos with layers over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightly_ext.evaluate.pictures.gallery import CLUSTER_TITLE, shown_name
from lightly_ext.evaluate.pictures.seen import (
    LEAD_TITLE,
    PCA_TITLE,
    STRONGEST_TITLE,
    Seen,
)
from lightly_ext.pages.page import data_uri, render_page
from stellar_plugin.pca import pca_pictures
from stellar_plugin.visualize import (
    OPACITY,
    Uint8Array,
    is_absent,
    scale_maps,
    shown_mass,
    threshold_maps,
    token_leads,
    token_maps,
    token_masses,
    token_palette,
    without_absent,
)

PAGE = "index.html"
# Tokens of an image whose shares are drawn, the largest first.
NUM_SHARES = 8
# Pictures that are smaller are shown with their pixels.
SMOOTH_SIDE = 128


class Layer(NamedTuple):
    """A picture with a pixel per patch, over the photo or in its place.

    Attributes:
        title: What it shows.
        source: The picture as the address of itself.
    """

    title: str
    source: str


class Share(NamedTuple):
    """The share that a token has of an image.

    Attributes:
        token: Number of the token.
        text: The share as text.
        length: The same in percent of the largest.
        colour: Of the token, for CSS.
    """

    token: int
    text: str
    length: float
    colour: str


class ImageView(NamedTuple):
    """One image of the page.

    Attributes:
        name: Name of the file.
        photo: The part that the model sees, as the address of itself.
        small: Whether the photo has so few pixels that these are shown.
        layers: What lies over it.
        decoded: The reconstruction, None without.
        shares: Of the largest tokens, empty without tokens.
        tokens: Each token alone, likewise.
    """

    name: str
    photo: str
    small: bool
    layers: list[Layer]
    decoded: str | None
    shares: list[Share]
    tokens: list[Layer]


def render_visualize(
    title: str,
    seen: Seen,
    photos: Sequence[Uint8Array],
    legend: str,
    strength: str,
    threshold: float | None,
) -> str:
    """Fills the page.

    Args:
        title:
            Its title.
        seen:
            The images and what a model made of them.
        photos:
            The same parts of the images in more pixels, (height, width, 3) each.
        legend:
            What is shown, in words.
        strength:
            What the colour of a token alone means, in words.
        threshold:
            As for `run_visualize`.

    Returns:
        HTML with all pictures in it: no script, nothing from elsewhere.
    """
    pca = pca_pictures(seen.dense, seen.grid_size, seen.grid_size)
    views = [_view(seen, i, photo, pca[i], threshold) for i, photo in enumerate(photos)]
    page = render_page(
        "evaluate/pictures/visualize.html",
        title=title,
        views=views,
        legend=legend,
        strength=strength,
        small=min(seen.pictures.shape[1:3]) < SMOOTH_SIDE,
    )
    return shown_name(page)


def _view(
    seen: Seen, i: int, photo: Uint8Array, pca: Uint8Array, threshold: float | None
) -> ImageView:
    layers, shares, tokens = [], [], []
    if seen.localization is not None:
        localization = seen.localization[i]
        winners = localization.argmax(dim=-1).numpy()
        leads = OPACITY * token_leads(localization).sqrt()
        palette = token_palette(localization.shape[-1])
        layers = [
            Layer(LEAD_TITLE, _over(palette[winners], leads, seen.grid_size)),
            Layer(STRONGEST_TITLE, _over(palette[winners], OPACITY, seen.grid_size)),
        ]
        shares = _shares(localization)
        tokens = _tokens(localization, seen.grid_size, threshold)
    if seen.clusters is not None:
        of_patches = seen.clusters[i].numpy()
        colours = token_palette(int(of_patches.max()) + 1)[of_patches]
        layers.append(Layer(CLUSTER_TITLE, _over(colours, OPACITY, seen.grid_size)))
    layers.append(Layer(PCA_TITLE, _uri(pca)))
    decoded = None if seen.decoded is None else _uri(seen.decoded[i])
    small = min(photo.shape[:2]) < SMOOTH_SIDE
    return ImageView(seen.names[i], _uri(photo), small, layers, decoded, shares, tokens)


def _shares(localization: Tensor) -> list[Share]:
    masses = token_masses(localization)
    palette = token_palette(len(masses))
    order = masses.argsort(descending=True, stable=True)[:NUM_SHARES].tolist()
    return [
        Share(
            token,
            shown_mass(float(masses[token]), len(localization)),
            round(100 * float(masses[token] / masses.max()), 1),
            f"rgb({', '.join(map(str, palette[token].tolist()))})",
        )
        for token in order
    ]


def _tokens(
    localization: Tensor, grid_size: tuple[int, int], threshold: float | None
) -> list[Layer]:
    """Each token alone, as `highlight` has it: half the photo, half the colour."""
    masses = token_masses(localization).tolist()
    maps = token_maps(without_absent(localization)[None], grid_size, grid_size)[0]
    shown = scale_maps(maps) if threshold is None else threshold_maps(maps, threshold)
    layers = []
    for token, colour in enumerate(token_palette(len(maps))):
        title = f"token {token}, {shown_mass(masses[token], len(localization))}"
        if not is_absent(masses[token], len(localization)):
            title += f", maximum {float(maps[token].max()):.2f}"
        colours = shown[token].flatten()[:, None].numpy() * colour
        layers.append(Layer(title, _over(colours, 0.5, grid_size)))
    return layers


def _over(
    colours: Uint8Array, opacity: float | Tensor, grid_size: tuple[int, int]
) -> str:
    """Colours of patches, (num_patches, 3), as a transparent picture."""
    alpha = torch.as_tensor(opacity).expand(len(colours))[:, None].numpy() * 255
    pixels = np.concatenate([colours, alpha], axis=1).round().astype(np.uint8)
    return data_uri(Image.fromarray(pixels.reshape(*grid_size, 4)), "png")


def _uri(picture: Uint8Array) -> str:
    """A photo as JPEG, what is small as it is."""
    image = Image.fromarray(picture)
    if min(image.size) < SMOOTH_SIDE:
        return data_uri(image, "png")
    return data_uri(image, "jpeg", quality=85, optimize=True)
