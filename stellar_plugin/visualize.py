"""Pictures of what STELLAR sees: tokens in colour, patch features, reconstructions.

Pure functions from tensors to uint8 RGB arrays with shape (..., height, width, 3), fit
for `PIL.Image.fromarray` or matplotlib's `imshow`.

On every picture and page tokens are counted from 0, and a token has the colour that
`token_palette` gives its number.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize

from stellar_plugin.encoder import Factorization
from stellar_plugin.model import Stellar, resized

Uint8Array = NDArray[np.uint8]

# A token is absent from an image if all patches together have less of it than this part
# of one patch.
ABSENT_PATCHES = 0.5
# Of colours over pictures.
OPACITY = 0.55
# Successive hues a golden ratio apart never come close to one another.
_HUE_STEP = 0.618034


def token_palette(num_tokens: int) -> Uint8Array:
    """Distinct bright colours, one per token.

    Args:
        num_tokens:
            Number of tokens, at least 1.

    Returns:
        RGB colours with shape (num_tokens, 3). The first colours do not depend on how
        many follow.

    Raises:
        ValueError: If there is no token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
    # Every other colour is darker: hues of many tokens lie close together.
    colours = [
        colorsys.hsv_to_rgb(i * _HUE_STEP % 1, 0.75, 1.0 - 0.25 * (i % 2))
        for i in range(num_tokens)
    ]
    return _to_uint8(np.array(colours))


def to_pictures(images: Tensor) -> Uint8Array:
    """Turns intensities into pictures.

    Args:
        images:
            Intensities in [0, 1] with shape (batch_size, 3, height, width); values
            outside are clipped.

    Returns:
        Pictures with shape (batch_size, height, width, 3).
    """
    return _to_uint8(images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu())


def denormalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Uint8Array:
    """Turns normalised images back into pictures.

    Args:
        images:
            Normalised images with shape (batch_size, 3, height, width).
        mean:
            Mean that was subtracted, one value per channel.
        std:
            Standard deviation that was divided by, one value per channel.

    Returns:
        Pictures with shape (batch_size, height, width, 3).
    """
    inverse_std = [1 / value for value in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return to_pictures(normalize(images.float(), shift, inverse_std))


def strongest_token(localization: Tensor) -> Tensor:
    """Gives every patch wholly to its strongest token.

    Args:
        localization:
            Localization matrices with shape (batch_size, num_patches, num_tokens).

    Returns:
        Tensor with the same shape, one-hot over the tokens.
    """
    winners = localization.argmax(dim=-1)
    one_hot = F.one_hot(winners, localization.shape[-1])
    return one_hot.to(localization.dtype)


def token_leads(localization: Tensor) -> Tensor:
    """How far ahead of the second the strongest token of each patch is.

    Args:
        localization:
            Localization matrices with shape (..., num_patches, num_tokens).

    Returns:
        float32 tensor with shape (..., num_patches), in [0, 1]: 0 where two tokens are
        level, 1 where all others together have nothing, or there are none.
    """
    # A token that has nothing, so that also a single one has a second.
    padded = F.pad(localization.detach().float(), (0, 1))
    first, second = padded.topk(2, dim=-1).values.unbind(dim=-1)
    return 1 - second / first.clamp(min=torch.finfo(torch.float32).tiny)


def token_masses(localization: Tensor) -> Tensor:
    """Share of the image that each token has: the mean of its localization.

    Args:
        localization:
            Localization matrices with shape (..., num_patches, num_tokens).

    Returns:
        float32 tensor with shape (..., num_tokens), in [0, 1]; sums to one.
    """
    return localization.detach().float().mean(dim=-2)


def without_absent(localization: Tensor) -> Tensor:
    """Localization with zeros for tokens that are absent, see `ABSENT_PATCHES`.

    Relative to its own maximum even a token that is next to nothing would be somewhere.

    Args:
        localization:
            Localization matrices with shape (..., num_patches, num_tokens).

    Returns:
        Tensor with the same shape and dtype.
    """
    patches = token_masses(localization) * localization.shape[-2]
    return localization * (patches >= ABSENT_PATCHES)[..., None, :]


def is_absent(mass: float, num_patches: int) -> bool:
    """Whether a token with such a share of an image is absent, see `ABSENT_PATCHES`."""
    return mass * num_patches < ABSENT_PATCHES


def shown_mass(mass: float, num_patches: int) -> str:
    """Share of the image that a token has as text, and whether that is absent."""
    absent = is_absent(mass, num_patches)
    return f"absent, {mass:.2%}" if absent else f"{mass:.1%}"


def token_maps(
    localization: Tensor,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    mode: str = "nearest",
) -> Tensor:
    """Lays localization matrices out over the image.

    Args:
        localization:
            Localization matrices with shape (batch_size, num_patches, num_tokens).
        grid_size:
            Height and width of the patch grid.
        image_size:
            Height and width of the image in pixels.
        mode:
            Interpolation as in `torch.nn.functional.interpolate`: "nearest" shows the
            patches, "bilinear" is smooth.

    Returns:
        Maps with shape (batch_size, num_tokens, height, width), in [0, 1].

    Raises:
        ValueError: If the grid does not have as many patches as the matrices.
    """
    num_patches = localization.shape[1]
    if grid_size[0] * grid_size[1] != num_patches:
        raise ValueError(
            f"grid_size {grid_size} has {grid_size[0] * grid_size[1]} patches, the "
            f"localization matrices have {num_patches}; pass Factorization.grid_size."
        )
    grid = localization.detach().float().mT.unflatten(2, grid_size)
    return F.interpolate(grid, size=image_size, mode=mode)


def overlay(
    pictures: Uint8Array,
    colours: Uint8Array,
    opacity: float | NDArray[np.float32] = OPACITY,
) -> Uint8Array:
    """Lays colours over pictures.

    Args:
        pictures:
            Pictures with shape (..., height, width, 3).
        colours:
            Colours with the same shape.
        opacity:
            0 shows the picture alone, 1 the colours alone; one number, or an array
            that broadcasts against the pictures.

    Returns:
        Pictures with the same shape.

    Raises:
        ValueError: If the shapes differ or the opacity is not in [0, 1].
    """
    if pictures.shape != colours.shape:
        raise ValueError(
            f"pictures {pictures.shape} and colours {colours.shape} differ in shape."
        )
    if np.min(opacity) < 0 or np.max(opacity) > 1:
        raise ValueError(f"opacity must be in [0, 1], got {opacity}.")
    mixed = (1 - opacity) * pictures.astype(np.float32) + opacity * colours
    return mixed.round().astype(np.uint8)


def overlay_localization(
    pictures: Uint8Array, localization: Tensor, grid_size: tuple[int, int]
) -> Uint8Array:
    """Gives every patch the colour of its strongest token, over the image.

    The colour is as opaque as the token leads: by the square root of `token_leads`, so
    that small leads can be seen. Mixing the colours of all tokens would be true to the
    localization as well, but many colours mix to grey.

    Args:
        pictures:
            Pictures with shape (batch_size, height, width, 3).
        localization:
            Localization matrices with shape (batch_size, num_patches, num_tokens): soft
            as the encoder gives them, or hard from `strongest_token`.
        grid_size:
            Height and width of the patch grid.

    Returns:
        Pictures with the same shape.
    """
    height, width = pictures.shape[1:3]
    palette = torch.from_numpy(token_palette(localization.shape[-1]))
    colours = palette[localization.argmax(dim=-1).cpu()].float()
    opacity = OPACITY * token_leads(localization).cpu().sqrt()
    layers = torch.cat([colours, opacity[..., None]], dim=-1)
    shown = token_maps(layers, grid_size, (height, width)).permute(0, 2, 3, 1).numpy()
    return overlay(pictures, shown[..., :3].astype(np.uint8), shown[..., 3:])


@torch.no_grad()
def overlay_tokens(model: Stellar, images: Tensor) -> Uint8Array:
    """Images with every patch in the colour of its strongest token.

    See `overlay_localization`.

    Args:
        model:
            The model, in evaluation mode.
        images:
            Normalised images with shape (batch_size, 3, height, width).

    Returns:
        Pictures with shape (batch_size, height, width, 3).

    Examples:
        >>> images = model.transform()(Image.open("photo.jpg")).unsqueeze(0)
        >>> Image.fromarray(overlay_tokens(model, images)[0]).save("where.png")
    """
    pictures, result = denormalize(images, model.mean, model.std), model(images)
    return overlay_localization(pictures, result.localization, result.grid_size)


def scale_maps(maps: Tensor) -> Tensor:
    """Shows each map by its own measure: in parts of its maximum.

    Args:
        maps:
            Maps with shape (..., height, width), at least 0.

    Returns:
        Tensor with the same shape and dtype, in [0, 1]; a map of zeros stays as it is.
    """
    peak = maps.amax(dim=(-2, -1), keepdim=True)
    return maps / peak.clamp(min=torch.finfo(maps.dtype).tiny)


def threshold_maps(maps: Tensor, threshold: float) -> Tensor:
    """Says where maps are strong, each by its own measure.

    Relative to the maximum, since the strength of a localization map depends on how
    many tokens share the patches.

    Args:
        maps:
            Maps with shape (..., height, width), in [0, 1].
        threshold:
            Fraction of a map's maximum, in [0, 1].

    Returns:
        Tensor with the same shape and dtype, 1 where a map is positive and at least
        `threshold` times its maximum, else 0.

    Raises:
        ValueError: If the threshold is not in [0, 1].
    """
    check_threshold(threshold)
    peak = maps.amax(dim=(-2, -1), keepdim=True)
    return ((maps > 0) & (maps >= threshold * peak)).to(maps.dtype)


def check_threshold(threshold: float) -> None:
    """Raises a ValueError unless a threshold is in [0, 1]."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}.")


def highlight(pictures: Uint8Array, weights: Tensor, colour: Uint8Array) -> Uint8Array:
    """Lays one colour over dimmed pictures, as strong as weights say.

    Args:
        pictures:
            Pictures with shape (batch_size, height, width, 3).
        weights:
            Weights in [0, 1] with shape (batch_size, height, width).
        colour:
            RGB colour with shape (3,).

    Returns:
        Pictures with the same shape.
    """
    # Half a picture, so that the colour shows on bright ones, and half a colour, so
    # that the picture shows under it.
    mixed = 0.5 * pictures + 0.5 * weights.cpu().numpy()[..., None] * colour
    return mixed.round().astype(np.uint8)


def overlay_token(
    pictures: Uint8Array,
    factorization: Factorization,
    token: int,
    threshold: float | None = None,
) -> Uint8Array:
    """Shows where one token is: its colour over dimmed pictures.

    It is nowhere in pictures that it is absent from, see `without_absent`.

    Args:
        pictures:
            Pictures with shape (batch_size, height, width, 3).
        factorization:
            What the encoder made of them.
        token:
            Number of the token, counted from 0.
        threshold:
            Fraction of the token's maximum in a picture from which on a patch is
            coloured, and then fully, see `threshold_maps`. None colours every patch by
            what it has of that maximum, see `scale_maps`.

    Returns:
        Pictures with the same shape.

    Raises:
        ValueError: If there is no such token, or the threshold is not in [0, 1].
    """
    num_tokens = factorization.localization.shape[-1]
    if not 0 <= token < num_tokens:
        raise ValueError(f"token must be in 0 to {num_tokens - 1}, got {token}.")
    height, width = pictures.shape[1:3]
    localization = without_absent(factorization.localization)
    maps = token_maps(localization, factorization.grid_size, (height, width))[:, token]
    maps = scale_maps(maps) if threshold is None else threshold_maps(maps, threshold)
    return highlight(pictures, maps, token_palette(num_tokens)[token])


@torch.no_grad()
def reconstruction_rows(model: Stellar, images: Tensor) -> list[Uint8Array]:
    """Rows of a picture: input, reconstruction, strongest token of each patch.

    Args:
        model:
            The model, in evaluation mode.
        images:
            Normalised images with shape (batch_size, 3, height, width).

    Returns:
        Three arrays with shape (batch_size, height, width, 3), for `tile_pictures`.
    """
    inputs = denormalize(images, model.mean, model.std)
    result = model(images)
    decoded = model.decode(result.lowrank, result.grid_size)
    # Codes are of 16 px, also for patches of another size.
    decoded = resized(decoded, images.shape[-2:])
    tokens = strongest_token(result.localization)
    overlay = overlay_localization(inputs, tokens, result.grid_size)
    return [inputs, to_pictures(decoded), overlay]


def tile_pictures(
    rows: Sequence[Uint8Array], gap: int = 2, background: int = 255
) -> Uint8Array:
    """Puts rows of pictures of one size into one picture.

    Args:
        rows:
            Arrays with shape (num_columns, height, width, 3), all alike.
        gap:
            Pixels between and around the pictures.
        background:
            Grey level of the gaps, 0 to 255.

    Returns:
        Picture with shape (total_height, total_width, 3).

    Raises:
        ValueError: If there are no rows or they differ in shape.
    """
    shapes = {row.shape for row in rows}
    if len(shapes) != 1:
        raise ValueError(f"Rows must all have one shape, got {sorted(shapes)}.")
    grid = np.stack(list(rows))  # (rows, columns, height, width, 3)
    pad = [(0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)]
    padded = np.pad(grid, pad, constant_values=background)
    num_rows, num_columns, height, width, _ = padded.shape
    joined = padded.swapaxes(1, 2).reshape(num_rows * height, num_columns * width, 3)
    return np.pad(joined, [(0, gap), (0, gap), (0, 0)], constant_values=background)


def _to_uint8(values: Tensor | NDArray[np.float64]) -> Uint8Array:
    return (np.asarray(values) * 255).round().astype(np.uint8)
