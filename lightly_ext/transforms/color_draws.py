"""What STELLAR's colour augmentation does to each image of a batch."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class ColorDraws(NamedTuple):
    """What is done to each of N images, drawn on the CPU.

    Attributes:
        jitter:
            Boolean tensor with shape (N,), images whose colours are jittered.
        strengths:
            Tensor with shape (4, N): factors of brightness, contrast and saturation
            (1 changes nothing), shift of the hue (0 changes nothing).
        order:
            Order of the four jitter operations, the same for all N images.
        gray:
            Boolean tensor with shape (N,), images that become gray.
        blur:
            Boolean tensor with shape (N,), images that are blurred.
        sigmas:
            Tensor with shape (N,), width of the blur in pixels.

    """

    jitter: Tensor
    strengths: Tensor
    order: list[int]
    gray: Tensor
    blur: Tensor
    sigmas: Tensor

    def chunk(self, part: slice) -> ColorDraws:
        """Returns the draws of a part of the images."""
        return ColorDraws(
            jitter=self.jitter[part],
            strengths=self.strengths[:, part],
            order=self.order,
            gray=self.gray[part],
            blur=self.blur[part],
            sigmas=self.sigmas[part],
        )


def jitter_ranges(
    strength: float, amounts: dict[str, float]
) -> list[tuple[float, float]]:
    """Ranges of the three factors and the hue shift, in the order of the amounts.

    Raises:
        ValueError: If an amount is negative or not finite, or the hue would turn by
            more than half its circle.

    """
    for name, amount in {"cj_strength": strength, **amounts}.items():
        if not 0.0 <= amount < math.inf:
            raise ValueError(f"{name} must be a number >= 0, got {amount}.")
    *factors, hue = (strength * amount for amount in amounts.values())
    if hue > 0.5:
        raise ValueError(
            f"cj_strength * cj_hue must be at most 0.5, half the hue circle, got {hue}."
        )
    return [(max(0.0, 1.0 - amount), 1.0 + amount) for amount in factors] + [
        (-hue, hue)
    ]
