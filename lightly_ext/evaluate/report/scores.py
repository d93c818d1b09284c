"""Names and units of scores in tables."""

from __future__ import annotations

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
        f"{form}_{name}": Score(f"{form.replace('_', ' ')}: {title}, %", 100, 2, True)
        for form in RETRIEVAL_FORMS
        for name, title in RETRIEVAL_MEASURES.items()
    },
}


# The same scores of several kinds of parts, or of what a model is compared with.
PREFIXES = {
    "grid_": "uniform grid",
    "tokenizer_": "tokenizer",
    "tokens_": "tokens",
    "clusters_": "clusters",
    "ncut_": "normalised cut",
    "centre_": "centre box",
}


def shown_score(score: str, value: float) -> str:
    """A score as text, in the unit of its title."""
    known = _known(score)[1]
    if known is None:
        return f"{value:.4g}"
    return f"{known.scale * value:.{known.digits}f}"


def score_title(score: str) -> str:
    """Name of a score with its unit."""
    reference, known = _known(score)
    return score.replace("_", " ") if known is None else f"{reference}{known.title}"


def _known(score: str) -> tuple[str, Score | None]:
    """What it is a score of, if it says that, and how the score is shown."""
    for prefix, name in PREFIXES.items():
        if score.startswith(prefix) and score.removeprefix(prefix) in SCORES:
            return f"{name}, ", SCORES[score.removeprefix(prefix)]
    return "", SCORES.get(score)
