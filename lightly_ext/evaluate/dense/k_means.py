"""k-means over the patches of many images, the same in any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.reduction import reduce_sum

# Points whose distances are computed at once.
BLOCK = 2**14
# Points that the start is drawn from.
NUM_CANDIDATES = 2**14


class Clustering(NamedTuple):
    """What k-means found.

    Attributes:
        centres: Means of the clusters, float32 with shape (num_clusters, dim).
        inertia: Mean squared distance of a point to its centre.
        iterations: Number of Lloyd's iterations.
        converged: Whether the last iteration changed nothing.
    """

    centres: Tensor
    inertia: float
    iterations: int
    converged: bool


def k_means(
    devices: Devices,
    points: Tensor,
    num_clusters: int,
    seed: int,
    restarts: int,
    iterations: int,
) -> Clustering:
    """The best of several runs of Lloyd's iterations, each from a k-means++ start.

    Args:
        devices:
            The processes, each of which computes a share.
        points:
            Vectors of unit length or shorter, float16 on the CPU with shape
            (num_points, dim), the same in all processes.
        num_clusters:
            Number of clusters.
        seed:
            Decides on the starts.
        restarts:
            Number of runs.
        iterations:
            Most iterations of a run; it ends when one changes nothing.

    Returns:
        The clustering with the least inertia, the same in all processes.

    Raises:
        ValueError: If fewer points differ than there are clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    candidates = points[torch.randperm(len(points), generator=generator)]
    candidates = candidates[:NUM_CANDIDATES].double()
    blocks = points.split(BLOCK)[devices.rank :: devices.world_size]
    blocks = [block.to(devices.device) for block in blocks]
    found = []
    for _ in devices.progress(range(restarts), "k-means", restarts):
        start = spread_start(candidates, num_clusters, generator)
        found.append(lloyd(devices, blocks, start, iterations))
    best = min(found, key=lambda clustering: clustering.inertia)
    return best._replace(centres=best.centres.cpu())


def spread_start(
    points: Tensor, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """Draws points far from each other, as k-means++ does: by the squared distance.

    Args:
        points:
            Float64 tensor with shape (num_points, dim).
        num_clusters:
            Number of points to draw.
        generator:
            Decides on them.

    Returns:
        Float32 tensor with shape (num_clusters, dim).

    Raises:
        ValueError: If fewer points differ.
    """
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = [int(first)]
    squares = (points - points[chosen[0]]).square().sum(dim=1)
    for _ in range(num_clusters - 1):
        if not squares.any():
            raise ValueError(
                f"Of {len(points)} drawn patches {len(chosen)} differ, too few for "
                f"{num_clusters} clusters: more images, or a larger --crop, have more; "
                "--clusters may be as few as there are classes."
            )
        chosen.append(int(torch.multinomial(squares, 1, generator=generator)))
        nearer = (points - points[chosen[-1]]).square().sum(dim=1)
        squares = torch.minimum(squares, nearer)
    return points[chosen].float()


def lloyd(
    devices: Devices, blocks: Sequence[Tensor], start: Tensor, iterations: int
) -> Clustering:
    """Lloyd's iterations; a cluster that loses all its points stays where it is.

    Sums of float16 numbers up to 1 are exact in float64, for 2^29 points: they depend
    neither on the order nor on the number of processes.

    Args:
        devices:
            The processes.
        blocks:
            The points of this process, float16 on its device, each with shape
            (num_points, dim).
        start:
            First centres, float32 with shape (num_clusters, dim).
        iterations:
            Most iterations.
    """
    squares = sum((b.double().square().sum() for b in blocks), torch.zeros(()).double())
    squares = reduce_sum(devices, squares.to(devices.device))
    centres, done, converged = start.to(devices.device), 0, False
    while done < iterations and not converged:
        sums, counts = _sums(devices, blocks, centres)
        means = (sums / counts.clamp(min=1)[:, None]).float()
        moved = torch.where(counts[:, None] > 0, means, centres.cpu())
        moved = moved.to(devices.device)
        converged = moved.equal(centres)
        centres, done = moved, done + 1
    # Sum of |x|^2 - |mean|^2: what the points of a cluster are off their mean.
    inertia = squares - (sums.square().sum(dim=1) / counts.clamp(min=1)).sum()
    return Clustering(centres, float(inertia / counts.sum()), done, converged)


def centre_scores(points: Tensor, centres: Tensor) -> Tensor:
    """How near points are to centres: the largest is the nearest.

    Half the squared distance, with the other sign and without the length of the point;
    linear in the point, so that scores may be interpolated where points are.

    Args:
        points:
            Float32 tensor with shape (..., dim).
        centres:
            Float32 tensor with shape (num_clusters, dim).

    Returns:
        Float32 tensor with shape (..., num_clusters).
    """
    return points @ centres.mT - centres.square().sum(dim=1) / 2


def _sums(
    devices: Devices, blocks: Sequence[Tensor], centres: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the points of each cluster and their number, of all processes."""
    shape = centres.shape
    # One more column for the number of points.
    sums = torch.zeros(shape[0], shape[1] + 1, dtype=torch.float64)
    sums = sums.to(devices.device)
    for block in blocks:
        nearest = centre_scores(block.float(), centres).argmax(dim=1)
        ones = torch.ones_like(block[:, :1])
        sums.index_add_(0, nearest, torch.cat([block, ones], dim=1).double())
    sums = reduce_sum(devices, sums)
    return sums[:, :-1], sums[:, -1]
