"""Checks of the arguments that the transforms share."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_count(name: str, value: int, at_least: int) -> None:
    """Raises ValueError if the named value is not a large enough integer."""
    if not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value}.")


def check_probability(name: str, value: float) -> None:
    """Raises ValueError if the named value is not a probability."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a probability in [0, 1], got {value}.")


def check_scale(name: str, scale: Sequence[float]) -> None:
    """Raises ValueError if the named value is not a range of relative areas."""
    if len(scale) != 2 or not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise ValueError(
            f"{name} must be (min, max) area of the crop relative to the image with "
            f"0 < min <= max <= 1, got {tuple(scale)}."
        )


def check_kernel(kernel_size: int, sigmas: Sequence[float]) -> None:
    """Raises ValueError if a Gaussian blur with these arguments is impossible."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}.")
    if len(sigmas) != 2 or not 0.0 < sigmas[0] <= sigmas[1] < math.inf:
        raise ValueError(
            f"sigmas must be (min, max) with 0 < min <= max, got {tuple(sigmas)}."
        )


def check_normalization(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError if mean and std cannot normalise RGB images."""
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(
            f"mean and std need three values, one per channel, got {list(mean)} and "
            f"{list(std)}."
        )
    if min(std) <= 0.0:
        raise ValueError(f"std must be positive, got {list(std)}.")
