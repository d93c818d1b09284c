"""Retrieval by loops over images, their vectors, patches and px, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightly_ext.evaluate.clusters import cluster_patches
from lightly_ext.evaluate.frozen_model import FrozenModel

Array = np.ndarray
Box = tuple[int, int, int, int]


class Form(NamedTuple):
    """What stands for an image: vectors, and a map of each or None."""

    vectors: Array
    maps: Array | None


class Seen(NamedTuple):
    """An image: its forms, class, boxes in its file, and where its crop lies there."""

    forms: Mapping[str, Form]
    label: Any
    boxes: Sequence[Box]
    corner: tuple[int, int] = (0, 0)


def unit(vectors: Any) -> Array:
    values = np.array(vectors, dtype=np.float64)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(lengths > 0, lengths, 1)


def forms(model: FrozenModel, image: Tensor, clusters: int) -> dict[str, Form]:
    """The forms of an uint8 image that is cut already."""
    result = model(image[None])
    sparse, dense, maps = (
        t[0].double().numpy()
        for t in (result.sparse, result.dense, result.localization)
    )
    labels = cluster_patches(result.dense, clusters, 0)[0].numpy()
    means = [
        dense[labels == c].mean(axis=0) if c in labels else 0 * dense[0]
        for c in range(clusters)
    ]
    red, green, blue = (image.numpy().astype(int) // 32)[:3]
    counts = np.bincount((red * 64 + green * 8 + blue).ravel(), minlength=512)
    small = image.numpy().astype(float)
    small = small.reshape(3, 16, image.shape[1] // 16, 16, -1).mean(axis=(2, 4))
    assert result.cls is not None
    whole = {
        "cls": result.cls[0].double().numpy(),
        "mean_token": sparse.mean(axis=0),
        "mean_patch": dense.mean(axis=0),
        "pixels": (small - small.mean()).ravel(),
        "colours": counts**0.5,
    }
    onto = np.eye(len(dense))
    halves = torch.from_numpy(unit(dense)).float().half().double().numpy()
    return {
        "tokens": Form(unit(sparse), maps.T),
        "clusters": Form(unit(means), np.eye(clusters)[:, labels]),
        "patches": Form(halves, onto),
        **{name: Form(unit(v[None]), None) for name, v in whole.items()},
    }


def brute_force(
    images: Sequence[Seen], grid: int, crop: int, neighbours: int, order: Sequence[int]
) -> dict[str, float]:
    """All scores but the numbers of images; of one without boxes no location."""
    scores: dict[str, float] = {}
    for name in images[0].forms:
        scores |= {
            f"{name}_{measure}": value
            for measure, value in _of_form(
                images, name, grid, crop, neighbours, order
            ).items()
        }
    return scores


def _of_form(
    images: Sequence[Seen],
    name: str,
    grid: int,
    crop: int,
    neighbours: int,
    order: Sequence[int],
) -> dict[str, float]:
    precisions: dict[Any, list[float]] = {}
    shares, oracles, right = [], [], []
    for q, query in enumerate(images):
        others = [i for i in order if i != q]
        relevant = [i for i in others if images[i].label == query.label]
        if not relevant:
            continue
        form = query.forms[name]
        masses = np.ones(1) if form.maps is None else form.maps.mean(axis=1)
        ranks = _ranks(images, name, form.vectors, masses, others)
        precision = _precision([images[i].label == query.label for i in ranks])
        precisions.setdefault(query.label, []).append(precision)
        inside = _inside(query, grid, crop)
        if inside is None:
            continue
        masses = np.ones(1) if form.maps is None else form.maps @ inside
        boxed = [i for i in others if images[i].boxes]
        hits, best = [], []
        for i in _ranks(images, name, form.vectors, masses, boxed)[:neighbours]:
            answer = images[i].forms[name]
            region = _region(name, form.vectors, masses, answer, grid, crop)
            hits.append(_hit(images[i], region))
            if images[i].label == query.label:
                right.append(hits[-1])
            if name in ("tokens", "clusters"):
                assert answer.maps is not None
                regions = [_map_box(m, grid, crop) for m in answer.maps]
                best.append(any(_hit(images[i], r) for r in regions))
        shares.append(np.mean(hits))
        oracles += [np.mean(best)] if best else []
    found = {
        "map": np.mean([np.mean(of_class) for of_class in precisions.values()]),
        "query_map": np.mean([p for of_class in precisions.values() for p in of_class]),
    }
    if shares:
        found |= {"location": np.mean(shares), "location_of_class": np.mean(right)}
    if oracles:
        found["location_oracle"] = np.mean(oracles)
    return {key: float(value) for key, value in found.items()}


def _ranks(
    images: Sequence[Seen],
    name: str,
    vectors: Array,
    masses: Array,
    others: Sequence[int],
) -> list[int]:
    def score(i: int) -> float:
        tokens = [t for t in images[i].forms[name].vectors if t.any()]
        return sum(
            mass * max((float(s @ t) for t in tokens), default=-1)
            for s, mass in zip(vectors, masses, strict=True)
        )

    return sorted(others, key=lambda i: -score(i))  # stable


def _precision(relevant: Sequence[bool]) -> float:
    """Mean of the precision at each relevant rank."""
    found = 0
    values = []
    for rank, is_relevant in enumerate(relevant, start=1):
        found += is_relevant
        if is_relevant:
            values.append(found / rank)
    return float(np.mean(values))


def _inside(image: Seen, grid: int, crop: int) -> Array | None:
    """How the px of the largest box are spread over patches; None if it has none."""
    best = None
    for x0, y0, x1, y1 in image.boxes:
        counts = np.zeros((grid, grid))
        for y in range(y0, y1):
            for x in range(x0, x1):
                row, column = y - image.corner[1], x - image.corner[0]
                if 0 <= row < crop and 0 <= column < crop:
                    counts[row * grid // crop, column * grid // crop] += 1
        if best is None or counts.sum() > best.sum():
            best = counts
    return None if best is None or not best.sum() else best.ravel() / best.sum()


def _region(
    name: str, vectors: Array, masses: Array, answer: Form, grid: int, crop: int
) -> Box:
    if answer.maps is None:
        return 0, 0, crop, crop
    if name == "patches":
        mean = masses @ vectors
        return _map_box(np.maximum(answer.vectors @ mean, 0), grid, crop)
    heaviest = vectors[masses.argmax()]
    cosines = [heaviest @ t if t.any() else -1 for t in answer.vectors]
    return _map_box(answer.maps[int(np.argmax(cosines))], grid, crop)


def _map_box(values: Array, grid: int, crop: int) -> Box:
    side = crop // grid
    strong = [
        (i // grid, i % grid)
        for i, v in enumerate(values)
        if v > 0 and v >= max(values) / 2
    ]
    if not strong:
        return 0, 0, 0, 0
    rows, columns = zip(*strong, strict=True)
    return (
        min(columns) * side,
        min(rows) * side,
        (max(columns) + 1) * side,
        (max(rows) + 1) * side,
    )


def _hit(image: Seen, region: Box) -> bool:
    """Whether px of a region and of a box are the same by half."""

    def px(box: Box, x: int, y: int) -> set[tuple[int, int]]:
        x0, y0, x1, y1 = box
        return {(i + x, j + y) for i in range(x0, x1) for j in range(y0, y1)}

    ours = px(region, *image.corner)
    for box in image.boxes:
        theirs = px(box, 0, 0)
        if len(ours & theirs) >= 0.5 * len(ours | theirs):
            return True
    return False
