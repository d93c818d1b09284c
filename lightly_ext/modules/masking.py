from __future__ import annotations

import math

import torch
from torch import Tensor


def random_focal_mask(
    batch_size: int,
    grid_size: tuple[int, int],
    mask_ratio: float = 0.8,
    focal_prob: float = 0.5,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
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
            Device of the result and of the draws.
        generator:
            Source of randomness on `device`.

    Returns:
        Indices of kept patches, row-major over the grid, int64 with shape
        (batch_size, num_kept), num_kept = num_patches * (1 - mask_ratio), rounded down.

    Raises:
        ValueError: If a ratio is out of range or no patch would be kept.
    """
    height, width = grid_size
    # The small term undoes rounding: 100 * (1 - 0.9) is 9.999...
    num_keep = int(height * width * (1 - mask_ratio) + 1e-9)
    if not 0 <= mask_ratio < 1 or num_keep < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps none of the {height} x {width} patches; "
            "use a smaller ratio or a finer grid."
        )
    if not 0 <= focal_prob <= 1:
        raise ValueError(f"focal_prob must be in [0, 1], got {focal_prob}.")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    noise = uniform(batch_size, height * width)
    centre = torch.stack(
        [(uniform(batch_size) * side).floor() for side in grid_size], dim=1
    )
    sigma = 0.1 + 0.4 * uniform(batch_size)
    focal = (uniform(batch_size) < focal_prob).float()
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
