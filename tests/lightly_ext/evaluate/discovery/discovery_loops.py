"""Scores of object discovery, by loops over px, pairs of px, parts and objects."""

from __future__ import annotations

import itertools

import numpy as np
from sklearn.metrics import adjusted_rand_score


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def mean_best_overlap(
    parts: list[np.ndarray], masks: list[np.ndarray], ignored: int = -1
) -> float:
    """Of each image with objects: mean over them of the best IoU with a part."""
    images = []
    for part, mask in zip(parts, masks, strict=True):
        valid = mask != ignored
        objects = [mask[valid] == k for k in np.unique(mask[valid]) if k > 0]
        of_image = [part[valid] == k for k in np.unique(part)]
        if objects:
            best = [max(_iou(o, p) for p in of_image) for o in objects]
            images.append(np.mean(best))
    return float(np.mean(images))


def rand_index_of_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index, pair by pair of px (few of them)."""
    both = of_a = of_b = num = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        same_a, same_b = a[i] == a[j], b[i] == b[j]
        both += same_a and same_b
        of_a += same_a
        of_b += same_b
        num += 1
    expected = of_a * of_b / num
    possible = (of_a + of_b) / 2
    return 1.0 if possible == expected else (both - expected) / (possible - expected)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Edges around the px of a mask."""
    rows, columns = np.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def overlaps_by_half(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes of whole px have an IoU of 0.5 or more, px by px."""
    inside = [
        {(x, y) for x in range(int(x0), int(x1)) for y in range(int(y0), int(y1))}
        for x0, y0, x1, y1 in (a, b)
    ]
    return 2 * len(inside[0] & inside[1]) >= len(inside[0] | inside[1])


def inner_area(parts: np.ndarray) -> np.ndarray:
    """The largest connected area of parts that lie at the border less than others."""
    height, width = parts.shape
    places = list(itertools.product(range(height), range(width)))

    def at_border(y: int, x: int) -> bool:
        return y in (0, height - 1) or x in (0, width - 1)

    share = sum(at_border(*place) for place in places) / len(places)
    inside = np.zeros_like(parts, dtype=bool)
    for part in np.unique(parts):
        of_part = [place for place in places if parts[place] == part]
        if sum(at_border(*place) for place in of_part) / len(of_part) < share - 1e-12:
            inside |= parts == part
    if not inside.any():
        return ~inside
    areas: list[list[tuple[int, int]]] = []
    left = {place for place in places if inside[place]}
    for first in places:  # row by row, so that of equal areas the first is taken
        if first not in left:
            continue
        area, todo = [], [first]
        left.discard(first)
        while todo:
            y, x = todo.pop()
            area.append((y, x))
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if place in left:
                    left.discard(place)
                    todo.append(place)
        areas.append(area)
    found = np.zeros_like(inside)
    found[tuple(np.array(max(areas, key=len)).T)] = True
    return found


def brute_force(
    parts: list[np.ndarray],
    objects: list[np.ndarray],
    masks: list[np.ndarray],
) -> dict[str, float]:
    """Scores of instances and of boxes around them; no object 0, ignored -1.

    Args:
        parts: Part of each px of each image.
        objects: Which px are the object that was found.
        masks: Instances.
    """
    indices, found, of_any = [], [], []
    for part, object_, mask in zip(parts, objects, masks, strict=True):
        if (mask > 0).any():
            indices.append(adjusted_rand_score(mask[mask > 0], part[mask > 0]))
            true = [box_of(mask == k) for k in np.unique(mask) if k > 0]
            boxes = [box_of(part == k) for k in np.unique(part)]
            found.append(any(overlaps_by_half(box_of(object_), t) for t in true))
            of_any.append(any(overlaps_by_half(b, t) for b in boxes for t in true))
    return {
        "mbo_i": mean_best_overlap(parts, masks),
        "fg_ari": float(np.mean(indices)),
        "corloc": float(np.mean(found)),
        "corloc_oracle": float(np.mean(of_any)),
    }
