"""What a score is a mean of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmseg.evaluation import IoUMetric

from stellar_plugin.mmseg.card.built import only
from stellar_plugin.mmseg.card.described import described
from stellar_plugin.mmseg.metric import BatchJaccard, CountedIoUMetric
from stellar_plugin.protocols import SEGMENTATION, SEGMENTATION_PAPER


def averaging_of(metrics: Sequence[Any]) -> dict[str, Any]:
    """What the metrics average, and the batch where one depends on it."""
    texts = [_metric(metric) for metric in metrics]
    sizes = [m.batch_size for m in metrics if type(m) is BatchJaccard]
    if len(texts) > 1:
        names = [m.prefix or type(m).__name__ for m in metrics]
        texts = [f"{n}: {t}" for n, t in zip(names, texts, strict=True)]
    return {
        "averaging": "; ".join(texts),
        "evaluation_batch": only(sizes) if sizes else None,
    }


def _metric(metric: Any) -> str:
    mean = type(metric) in (IoUMetric, CountedIoUMetric) and "mIoU" in metric.metrics
    if mean and (metric.ignore_index, metric.nan_to_num) == (255, None):
        return SEGMENTATION.averaging
    if type(metric) is BatchJaccard and metric.ignore_index == 255:
        return SEGMENTATION_PAPER.averaging
    return described(metric)
