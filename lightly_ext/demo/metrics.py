"""The numbers of the demo: for a model, and for raw pixels without any model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from lightly_ext.demo.boards import Boards, BoardSets, FloatArray
from lightly_ext.demo.features import (
    model_features,
    pooled_patches,
    raw_patches,
    reconstructions,
    to_unit_range,
)
from lightly_ext.demo.probes import (
    linear_accuracy,
    mean_iou,
    multilabel_map,
    patch_predictions,
)
from lightly_ext.evaluate.probing.localization import parts_iou
from lightly_ext.metrics import knn_accuracy, prototype_usage
from lightly_ext.modules.heads import STELLARProjectionHead
from stellar_plugin.model import Stellar

# Boards whose patches the linear probe on patches is trained on, 25 patches each.
NUM_PATCH_PROBE_BOARDS = 1000

Scores = dict[str, float]


def model_scores(
    model: Stellar, head: STELLARProjectionHead, sets: BoardSets
) -> Scores:
    """Scores a model on all tasks of the demo.

    Args:
        model:
            The model, in evaluation mode.
        head:
            Its projection head and prototypes of sparse tokens.
        sets:
            The boards.

    Returns:
        Values by the keys of `table.METRICS`: accuracies, average precision and
        intersection over union in 0 to 1, PSNR in dB.
    """
    features = {
        name: model_features(model, boards.images)
        for name, boards in vars(sets).items()
    }
    train, test = features["train"], features["test"]
    scores: Scores = {}
    for kind in ("sparse", "dense"):
        pooled = {
            name: getattr(of_set, kind).mean(dim=1).numpy()
            for name, of_set in features.items()
        }
        recognition = recognition_scores(pooled, sets)
        scores |= {f"{name}_{kind}": value for name, value in recognition.items()}
    for kind in ("lowrank", "dense"):
        patches = getattr(train, kind).numpy(), getattr(test, kind).numpy()
        scores[f"patch_miou_{kind}"] = patch_miou(*patches, sets)
    hits, misses = patches_won(train.localization, _is_digit(sets.train))
    scores["foreground_iou"] = parts_iou(
        *patches_won(test.localization, _is_digit(sets.test)), chosen=hits > misses
    )
    decoded = reconstructions(model, sets.test.images)
    scores["psnr"] = mean_psnr(decoded, to_unit_range(sets.test.images))
    with torch.no_grad():
        usage = prototype_usage(head(test.sparse), head.prototypes.weight)
    scores["prototype_usage"] = float(usage.entropy)
    return scores


def model_free_scores(sets: BoardSets) -> Scores:
    """Scores raw pixels on the same tasks, by the same probes.

    Recognition uses the mean and standard deviation of a board's patches, patch mIoU
    the pixels of each patch, PSNR the mean of the training boards, foreground IoU the
    answer "digit" everywhere.
    """
    pooled = {
        name: pooled_patches(boards.images) for name, boards in vars(sets).items()
    }
    recognition = recognition_scores(pooled, sets)
    scores = {f"{name}_sparse": value for name, value in recognition.items()}
    patches = raw_patches(sets.train.images), raw_patches(sets.test.images)
    scores["patch_miou_lowrank"] = patch_miou(*patches, sets)
    scores["foreground_iou"] = float(_is_digit(sets.test).float().mean())
    mean_image = to_unit_range(sets.train.images).mean(dim=0)
    images = to_unit_range(sets.test.images)
    scores["psnr"] = mean_psnr(mean_image.expand_as(images), images)
    return scores


def recognition_scores(pooled: Mapping[str, FloatArray], sets: BoardSets) -> Scores:
    """Accuracy of kNN and probe on boards with one class, mAP on all.

    Args:
        pooled:
            One feature per board, (num_boards, dim), by the names of the four sets.
        sets:
            The boards.
    """
    train, test = pooled["train_single"], pooled["test_single"]
    train_digits = sets.train_single.classes.argmax(axis=1)
    test_digits = sets.test_single.classes.argmax(axis=1)
    return {
        "knn": knn_accuracy(
            torch.from_numpy(train),
            torch.from_numpy(train_digits),
            torch.from_numpy(test),
            torch.from_numpy(test_digits),
        ),
        "linear": linear_accuracy(train, train_digits, test, test_digits),
        "map": multilabel_map(
            pooled["train"], sets.train.classes, pooled["test"], sets.test.classes
        ),
    }


def patch_miou(train_patches: NDArray, test_patches: NDArray, sets: BoardSets) -> float:
    """Mean IoU of a linear probe on patches over background and ten digits.

    The label of a patch is the digit in its cell, or background in an empty cell.

    Args:
        train_patches:
            Features of the training boards' patches, (num_train, 25, dim).
        test_patches:
            Features of the test boards' patches, (num_test, 25, dim).
        sets:
            The boards.

    Returns:
        Mean intersection over union in 0 to 1.
    """
    chosen = slice(NUM_PATCH_PROBE_BOARDS)
    predictions = patch_predictions(
        train_patches[chosen], sets.train[chosen].cell_labels, test_patches
    )
    return mean_iou(predictions, sets.test.cell_labels)


def patches_won(localization: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the patches of which a query is the strongest.

    Args:
        localization:
            Localization matrices with shape (num_images, num_patches, num_queries).
        foreground:
            Whether a patch is foreground, bool with shape (num_images, num_patches).

    Returns:
        Foreground patches and background patches of each query, int64 with shape
        (num_queries,).
    """
    winners, num_queries = localization.argmax(dim=-1), localization.shape[-1]
    hits, misses = (
        torch.bincount(winners[chosen], minlength=num_queries)
        for chosen in (foreground, ~foreground)
    )
    return hits, misses


def mean_psnr(images: Tensor, targets: Tensor) -> float:
    """Peak signal-to-noise ratio of each image in dB, averaged over images.

    Args:
        images:
            Intensities in 0 to 1 with shape (num_images, 3, height, width).
        targets:
            The same for the true images.

    Returns:
        Decibels.
    """
    ratio = peak_signal_noise_ratio(
        images, targets, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
    )
    return float(ratio)


def _is_digit(boards: Boards) -> Tensor:
    return torch.from_numpy(boards.cell_labels > 0)
