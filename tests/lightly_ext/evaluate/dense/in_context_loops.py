"""In-context segmentation by loops over patches and px, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
Labels = NDArray[np.int64]
Grid = tuple[int, int]


def brute_force(
    train: Sequence[tuple[Features, Labels]],
    test: Sequence[tuple[Features, Labels]],
    grid: Grid,
    num_classes: int,
    neighbours: int,
    temperature: float,
) -> dict[str, float]:
    """Scores of patch features (num_patches, dim) and labels of px; -1 is ignored."""
    bank = [
        (half(unit(patch)), shares)
        for features, labels in train
        for patch, shares in zip(
            features, distributions(labels, grid, num_classes), strict=True
        )
        if shares is not None
    ]
    table = np.zeros((num_classes, num_classes))
    for features, labels in test:
        maps = [predict(patch, bank, neighbours, temperature) for patch in features]
        for y, x in np.ndindex(labels.shape):
            if labels[y, x] >= 0:
                shares = bilinear(maps, grid, labels.shape, y, x)
                table[int(shares.argmax()), labels[y, x]] += 1
    ious = []
    for c in range(num_classes):
        union = table[c].sum() + table[:, c].sum() - table[c, c]
        ious += [table[c, c] / union] if union else []
    return {
        "mIoU": sum(ious) / len(ious),
        "aAcc": sum(table[c, c] for c in range(num_classes)) / table.sum(),
        "num_test": len(test),
        "num_patches": len(bank),
    }


def unit(vector: Features) -> Features:
    return vector / math.sqrt(sum(v * v for v in vector.tolist()))


def half(vector: Features) -> Features:
    """As it is kept."""
    return vector.astype(np.float16).astype(np.float64)


def distributions(
    labels: Labels, grid: Grid, num_classes: int
) -> list[Features | None]:
    """Shares of the classes in each patch, row by row; None where all is ignored."""
    height, width = (labels.shape[0] // grid[0], labels.shape[1] // grid[1])
    found: list[Features | None] = []
    for row, column in np.ndindex(grid):
        px = [
            int(labels[row * height + y, column * width + x])
            for y, x in np.ndindex(height, width)
        ]
        counts = np.array([px.count(c) for c in range(num_classes)], dtype=float)
        found.append(counts / counts.sum() if counts.any() else None)
    return found


def predict(
    patch: Features,
    bank: Sequence[tuple[Features, Features]],
    neighbours: int,
    temperature: float,
) -> Features:
    """Softmax-weighted mean of the distributions of the nearest."""
    query = unit(patch)
    similarities = [float(query @ key) for key, _ in bank]
    order = sorted(range(len(bank)), key=lambda i: (-similarities[i], i))[:neighbours]
    weights = [math.exp(similarities[i] / temperature) for i in order]
    total = sum(weights)
    return sum(w / total * bank[i][1] for w, i in zip(weights, order, strict=True))


def bilinear(
    maps: Sequence[Features], grid: Grid, size: Sequence[int], y: int, x: int
) -> Features:
    """The map at the centre of a px; beyond the centres of the outer patches flat."""
    ends = []
    for place, cells, px in ((y, grid[0], size[0]), (x, grid[1], size[1])):
        at = max(0.0, (place + 0.5) * cells / px - 0.5)
        low = int(at)
        ends.append(((low, 1 - (at - low)), (min(low + 1, cells - 1), at - low)))
    return sum(
        wy * wx * maps[row * grid[1] + column]
        for row, wy in ends[0]
        for column, wx in ends[1]
    )
