"""STELLAR's views of one image."""

from __future__ import annotations

import inspect
import math

import numpy as np
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from lightly_ext.transforms.checks import (
    check_count,
    check_probability,
    check_scale,
)
from lightly_ext.transforms.color_augment import STELLARColorAugment
from stellar_plugin.image_conversion import to_uint8_rgb

_ASPECT_RATIOS = (3.0 / 4.0, 4.0 / 3.0)
_LOG_RATIOS = torch.tensor(_ASPECT_RATIOS).log().tolist()


class STELLARTransform(MultiViewTransform):
    """Makes the global and local views of STELLAR [0].

    Input to this transform:
        PIL Image, or uint8 Tensor with shape (3, H, W) or (1, H, W).

    Output of this transform:
        - With `normalize=None` (default): list of uncoloured uint8 tensors, first
          `num_global_views` with shape (3, global_crop_size, global_crop_size), then
          `num_local_views` with shape (3, local_crop_size, local_crop_size). The first
          view is the target view. :class:`STELLARColorAugment` colours and normalises
          them for a whole batch on the device, which is several times faster.
        - With `normalize=IMAGENET_NORMALIZE`: list of float tensors, first the
          uncoloured target view, then the coloured global views (the first is the crop
          of the target view), then the coloured local views, all normalised. This does
          everything on the CPU, as the other transforms of lightly do.

    Applies the following augmentations by default:
        - Random resized crop, bicubic with antialiasing
        - Random horizontal flip
        - With `normalize` also color jitter, random gray scale, Gaussian blur,
          normalization, with parameters of their own for every view

    A crop that needs no resizing is cut out exactly: `global_crop_scale=(1, 1)` on a
    square image of `global_crop_size` pixels returns the image.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905

    Attributes:
        num_global_views:
            Number of global views, at least 1.
        num_local_views:
            Number of local views, 0 for none.
        global_crop_size:
            Side of the global views in pixels.
        global_crop_scale:
            Tuple of min and max area of the global crops relative to the image.
        local_crop_size:
            Side of the local views in pixels.
        local_crop_scale:
            Tuple of min and max area of the local crops relative to the image.
        hf_prob:
            Probability that horizontal flip is applied.
        cj_prob:
            Probability that color jitter is applied. This and the following arguments
            can only be set together with `normalize`; without it the colours are those
            of the :class:`STELLARColorAugment` that the training loop uses.
        cj_strength:
            Strength of the color jitter. `cj_bright`, `cj_contrast`, `cj_sat`, and
            `cj_hue` are multiplied by this value.
        cj_bright:
            How much to jitter brightness.
        cj_contrast:
            How much to jitter contrast.
        cj_sat:
            How much to jitter saturation.
        cj_hue:
            How much to jitter hue.
        random_gray_scale:
            Probability of conversion to grayscale.
        gaussian_blur:
            Probability of Gaussian blur.
        kernel_size:
            Odd size of the Gaussian kernel in pixels.
        sigmas:
            Tuple of min and max value from which the std of the gaussian kernel is
            sampled.
        normalize:
            Dictionary with 'mean' and 'std', or None for uncoloured uint8 views.

    Raises:
        ValueError: If a number of views, size, scale or probability is impossible, or
            a colour argument is set without `normalize`.

    Examples:
        >>> transform = STELLARTransform()
        >>> views = transform(image)  # 16 tensors, uint8
        >>> global_views = torch.stack(views[:8])  # (8, 3, 224, 224)

    """

    def __init__(
        self,
        num_global_views: int = 8,
        num_local_views: int = 8,
        global_crop_size: int = 224,
        global_crop_scale: tuple[float, float] = (0.36, 1.0),
        local_crop_size: int = 96,
        local_crop_scale: tuple[float, float] = (0.06, 0.36),
        hf_prob: float = 0.5,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.4,
        cj_contrast: float = 0.4,
        cj_sat: float = 0.2,
        cj_hue: float = 0.1,
        random_gray_scale: float = 0.2,
        gaussian_blur: float = 0.5,
        kernel_size: int = 9,
        sigmas: tuple[float, float] = (0.1, 2.0),
        normalize: dict[str, list[float]] | None = None,
    ) -> None:
        check_count("num_global_views", num_global_views, at_least=1)
        check_count("num_local_views", num_local_views, at_least=0)
        check_count("global_crop_size", global_crop_size, at_least=1)
        check_count("local_crop_size", local_crop_size, at_least=1)
        check_scale("global_crop_scale", global_crop_scale)
        check_scale("local_crop_scale", local_crop_scale)
        self.num_global_views = num_global_views
        self.num_local_views = num_local_views
        self.global_crop_size = global_crop_size
        self.global_crop_scale = tuple(global_crop_scale)
        self.local_crop_size = local_crop_size
        self.local_crop_scale = tuple(local_crop_scale)
        self.hf_prob = hf_prob
        self.color_augment = _color_augment(
            normalize,
            cj_prob=cj_prob,
            cj_strength=cj_strength,
            cj_bright=cj_bright,
            cj_contrast=cj_contrast,
            cj_sat=cj_sat,
            cj_hue=cj_hue,
            random_gray_scale=random_gray_scale,
            gaussian_blur=gaussian_blur,
            kernel_size=kernel_size,
            sigmas=tuple(sigmas),
        )
        global_transform = STELLARViewTransform(
            crop_size=global_crop_size, crop_scale=global_crop_scale, hf_prob=hf_prob
        )
        local_transform = STELLARViewTransform(
            crop_size=local_crop_size, crop_scale=local_crop_scale, hf_prob=hf_prob
        )
        super().__init__(
            [global_transform] * num_global_views + [local_transform] * num_local_views
        )

    def __call__(self, image: Tensor | Image) -> list[Tensor]:
        """Makes the views of an image.

        Args:
            image:
                PIL image, or uint8 tensor with shape (3, H, W) or (1, H, W).

        Returns:
            The views, see the class.

        Raises:
            ValueError: If the image is a tensor of another type or shape, or a PIL
                image with 32 bits per pixel and channel.

        """
        image = to_uint8_rgb(image)
        views: list[Tensor] = [transform(image) for transform in self.transforms]
        if self.color_augment is None:
            return views
        global_views = torch.stack(views[: self.num_global_views]).unsqueeze(0)
        local_views = None
        if self.num_local_views > 0:
            local_views = torch.stack(views[self.num_global_views :]).unsqueeze(0)
        colored = self.color_augment(global_views, local_views)
        result = [colored.target[0], *colored.global_views[0]]
        if colored.local_views is not None:
            result.extend(colored.local_views[0])
        return result


class STELLARViewTransform:
    """Cuts a single, uncoloured view out of an image.

    Used by STELLARTransform to create the global and local views of an image.

    Input to this transform:
        uint8 Tensor with shape (3, H, W).

    Output of this transform:
        uint8 Tensor with shape (3, crop_size, crop_size).

    Applies the following augmentations by default:
        - Random resized crop, bicubic with antialiasing
        - Random horizontal flip

    Attributes:
        crop_size:
            Side of the view in pixels.
        crop_scale:
            Tuple of min and max area of the crop relative to the image.
        hf_prob:
            Probability that horizontal flip is applied.

    Raises:
        ValueError: If the size, scale or probability is impossible.

    """

    def __init__(
        self,
        crop_size: int = 224,
        crop_scale: tuple[float, float] = (0.36, 1.0),
        hf_prob: float = 0.5,
    ) -> None:
        check_count("crop_size", crop_size, at_least=1)
        check_scale("crop_scale", crop_scale)
        check_probability("hf_prob", hf_prob)
        self.crop_size = crop_size
        self.crop_scale = crop_scale
        self.hf_prob = hf_prob

    def __call__(self, image: Tensor) -> Tensor:
        """Cuts a random view out of a uint8 image with shape (3, H, W)."""
        _, height, width = image.shape
        top, left, height, width = _draw_crop(height, width, self.crop_scale)
        crop = image[None, :, top : top + height, left : left + width]
        # torch resizes colours that lie beside each other in one piece; NumPy takes
        # them apart, and flips, in one copy, twice as fast as torch.
        resized = interpolate(
            crop.clone(memory_format=torch.channels_last),
            (self.crop_size, self.crop_size),
            mode="bicubic",
            antialias=True,
        )
        view = resized[0].numpy()
        if torch.rand(()).item() < self.hf_prob:
            view = view[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(view))


def _draw_crop(
    height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, as torchvision draws them.

    `RandomResizedCrop.get_params` does the same in twice the time.
    """
    for _ in range(10):
        area = height * width * torch.empty(()).uniform_(*scale).item()
        ratio = torch.empty(()).uniform_(*_LOG_RATIOS).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, ()))
            left = int(torch.randint(width - w + 1, ()))
            return top, left, h, w
    # The middle of an image that is longer than all crops.
    least, most = _ASPECT_RATIOS
    w = min(width, round(height * most))
    h = min(height, round(width / least))
    return (height - h) // 2, (width - w) // 2, h, w


def _color_augment(
    normalize: dict[str, list[float]] | None, **arguments: object
) -> STELLARColorAugment | None:
    if normalize is not None:
        if set(normalize) != {"mean", "std"}:
            raise ValueError(
                "normalize must have the keys 'mean' and 'std', got "
                f"{sorted(normalize)}."
            )
        return STELLARColorAugment(**arguments, **normalize)  # type: ignore[arg-type]
    defaults = inspect.signature(STELLARColorAugment).parameters
    changed = [name for name in arguments if arguments[name] != defaults[name].default]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} would have no effect with normalize=None: set them "
            "on STELLARColorAugment, which colours these views, or pass "
            "normalize=IMAGENET_NORMALIZE to colour them here."
        )
    return None
