"""Mean IoU: mmsegmentation's with its number of classes, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

# What both metrics call the number of classes beside their scores.
NUM_CLASSES = "num_classes"


@METRICS.register_module()
class CountedIoUMetric(IoUMetric):
    """mmsegmentation's `IoUMetric`, which also says over how many classes mIoU is.

    A class that is in no label and no prediction has no IoU and is left out of the
    mean; `num_classes` is the number of the others. Where no pixel has a label there
    is none, and the scores are NaN.
    """

    def compute_metrics(self, results: list[tuple[Tensor, ...]]) -> dict[str, float]:
        """The scores in percent, and the number of classes.

        Args:
            results:
                Intersection, union, pixels in predictions and in labels of each image.
        """
        metrics = super().compute_metrics(results)
        if not self.format_only:
            unions = torch.stack([union for _, union, *_ in results])
            metrics[NUM_CLASSES] = int(unions.any(0).sum())
        return metrics


@METRICS.register_module()
class BatchJaccard(BaseMetric):
    """Macro Jaccard index of each batch, averaged over batches [0].

    In each batch of `batch_size` images the intersection and union of every class are
    counted; the Jaccard indices of the classes that are in the batch's labels or
    predictions are averaged. The score is the mean over batches, weighted by their
    numbers of images. Batches are cut from the images in the order of the data set,
    whatever the loader's batch size and the number of processes. One batch as large as
    the set gives the mIoU of mmsegmentation's `IoUMetric`; smaller ones do not.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (appendix A.2)

    Args:
        batch_size:
            Images of a batch.
        ignore_index:
            Label that is not counted.
        output_dir:
            Folder for predictions as PNG files, as `IoUMetric` writes them; None for
            none. `mim test --out` sets it, together with `keep_results`.
        keep_results:
            Changes nothing: predictions are written at once.
        kwargs:
            As of every mmengine metric: collect_device, prefix, collect_dir.

    Raises:
        ValueError: If `batch_size` is not positive.
    """

    default_prefix = "paper"

    def __init__(
        self,
        batch_size: int = 2048,
        ignore_index: int = 255,
        output_dir: str | None = None,
        keep_results: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._writer = None
        if output_dir is not None:
            names = {"output_dir": output_dir, "prefix": self.prefix}
            self._writer = IoUMetric(format_only=True, **names)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.ignore_index = ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[Mapping]) -> None:
        """Counts the cells of each image.

        Args:
            data_batch:
                Not used.
            data_samples:
                Predictions and labels of the same shape, by "pred_sem_seg" and
                "gt_sem_seg".
        """
        num_classes = len(self.dataset_meta["classes"])
        if self._writer is not None:
            self._writer.dataset_meta = self.dataset_meta
            self._writer.process(data_batch, data_samples)
        for sample in data_samples:
            prediction = sample["pred_sem_seg"]["data"].flatten()
            label = sample["gt_sem_seg"]["data"].flatten().to(prediction)
            counted = label != self.ignore_index
            self.results.append(count(prediction[counted], label[counted], num_classes))

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        """The score in percent, and the number of classes in any batch.

        Where no cell has a label the score is NaN.

        Args:
            results:
                What `count` returned for each image, in the order of the data set.
        """
        counts = torch.stack(results)
        batches = counts.split(self.batch_size)
        scores = torch.stack([batch_jaccard(batch.sum(0)) for batch in batches])
        sizes = torch.tensor([len(batch) for batch in batches]).to(scores)
        labelled = ~scores.isnan()
        mean = (scores * sizes)[labelled].sum() / sizes[labelled].sum()
        num_classes = int(counts[:, 1].any(0).sum())
        return {"mIoU": 100 * mean.item(), NUM_CLASSES: num_classes}


def count(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Cells of each class in the intersection and in the union.

    Args:
        prediction:
            Class indices with shape (num_cells,).
        label:
            Class indices with shape (num_cells,).
        num_classes:
            Number of classes.

    Returns:
        Counts, int64 with shape (2, num_classes), on the CPU.
    """

    def histogram(values: Tensor) -> Tensor:
        return torch.bincount(values, minlength=num_classes)

    intersection = histogram(label[prediction == label])
    union = histogram(prediction) + histogram(label) - intersection
    return torch.stack([intersection, union]).cpu()


def batch_jaccard(counts: Tensor) -> Tensor:
    """Mean Jaccard index over classes with a union; NaN where no cell has a label.

    Args:
        counts:
            Intersections and unions, int64 with shape (2, num_classes).
    """
    intersection, union = counts.double()
    present = union > 0
    return (intersection[present] / union[present]).mean()
