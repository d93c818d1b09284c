"""Names and units of scores in tables."""

from __future__ import annotations

import re
from typing import NamedTuple

from stellar_plugin.protocols import RETRIEVAL_FORMS


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


# What `retrieval` scores of each form of an image.
RETRIEVAL_MEASURES = {
    "map": "mAP",
    "query_map": "mAP over queries",
    "location": "location",
    "location_of_class": "location, right class",
    "location_oracle": "location, best part",
}
SCORES = {
    "accuracy": Score("accuracy, %", 100, 2, True),
    "top5": Score("top 5, %", 100, 2, True),
    "mIoU": Score("mIoU, %", 100, 2, True),
    "mIoU_many_to_one": Score("mIoU, many to one, %", 100, 2, True),
    "accuracy_many_to_one": Score("accuracy, many to one, %", 100, 2, True),
    "aAcc": Score("pixel accuracy, %", 100, 2, True),
    "mAcc": Score("mean class accuracy, %", 100, 2, True),
    "fid": Score("FID", 1, 2, False),
    "lpips": Score("LPIPS", 1, 4, False),
    "psnr_db": Score("PSNR, dB", 1, 2, True),
    "ssim": Score("SSIM", 1, 4, True),
    "foreground_iou": Score("foreground IoU, %", 100, 2, True),
    "foreground_iou_oracle": Score("foreground IoU, oracle, %", 100, 2, True),
    "token_overlap": Score("token overlap, %", 100, 2, True),
    "token_overlap_one_to_one": Score("token overlap, one to one, %", 100, 2, True),
    "cluster_overlap": Score("cluster overlap, %", 100, 2, True),
    "cluster_overlap_one_to_one": Score("cluster overlap, one to one, %", 100, 2, True),
    "mbo_i": Score("mBO of instances, %", 100, 2, True),
    "mbo_c": Score("mBO of classes, %", 100, 2, True),
    "fg_ari": Score("FG-ARI, %", 100, 2, True),
    "corloc": Score("CorLoc, %", 100, 2, True),
    "corloc_oracle": Score("CorLoc of any part, oracle, %", 100, 2, True),
    "zero_shot_top1": Score("zero-shot top 1, %", 100, 2, True),
    "zero_shot_top5": Score("zero-shot top 5, %", 100, 2, True),
    "t2i_recall_1": Score("text to image R@1, %", 100, 2, True),
    "t2i_recall_5": Score("text to image R@5, %", 100, 2, True),
    "i2t_recall_1": Score("image to text R@1, %", 100, 2, True),
    "i2t_recall_5": Score("image to text R@5, %", 100, 2, True),
    "winoground_text": Score("Winoground text, %", 100, 2, True),
    "winoground_image": Score("Winoground image, %", 100, 2, True),
    "winoground_group": Score("Winoground group, %", 100, 2, True),
    "mmvp": Score("MMVP, %", 100, 2, True),
    **{
        name: Score(f"{title}, %", 100, 2, True)
        for name, title in RETRIEVAL_MEASURES.items()
    },
}


# What the same scores are of, where a run has several: parts and other forms of an
# image, and what a model is compared with.
SUBJECTS = {
    "grid": "uniform grid",
    "centre": "centre box",
    "tokenizer": "tokenizer",
    "ncut": "normalised cut",
    **{form: form.replace("_", " ") for form in RETRIEVAL_FORMS},
}
# Those that know nothing of the model.
REFERENCES = ("grid", "centre", "tokenizer")
GRID_OF = re.compile(r"grid_(\d+)")


def split_score(score: str) -> tuple[str, str]:
    """What a score is of, "" where it does not say that, and which score it is.

    Args:
        score:
            Name as it is stored: "tokens_mbo_i" is "mbo_i" of "tokens".
    """
    for measure in SCORES:
        subject = score.removesuffix(f"_{measure}")
        if subject != score and (subject in SUBJECTS or GRID_OF.fullmatch(subject)):
            return subject, measure
    return "", score


def subject_title(subject: str) -> str:
    """What a score is of, in words."""
    grid = GRID_OF.fullmatch(subject)
    return f"uniform grid of {grid[1]}" if grid else SUBJECTS[subject]


def shown_score(score: str, value: float) -> str:
    """A score as text, in the unit of its title."""
    known = SCORES.get(split_score(score)[1])
    if known is None:
        return f"{value:.4g}"
    return f"{known.scale * value:.{known.digits}f}"


def score_title(score: str) -> str:
    """Name of a score with its unit."""
    subject, measure = split_score(score)
    if measure not in SCORES:
        return score.replace("_", " ")
    return (
        f"{subject_title(subject)}, {SCORES[measure].title}"
        if subject
        else SCORES[measure].title
    )
