"""Segmentation on the patch grid: the paper's protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import add_prefix
from torch import Tensor


@MODELS.register_module()
class PatchGridSegmentor(EncoderDecoder):
    """Compares logits with labels on the patch grid, in the loss and in the metric [0].

    Nothing is upsampled: labels are resized to the grid of the logits by nearest
    neighbour (14 x 14 for 224 px and patches of 16 px). `EncoderDecoder` upsamples the
    logits to the labels instead, which is what everybody else means by mIoU. In
    predictions, both `pred_sem_seg` and `gt_sem_seg` have the size of the grid.
    Auxiliary heads are not trained.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (appendix A.2)
    """

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict:
        """Computes the losses of the head on the patch grid.

        Args:
            inputs:
                Normalised images with shape (batch_size, 3, height, width).
            data_samples:
                Their labels; replaced by labels on the grid.
        """
        logits = self._forward(inputs)
        resize_labels(data_samples, logits.shape[-2:])
        losses = self.decode_head.loss_by_feat(logits, data_samples)
        return add_prefix(losses, "decode")

    def predict(
        self, inputs: Tensor, data_samples: list[SegDataSample] | None = None
    ) -> list[SegDataSample]:
        """Predicts the class of every patch.

        Args:
            inputs:
                Normalised images with shape (batch_size, 3, height, width).
            data_samples:
                Their labels, which may be missing; replaced by labels on the grid.

        Raises:
            ValueError: If an image is flipped: nothing flips its map back, as the mean
                over views of test-time augmentation needs it.
        """
        if any(sample.get("flip") for sample in data_samples or ()):
            raise ValueError(
                "PatchGridSegmentor does not flip maps back, and the mean over views "
                "of TestTimeAug would be of maps that do not match: take RandomFlip "
                "out of the pipeline of the test."
            )
        logits = self._forward(inputs)
        if data_samples is None:
            data_samples = [SegDataSample() for _ in inputs]
        resize_labels(data_samples, logits.shape[-2:])
        if logits.shape[1] == 1:  # two classes by one logit
            classes = (logits.sigmoid() > self.decode_head.threshold).long()
        else:
            classes = logits.argmax(1, keepdim=True)
        for sample, *of_image in zip(data_samples, logits, classes, strict=True):
            sample.seg_logits, sample.pred_sem_seg = (
                PixelData(data=data) for data in of_image
            )
        return data_samples


def resize_labels(samples: Sequence[SegDataSample], size: Sequence[int]) -> None:
    """Resizes label maps in place, by nearest neighbour.

    Args:
        samples:
            Samples; those without labels are left as they are.
        size:
            Height and width, in cells.
    """
    for sample in samples:
        if "gt_sem_seg" in sample:
            labels = sample.gt_sem_seg.data  # (1, height, width)
            resized = F.interpolate(labels[None].float(), tuple(size), mode="nearest")
            sample.gt_sem_seg = PixelData(data=resized[0].to(labels.dtype))
