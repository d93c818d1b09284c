"""In which size a model gets its images: its own, the protocol's or the user's."""

from __future__ import annotations

import math
from typing import Any

from lightly_ext.evaluate.frozen_model import Origin
from stellar_plugin.protocols import Protocol


def image_sizes(
    origin: Origin, protocol: Protocol, resize: int | None, crop: int | None
) -> dict[str, int]:
    """Chooses `resize` and `crop`, those of them that a protocol has.

    Args:
        origin:
            Of the model: the size that it was made for.
        protocol:
            The protocol as published, which has at least `crop`.
        resize:
            Length of the shorter side after resizing in px, None to choose it.
        crop:
            Side of the crop in px, None to choose it.

    Raises:
        ValueError: If the crop is larger than the resized image, or the model was made
            for images that are not square and no crop is named.
    """
    published: Any = protocol
    own = origin.image_size or (published.crop, published.crop)
    if crop is None and own[0] != own[1]:
        raise ValueError(
            f"'{origin.label}' was made for images of {own[0]} x {own[1]} px, and "
            "evaluation cuts squares: name their side with --crop."
        )
    side = crop or own[0]
    if not hasattr(published, "resize"):
        return {"crop": side}
    own_resize = (
        published.resize if own[0] == published.crop else _resize(origin, own[0])
    )
    shorter = resize or max(own_resize, crop or 0)
    if side > shorter:
        raise ValueError(
            f"crop {side} is more than resize {shorter}: beyond the image there is "
            "nothing to see. Name a larger --resize or a smaller --crop."
        )
    return {"resize": shorter, "crop": side}


def described_sizes(origin: Origin, protocol: Protocol) -> str:
    """How images are cut, and what the model itself says of that."""
    text = f"Images: {described_cut(protocol)}"
    if origin.image_size is None:
        return f"{text}. The model has no size of its own."
    text += ". The model was made for {} x {} px".format(*origin.image_size)
    if origin.crop_pct is not None:
        own = _resize(origin, origin.image_size[0])
        text += f", of {own} px resized (crop_pct {origin.crop_pct:g})"
    return f"{text}."


def described_cut(protocol: Protocol) -> str:
    """The part of an image that a protocol with a crop takes, in words."""
    card = protocol.card()
    text = f"{card['crop']} x {card['crop']} px"
    if "resize" not in card:
        return text
    return f"{text}, from the middle of the image resized to {card['resize']} px"


def _resize(origin: Origin, side: int) -> int:
    """As timm computes it; without `crop_pct` the crop is the whole shorter side."""
    return math.floor(side / (origin.crop_pct or 1))
