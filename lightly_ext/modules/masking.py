from __future__ import annotations

import math

import torch
from torch import Tensor

from lightly_ext.randomness import Stream, seeded_uniform
from lightly_ext.transforms.color_functional import to_device


def num_kept_patches(grid_size: tuple[int, int], mask_ratio: float) -> int:
    """Number of patches of a grid that a mask keeps, see `random_focal_mask`."""
    height, width = grid_size
    # The small term undoes rounding: 100 * (1 - 0.9) is 9.999...
    return int(height * width * (1 - mask_ratio) + 1e-9)


def random_focal_mask(
    batch_size: int,
    grid_size: tuple[int, int],
    mask_ratio: float = 0.8,
    focal_prob: float = 0.5,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Draws the patches that masked views keep (section 3.2 of STELLAR [0]).

    Every patch gets uniform noise, the patches with the smallest noise are kept. With
    probability `focal_prob` a Gaussian bump around a random patch is subtracted first,
    so that the kept patches gather around one place.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905

    Args:
        batch_size:
            Number of masks, one per image and view.
        grid_size:
            Height and width of the patch grid.
        mask_ratio:
            Share of patches to hide, in [0, 1).
        focal_prob:
            Probability of the bump, in [0, 1].
        device:
            Device of the result and, without seeds, of the draws.
        generator:
            Source of randomness on `device`; without, torch's default generator.
        seeds:
            int64 tensor on the CPU with a seed for each of B images, batch_size / B
            masks one after the other belong to each. If given, the masks of an image
            depend on its seed alone, and nothing is drawn from a generator.

    Returns:
        Indices of kept patches, row-major over the grid, int64 with shape
        (batch_size, num_kept), num_kept = num_patches * (1 - mask_ratio), rounded down.

    Raises:
        ValueError: If a ratio is out of range or no patch would be kept.
    """
    height, width = grid_size
    num_keep = num_kept_patches(grid_size, mask_ratio)
    if not 0 <= mask_ratio < 1 or num_keep < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps none of the {height} x {width} patches; "
            "use a smaller ratio or a finer grid."
        )
    if not 0 <= focal_prob <= 1:
        raise ValueError(f"focal_prob must be in [0, 1], got {focal_prob}.")

    num_patches = height * width
    if seeds is None:
        noise = torch.rand(batch_size, num_patches, device=device, generator=generator)
        others = torch.rand(4, batch_size, device=device, generator=generator)
    else:
        shape = (batch_size // len(seeds), num_patches + 4)
        numbers = seeded_uniform(seeds, Stream.MASKS, *shape).flatten(0, 1)
        numbers = to_device(numbers, torch.device(device or "cpu"))
        noise, others = numbers[:, :num_patches], numbers[:, num_patches:].T
    centre = torch.stack(
        [(x * side).floor() for x, side in zip(others, grid_size, strict=False)], dim=1
    )
    sigma = 0.1 + 0.4 * others[2]
    focal = (others[3] < focal_prob).float()
    noise = noise - focal[:, None] * focal_bump(grid_size, centre, sigma)
    return noise.argsort(dim=1)[:, :num_keep]


def focal_bump(grid_size: tuple[int, int], centre: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian bump on the patch grid.

    Args:
        grid_size:
            Height and width of the patch grid.
        centre:
            Row and column of the centres, in patches, with shape (batch_size, 2).
        sigma:
            Standard deviation with shape (batch_size,), as a share of
            sqrt(height * width).

    Returns:
        Tensor with shape (batch_size, height * width), 1 at the centre.
    """
    height, width = grid_size
    rows = torch.arange(height, device=centre.device) - centre[:, :1]  # (B, h)
    columns = torch.arange(width, device=centre.device) - centre[:, 1:]  # (B, w)
    distance = rows[:, :, None] ** 2 + columns[:, None, :] ** 2
    scale = 2 * (sigma * math.sqrt(height * width)) ** 2
    return (-distance / scale[:, None, None]).exp().flatten(1)
