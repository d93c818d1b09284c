"""Linear probes of frozen features, fitted to convergence by scikit-learn.

All probes standardise features by the training set's mean and standard deviation and
fit logistic regression with an L2 penalty (C = 1) by L-BFGS. They suit small sets;
nothing is tuned.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, jaccard_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

MAX_ITERATIONS = 300

Features = NDArray[np.float32]


def linear_accuracy(
    train_features: Features,
    train_labels: NDArray[np.int64],
    test_features: Features,
    test_labels: NDArray[np.int64],
) -> float:
    """Accuracy of logistic regression.

    Args:
        train_features:
            Array with shape (num_train, dim).
        train_labels:
            Class indices with shape (num_train,).
        test_features:
            Array with shape (num_test, dim).
        test_labels:
            Class indices with shape (num_test,).

    Returns:
        Fraction of test samples that are classified correctly, in 0 to 1.
    """
    probe = _fit(train_features, train_labels)
    return float(probe.score(test_features, test_labels))


def multilabel_map(
    train_features: Features,
    train_classes: NDArray[np.bool_],
    test_features: Features,
    test_classes: NDArray[np.bool_],
) -> float:
    """Mean over classes of the average precision of one-vs-rest logistic regression.

    Args:
        train_features:
            Array with shape (num_train, dim).
        train_classes:
            Array with shape (num_train, num_classes), True where a class is present.
        test_features:
            Array with shape (num_test, dim).
        test_classes:
            Array with shape (num_test, num_classes).

    Returns:
        Mean average precision in 0 to 1.

    Raises:
        ValueError: If a class is on all or on none of the images of a set.
    """
    for name, classes in (("train", train_classes), ("test", test_classes)):
        constant = np.flatnonzero(classes.all(axis=0) | ~classes.any(axis=0))
        if len(constant):
            raise ValueError(
                f"{name}_classes is constant for the classes {constant.tolist()}; "
                "average precision needs images with and without each class."
            )
    scores = [
        _fit(train_features, present).decision_function(test_features)
        for present in train_classes.T
    ]
    return float(average_precision_score(test_classes, np.stack(scores, axis=1)))


def patch_predictions(
    train_features: Features,
    train_labels: NDArray[np.int64],
    test_features: Features,
) -> NDArray[np.int64]:
    """Classes that logistic regression on patches gives to test patches.

    Args:
        train_features:
            Array with shape (num_train, num_patches, dim).
        train_labels:
            Class indices with shape (num_train, num_patches).
        test_features:
            Array with shape (num_test, num_patches, dim).

    Returns:
        Array with shape (num_test, num_patches).
    """
    dim = train_features.shape[-1]
    probe = _fit(train_features.reshape(-1, dim), train_labels.ravel())
    predictions = probe.predict(test_features.reshape(-1, dim))
    return predictions.reshape(test_features.shape[:-1])


def mean_iou(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Intersection over union, averaged over the classes predicted or present.

    Args:
        predictions:
            Class indices of any shape.
        labels:
            Class indices of the same shape.

    Returns:
        Mean intersection over union in 0 to 1, counted over all entries at once.
    """
    return float(jaccard_score(labels.ravel(), predictions.ravel(), average="macro"))


def _fit(features: Features, labels: NDArray[np.generic]) -> Pipeline:
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=1.0, max_iter=MAX_ITERATIONS)
    )
    with warnings.catch_warnings():
        # The number of iterations is part of the protocol.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(features, labels)
