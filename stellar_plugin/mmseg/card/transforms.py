"""What a pipeline does to an image, in the words of the protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.transforms import LoadImageFromFile, RandomResize, TestTimeAug
from mmseg.datasets.transforms import (
    LoadAnnotations,
    PackSegInputs,
    PhotoMetricDistortion,
    RandomCrop,
    RandomFlip,
    Resize,
)
from torchvision.transforms import v2

from stellar_plugin.mmseg.card.described import described, is_like
from stellar_plugin.mmseg.datasets import flattened, inner_sets
from stellar_plugin.mmseg.segmentor import PatchGridSegmentor
from stellar_plugin.mmseg.views import TorchvisionTransform
from stellar_plugin.protocols import NOT_TOLD, SEGMENTATION, patch_grid


def steps_of(dataset: Any) -> list[Any]:
    """Transforms of a set, those of wrappers after those inside."""
    inner = inner_sets(dataset)
    steps = steps_of(inner[0]) if inner else []
    own = getattr(dataset, "pipeline", ())
    own = list(getattr(own, "transforms", own))
    skipped = getattr(dataset, "_skip_type_keys", None) or ()
    kinds = getattr(dataset, "pipeline_types", [""] * len(own))
    return steps + [
        s for s, kind in zip(own, kinds, strict=True) if kind not in skipped
    ]


def _quiet(step: Any) -> bool:
    """Whether a step only reads or packs, as it does everywhere."""
    return (
        type(step) is PackSegInputs
        or is_like(step, LoadImageFromFile)
        or is_like(step, LoadAnnotations, "reduce_zero_label")
    )


def _applied(step: Any, kind: type) -> Any:
    """Torchvision's transform in a step, None where it is another."""
    inner = getattr(step, "apply", None) if type(step) is TorchvisionTransform else None
    return inner if type(inner) is kind else None


def _bicubic(transform: Any) -> bool:
    return bool(transform.interpolation == v2.InterpolationMode.BICUBIC)


def train_views(dataset: Any) -> dict[str, Any]:
    """How training images are cut, sizes in full."""
    steps = [step for step in steps_of(dataset) if not _quiet(step)]
    texts = [_phrase(step) for step in steps]
    resized = [
        s for s, t in zip(steps, texts, strict=True) if t.endswith("train_ratio")
    ]
    cut = [s for s, t in zip(steps, texts, strict=True) if "resized crop" in t]
    return {
        "train_views": ", ".join(texts) or "whole images",
        "train_ratio": resized[0].ratio_range if len(resized) == 1 else None,
        "train_scale": cut[0].apply.scale if len(cut) == 1 else None,
    }


def _phrase(step: Any) -> str:
    """A step of training in the protocols' words, others in full."""
    if is_like(step, RandomFlip, prob=0.5):
        return "flip"
    if is_like(step, PhotoMetricDistortion):
        return "photometric distortion"
    if type(step) is RandomCrop and is_like(
        step, RandomCrop, crop_size=step.crop_size, cat_max_ratio=step.cat_max_ratio
    ):
        most = f" (one class fills {100 * step.cat_max_ratio:g} % of it at most)"
        most = most if step.cat_max_ratio < 1 else ""
        return f"random crop {_by(step.crop_size)}{most}"
    if type(step) is RandomResize and step.ratio_range is not None:
        values = {"scale": step.scale, "ratio_range": step.ratio_range}
        if is_like(step, RandomResize, **values, keep_ratio=True):
            return f"resize {_by(sorted(step.scale, reverse=True))} by train_ratio"
    cut = _applied(step, v2.RandomResizedCrop)
    if cut is not None and tuple(cut.ratio) == (3 / 4, 4 / 3) and _bicubic(cut):
        return f"random resized crop {_by(cut.size)}"
    return described(step)


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _side(size: Sequence[int] | int) -> int | str:
    """The side of a square, else height x width."""
    sides = (size,) if isinstance(size, int) else tuple(size)
    return sides[0] if len(set(sides)) == 1 else _by(sides)


def shortened(card: Mapping[str, Any]) -> str:
    """Views of training without the sizes that stand in other fields."""
    text = str(card.get("train_views", NOT_TOLD))
    crop, resize, longest = (card.get(name) for name in ("crop", "resize", "longest"))
    text = text.replace(f"resize {longest} x {resize} by", "resize by")
    for kind in ("random crop", "random resized crop"):
        text = text.replace(f"{kind} {crop} x {crop}", kind)
    return text


def test_views(model: Any, dataset: Any) -> dict[str, Any]:
    """Sizes of the images and windows of a test, and where labels are compared."""
    steps = steps_of(dataset)
    fields: dict[str, Any] = {"label_resolution": _label_resolution(model, steps)}
    others = []
    inference = "whole image"
    for step in (s for s in steps if not _quiet(s)):
        resize, cut = _applied(step, v2.Resize), _applied(step, v2.CenterCrop)
        if type(step) is Resize and _plain_resize(step) and "resize" not in fields:
            fields |= {"resize": min(step.scale), "longest": max(step.scale)}
        elif resize and _bicubic(resize) and not resize.max_size:
            fields["resize"] = _side(resize.size)
        elif cut:
            fields["crop"], inference = _side(cut.size), "centre crop"
        elif type(step) is not TestTimeAug:
            others.append(described(step))
    if not isinstance(model, PatchGridSegmentor) and model.test_cfg["mode"] == "slide":
        window, inference = model.test_cfg, "sliding window"
        fields["crop"] = _side(window["crop_size"])
        fields["stride"] = _side(window["stride"])
    for step in (s for s in steps if type(s) is TestTimeAug):
        inference += f", mean of {len(step.subroutines)} views: {_views(step)}"
    return {**fields, "inference": inference, "test_views": ", ".join(others) or None}


def _plain_resize(step: Resize) -> bool:
    return step.scale is not None and is_like(
        step, Resize, scale=step.scale, keep_ratio=True
    )


def _views(step: TestTimeAug) -> str:
    """Different steps of the views of test-time augmentation."""
    inner = [s for s in flattened(step.subroutines) if not hasattr(s, "transforms")]
    return ", ".join(dict.fromkeys(described(s) for s in inner if not _quiet(s)))


def _of_grid(model: Any) -> str:
    """The protocol's grid, of the cells of the model."""
    direct = getattr(model, "neck", None) is None
    return patch_grid(getattr(model.backbone, "stride", None) if direct else None)


def _label_resolution(model: Any, steps: Sequence[Any]) -> str:
    """At the size of the image file, unless something follows the labels' loading."""
    if isinstance(model, PatchGridSegmentor):
        return _of_grid(model)
    for step in (s for s in steps if type(s) is TestTimeAug):
        steps = step.subroutines[0].transforms
    loads = [i for i, step in enumerate(steps) if isinstance(step, LoadAnnotations)]
    later = [described(step) for step in steps[loads[0] + 1 :] if not _quiet(step)]
    return f"after {', '.join(later)}" if later else SEGMENTATION.label_resolution
