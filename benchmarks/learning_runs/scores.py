"""What frozen features are worth: kNN, linear probe, rank, and boxes from maps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from benchmarks.learning_runs.photos import Photos, PhotoSets
from benchmarks.learning_runs.views import normalized
from lightly_ext.metrics import effective_rank, knn_accuracy
from stellar_plugin import Factorization, StellarEncoder

BATCH = {"cpu": 25, "cuda": 1000}
# Logistic regression as in `lightly_ext.demo.probes`: L2 penalty of C = 1.
LINEAR_ITERATIONS = 100
# Raw pixels of larger images are averaged down to this side.
RAW_SIZE = 32
# Training photos on which the token of the object is chosen.
CHOICE_PHOTOS = 1000
CORLOC_IOU = 0.5

Scores = dict[str, float]


@torch.no_grad()
def encoder_scores(encoder: StellarEncoder, sets: PhotoSets, maps: bool) -> Scores:
    """Scores of every feature of an encoder, and of its maps.

    Args:
        encoder:
            The encoder, put into evaluation mode for the while.
        sets:
            Photos on the encoder's device.
        maps:
            Whether to score the maps, which takes longest, if there are queries.

    Returns:
        `knn_X`, `linear_X` (shares) and `rank_X` for the features "cls", "dense" and,
        with queries, "sparse", "lowrank" and "tokens" (one behind the other);
        `corloc` of the token chosen on training photos, `corloc_best` of the best token
        of each photo.
    """
    was_training = encoder.training
    encoder.eval()
    (train, train_maps), (test, test_maps) = (_encoded(encoder, p) for p in sets)
    scores = feature_scores(train, test, sets)
    if maps and encoder.has_localization:
        scores |= _map_scores(encoder, sets, train_maps, test_maps)
    encoder.train(was_training)
    return scores


def raw_scores(sets: PhotoSets) -> Scores:
    """The same of pixels; and `corloc` of a box in the centre, of mean size."""
    side = min(RAW_SIZE, sets.train.images.shape[-1])
    train, test = (
        {"dense": F.adaptive_avg_pool2d(p.images.float() / 255, side).flatten(1)}
        for p in sets
    )
    size = sets.train.images.shape[-1]
    box = centre_box(sets.train.boxes, size)
    boxes = box.expand(len(sets.test.boxes), 1, 4)
    return {
        **feature_scores(train, test, sets),
        "corloc": float(corloc(boxes, sets.test.boxes)[0]),
    }


def feature_scores(
    train: dict[str, Tensor], test: dict[str, Tensor], sets: PhotoSets
) -> Scores:
    """kNN, linear probe and rank of features (N, dim) by name."""
    labels = sets.train.labels, sets.test.labels
    scores: Scores = {}
    for name, features in train.items():
        scores[f"knn_{name}"] = knn_accuracy(
            features, labels[0], test[name], labels[1], min(20, len(features))
        )
        scores[f"linear_{name}"] = linear_accuracy(
            features, labels[0], test[name], labels[1]
        )
        scores[f"rank_{name}"] = float(effective_rank(features))
    return scores


def linear_accuracy(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Accuracy of logistic regression on standardised features, by L-BFGS.

    Args:
        features:
            Tensor with shape (num_train, dim).
        labels:
            Class indices with shape (num_train,).
        test_features:
            Tensor with shape (num_test, dim).
        test_labels:
            Class indices with shape (num_test,).
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    x, test_x = (
        (f - mean) / std.clamp(min=1e-6) for f in (features.float(), test_features)
    )
    weight = x.new_zeros(int(labels.max()) + 1, x.shape[1]).requires_grad_()
    bias = x.new_zeros(len(weight)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=LINEAR_ITERATIONS,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * len(x))
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        predictions = F.linear(test_x, weight, bias).argmax(dim=1)
    return float((predictions == test_labels).float().mean())


def corloc(boxes: Tensor, truth: Tensor) -> Tensor:
    """Share of photos whose box overlaps with the true one by an IoU of 0.5 or more.

    Args:
        boxes:
            Candidates with shape (N, r, 4): left, top, right, bottom edge.
        truth:
            True boxes with shape (N, 4); photos with NaN are left out.

    Returns:
        Share for each candidate, with shape (r,), then that of the best candidate of
        each photo; NaN without boxes.
    """
    known = ~truth.isnan().any(dim=1)
    boxes, truth = boxes[known], truth[known, None]
    low = torch.maximum(boxes[..., :2], truth[..., :2])
    high = torch.minimum(boxes[..., 2:], truth[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    sizes = [(b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, truth)]
    hits = shared / (sizes[0] + sizes[1] - shared).clamp(min=1e-6) >= CORLOC_IOU
    hits = torch.cat([hits, hits.any(dim=1, keepdim=True)], dim=1)
    return hits.float().mean(dim=0)


def map_boxes(maps: Tensor, grid_size: tuple[int, int], patch: int) -> Tensor:
    """Box around the largest connected part of each token's map above its mean.

    Args:
        maps:
            Localization with shape (N, n, r), on the CPU.
        grid_size:
            Height and width of the patch grid.
        patch:
            Side of a patch in px.

    Returns:
        Left, top, right and bottom edge in px, with shape (N, r, 4).
    """
    grids = maps.mT.unflatten(2, grid_size).float()  # (N, r, h, w)
    above = (grids >= grids.mean(dim=(2, 3), keepdim=True)).flatten(0, 1).numpy()
    boxes = np.array([_largest_part(mask) for mask in above]) * patch
    return torch.from_numpy(boxes).float().unflatten(0, grids.shape[:2])


def centre_box(boxes: Tensor, size: int) -> Tensor:
    """Box in the centre with the mean sides of some boxes (N, 4)."""
    known = boxes[~boxes.isnan().any(dim=1)]
    half = (known[:, 2:] - known[:, :2]).mean(dim=0) / 2
    return torch.cat([size / 2 - half, size / 2 + half])


def _largest_part(mask: np.ndarray) -> tuple[int, int, int, int]:
    numbered, _ = ndimage.label(mask)
    largest = np.bincount(numbered[mask]).argmax() - 1
    rows, columns = ndimage.find_objects(numbered)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


def _encoded(
    encoder: StellarEncoder, photos: Photos
) -> tuple[dict[str, Tensor], Tensor]:
    """Features (N, dim) by name, and maps (N, n, r) on the CPU."""
    results = [
        (_pooled(result, encoder), _maps(result, encoder))
        for result in _factorizations(encoder, photos.images)
    ]
    features = {
        name: torch.cat([pooled[name] for pooled, _ in results])
        for name in results[0][0]
    }
    return features, torch.cat([maps for _, maps in results])


def _map_scores(encoder: StellarEncoder, sets: PhotoSets, *maps: Tensor) -> Scores:
    """Chooses a token on training photos, and scores it on the others."""
    step = max(1, len(maps[0]) // CHOICE_PHOTOS)
    chosen, test = (
        corloc(
            map_boxes(of_set[::every], encoder.grid_size, encoder.patch_size),
            photos.boxes[::every].cpu(),
        )
        for of_set, photos, every in zip(maps, sets, (step, 1), strict=True)
    )
    token = int(chosen[:-1].argmax())
    return {"corloc": float(test[token]), "corloc_best": float(test[-1])}


def _pooled(result: Factorization, encoder: StellarEncoder) -> dict[str, Tensor]:
    assert result.cls is not None
    features = {"cls": result.cls, "dense": result.dense.mean(dim=1)}
    if encoder.num_queries:
        features["sparse"] = result.sparse.mean(dim=1)
        features["tokens"] = result.sparse.flatten(1)
    if encoder.has_localization:
        features["lowrank"] = result.lowrank.mean(dim=1)
    return features


def _maps(result: Factorization, encoder: StellarEncoder) -> Tensor:
    """Localization (N, n, r), without tokens where there is none."""
    if encoder.has_localization:
        return result.localization.cpu()
    return result.dense[:, :, :0].cpu()


def _factorizations(encoder: StellarEncoder, images: Tensor) -> Iterator[Factorization]:
    for batch in images.split(BATCH[images.device.type]):
        yield encoder(normalized(batch.float() / 255))
