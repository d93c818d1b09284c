"""Names and units of scores in tables."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """How a score is shown.

    Attributes:
        title: Name with unit.
        scale: What the stored number is multiplied by.
        digits: Digits behind the point.
        higher_is_better: What a gain is.
    """

    title: str
    scale: float
    digits: int
    higher_is_better: bool


SCORES = {
    "accuracy": Score("accuracy, %", 100, 2, True),
    "top5": Score("top 5, %", 100, 2, True),
    "mIoU": Score("mIoU, %", 100, 2, True),
    "aAcc": Score("pixel accuracy, %", 100, 2, True),
    "mAcc": Score("mean class accuracy, %", 100, 2, True),
    "fid": Score("FID", 1, 2, False),
    "lpips": Score("LPIPS", 1, 4, False),
    "psnr_db": Score("PSNR, dB", 1, 2, True),
    "ssim": Score("SSIM", 1, 4, True),
    "foreground_iou": Score("foreground IoU, %", 100, 2, True),
    "token_overlap": Score("token overlap, %", 100, 2, True),
    "zero_shot_top1": Score("zero-shot top 1, %", 100, 2, True),
    "zero_shot_top5": Score("zero-shot top 5, %", 100, 2, True),
    "t2i_recall_1": Score("text to image R@1, %", 100, 2, True),
    "i2t_recall_1": Score("image to text R@1, %", 100, 2, True),
    "winoground_text": Score("Winoground text, %", 100, 2, True),
    "winoground_image": Score("Winoground image, %", 100, 2, True),
    "mmvp": Score("MMVP, %", 100, 2, True),
}


def shown_score(score: str, value: float) -> str:
    """A score as text, in the unit of its title."""
    known = SCORES.get(score)
    if known is None:
        return f"{value:.4g}"
    return f"{known.scale * value:.{known.digits}f}"


def score_title(score: str) -> str:
    """Name of a score with its unit."""
    return SCORES[score].title if score in SCORES else score.replace("_", " ")
