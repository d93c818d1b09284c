from __future__ import annotations

import numpy as np
import pytest

from lightly_ext.demo.probes import (
    linear_accuracy,
    mean_iou,
    multilabel_map,
    patch_predictions,
)


def _blobs(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around the corners of a triangle, far apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=num)
    corners = 10 * np.eye(3, dtype=np.float32)
    return corners[labels] + rng.normal(size=(num, 3)).astype(np.float32), labels


class TestLinearAccuracy:
    def test_linear_accuracy__separable(self) -> None:
        accuracy = linear_accuracy(*_blobs(90, 0), *_blobs(60, 1))
        assert accuracy == 1.0

    def test_linear_accuracy__wrong_labels(self) -> None:
        features, labels = _blobs(60, 1)
        accuracy = linear_accuracy(*_blobs(90, 0), features, (labels + 1) % 3)
        assert accuracy == 0.0

    def test_linear_accuracy__scale_of_features_is_irrelevant(self) -> None:
        rng = np.random.default_rng(0)
        train, test = rng.normal(size=(2, 80, 5)).astype(np.float32)
        labels = rng.integers(2, size=(2, 80))
        plain = linear_accuracy(train, labels[0], test, labels[1])
        scale = np.array([1, 100, 0.01, 1, 5], dtype=np.float32)
        scaled = linear_accuracy(
            train * scale + 3, labels[0], test * scale + 3, labels[1]
        )
        assert plain == scaled


class TestMultilabelMap:
    def test_multilabel_map__against_brute_force(self) -> None:
        # One feature per class that is exactly the score: the probe keeps its order, so
        # the average precision is that of the feature itself.
        rng = np.random.default_rng(0)
        train_classes = rng.random((200, 2)) < 0.5
        test_classes = rng.random((40, 2)) < 0.4
        results = []
        for k in range(2):
            train = train_classes[:, k] + rng.normal(scale=0.8, size=200)
            test = test_classes[:, k] + rng.normal(scale=0.8, size=40)
            value = multilabel_map(
                train[:, None].astype(np.float32),
                train_classes[:, [k]],
                test[:, None].astype(np.float32),
                test_classes[:, [k]],
            )
            ranked = test_classes[:, k][np.argsort(-test)]
            precision = ranked.cumsum() / np.arange(1, 41)
            assert value == pytest.approx(precision[ranked].mean())
            results.append(value)
        assert results[0] != results[1]

    def test_multilabel_map__perfect_scores(self) -> None:
        classes = np.random.default_rng(0).random((50, 4)) < 0.5
        features = classes.astype(np.float32)
        assert multilabel_map(features, classes, features, classes) == 1.0

    def test_multilabel_map__constant_class(self) -> None:
        classes = np.random.default_rng(0).random((20, 3)) < 0.5
        constant = classes.copy()
        constant[:, 1] = True
        features = classes.astype(np.float32)
        with pytest.raises(ValueError, match=r"test_classes is constant .* \[1\]"):
            multilabel_map(features, classes, features, constant)


class TestPatchPredictions:
    def test_patch_predictions__reads_each_patch_by_itself(self) -> None:
        features, labels = _blobs(120, 0)
        test_features, test_labels = _blobs(60, 1)
        predictions = patch_predictions(
            features.reshape(30, 4, 3),
            labels.reshape(30, 4),
            test_features.reshape(15, 4, 3),
        )
        np.testing.assert_array_equal(predictions, test_labels.reshape(15, 4))


class TestMeanIoU:
    @pytest.mark.parametrize("seed", range(5))
    def test_mean_iou__against_confusion_count(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        labels = rng.integers(4, size=(6, 25))
        predictions = rng.integers(1, 6, size=(6, 25))
        confusion = np.zeros((6, 6))
        for label, prediction in zip(labels.flat, predictions.flat, strict=True):
            confusion[label, prediction] += 1
        hits = np.diag(confusion)
        iou = hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)
        assert mean_iou(predictions, labels) == pytest.approx(iou.mean())

    def test_mean_iou__closed_form(self) -> None:
        labels = np.array([0, 0, 0, 1])
        predictions = np.array([0, 0, 1, 1])
        assert mean_iou(predictions, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)
