"""STELLAR's colour augmentation for whole batches, on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch import Generator, Tensor, nn

from lightly_ext.randomness import Stream, seeded_uniform
from lightly_ext.transforms.checks import (
    check_kernel,
    check_normalization,
    check_probability,
)
from lightly_ext.transforms.color_draws import ColorDraws, jitter_ranges
from lightly_ext.transforms.color_functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_to_chosen,
    gaussian_blur,
    rgb_to_grayscale,
)

# Pixels worked on at once: few on a CPU, for its caches; many on a GPU, to fill it
# while temporaries stay within a few gigabytes.
_CPU_PIXELS = 4 * 224 * 224
_DEVICE_PIXELS = 512 * 224 * 224


def _to_gray(images: Tensor) -> Tensor:
    return rgb_to_grayscale(images).repeat(1, 3, 1, 1)


_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
_OPERATIONS: tuple[Callable[..., Tensor], ...] = (*_JITTER, _to_gray, gaussian_blur)


class STELLARViews(NamedTuple):
    """Views of a batch of images, normalised but for the raw target images.

    Shapes: B images, V global views of S x S pixels, U local views of s x s pixels.

    Attributes:
        target:
            Tensor with shape (B, 3, S, S), global view 0 without colour change.
        global_views:
            Tensor with shape (B, V, 3, S, S), coloured; view 0 is the target's crop.
        local_views:
            Tensor with shape (B, U, 3, s, s), coloured, or None.
        images:
            Tensor with shape (B, 3, S, S), the target view as it is, in [0, 1]: what a
            reconstruction is compared with.

    """

    target: Tensor
    global_views: Tensor
    local_views: Tensor | None
    images: Tensor


class STELLARColorAugment(nn.Module):
    """Colour augmentation and normalisation of STELLAR [0] for batches of views.

    Takes the uncoloured uint8 views of :class:`STELLARTransform` after they have been
    moved to the device. Applies, in this order:

    - Color jitter: brightness, contrast, saturation and hue in random order
    - Random gray scale
    - Gaussian blur
    - Normalization

    Everything is drawn for every image and view on its own, except for the order of
    the four jitter operations: it is drawn once for the global and once for the local
    views of a call. The public code draws all parameters once per batch, which makes
    the views of a batch alike. Draws come from the CPU's random numbers, so a CPU and
    a GPU draw the same, and the GPU never waits for the CPU. With seeds the draws of an
    image do not depend on the batch around it.

    The views are computed in float32 without gradient, also under autocast.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905

    Attributes:
        cj_prob:
            Probability that color jitter is applied.
        cj_strength:
            Strength of the color jitter. `cj_bright`, `cj_contrast`, `cj_sat`, and
            `cj_hue` are multiplied by this value.
        cj_bright:
            How much to jitter brightness: the factor is uniform in 1 +- this value.
        cj_contrast:
            How much to jitter contrast.
        cj_sat:
            How much to jitter saturation.
        cj_hue:
            How much to jitter hue: the shift is uniform in +- this value, as a fraction
            of the hue circle, at most 0.5.
        random_gray_scale:
            Probability of conversion to grayscale.
        gaussian_blur:
            Probability of Gaussian blur.
        kernel_size:
            Odd size of the Gaussian kernel in pixels.
        sigmas:
            Tuple of min and max value from which the std of the gaussian kernel is
            sampled, in pixels.
        mean:
            Mean of the three channels in [0, 1] that is subtracted.
        std:
            Standard deviation of the three channels that is divided by.

    Raises:
        ValueError: If a probability is outside [0, 1], a strength, size or standard
            deviation is impossible, or mean and std do not have three values.

    Examples:
        >>> transform = STELLARTransform()
        >>> augment = STELLARColorAugment().to(device)
        >>>
        >>> # global_views (B, 8, 3, 224, 224), local_views (B, 8, 3, 96, 96), uint8
        >>> views = augment(global_views.to(device), local_views.to(device))
        >>> views.target  # (B, 3, 224, 224), float32, normalised

    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
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
        mean: Sequence[float] = tuple(IMAGENET_NORMALIZE["mean"]),
        std: Sequence[float] = tuple(IMAGENET_NORMALIZE["std"]),
    ) -> None:
        super().__init__()
        check_probability("cj_prob", cj_prob)
        check_probability("random_gray_scale", random_gray_scale)
        check_probability("gaussian_blur", gaussian_blur)
        check_kernel(kernel_size, sigmas)
        check_normalization(mean, std)
        self.cj_prob = cj_prob
        self.jitter_ranges = jitter_ranges(
            cj_strength,
            {
                "cj_bright": cj_bright,
                "cj_contrast": cj_contrast,
                "cj_sat": cj_sat,
                "cj_hue": cj_hue,
            },
        )
        self.random_gray_scale = random_gray_scale
        self.gaussian_blur = gaussian_blur
        self.kernel_size = kernel_size
        self.sigmas = tuple(sigmas)
        self._operations = _OPERATIONS
        # Constants, not weights: checkpoints do not need them.
        for name, values in (("mean", mean), ("std", std)):
            buffer = torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each operation: one pass over the memory instead of many.

        Worth its half minute on a GPU. The forward pass around the operations, which
        draws and chooses images anew in every call, stays as it is.

        Args:
            *args:
                Passed on to `torch.compile`.
            **kwargs:
                Passed on to `torch.compile`.

        """
        # Any number of chosen images, of any size, in one graph.
        kwargs = {"dynamic": True, **kwargs}
        self._operations = tuple(
            torch.compile(operation, *args, **kwargs) for operation in _OPERATIONS
        )

    @torch.no_grad()
    def forward(
        self,
        global_views: Tensor,
        local_views: Tensor | None = None,
        generator: Generator | None = None,
        seeds: Tensor | None = None,
    ) -> STELLARViews:
        """Colours and normalises the views of a batch.

        Args:
            global_views:
                uint8 tensor with shape (B, V, 3, S, S), V >= 1.
            local_views:
                uint8 tensor with shape (B, U, 3, s, s), or None.
            generator:
                CPU generator to draw from; torch's default generator if None.
            seeds:
                int64 tensor on the CPU with shape (B,). If given, what is drawn for an
                image depends on its seed alone, and only the order of the jitter
                operations comes from the generator.

        Returns:
            The target view, normalised and raw, and the coloured views.

        Raises:
            ValueError: If views have another type or shape, or are smaller than half
                the blur kernel.

        """
        self._check_views("global_views", global_views)
        with torch.autocast(global_views.device.type, enabled=False):
            colored_local = None
            colored_global = self._augment(
                global_views, generator, seeds, Stream.GLOBAL_COLORS
            )
            if local_views is not None:
                self._check_views("local_views", local_views)
                colored_local = self._augment(
                    local_views, generator, seeds, Stream.LOCAL_COLORS
                )
            images = global_views[:, 0].float() / 255.0
            target = self.normalize(images)
        return STELLARViews(target, colored_global, colored_local, images)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises images without changing their colours.

        Args:
            images:
                Float tensor with shape (..., 3, H, W), values in [0, 1].

        Returns:
            Tensor with shape (..., 3, H, W).

        Raises:
            ValueError: If the images are integers.

        """
        if not images.is_floating_point():
            raise ValueError(
                f"normalize takes floats in [0, 1], got {images.dtype}; divide uint8 "
                "images by 255."
            )
        return (images - self.mean) / self.std

    def draw(
        self,
        num_images: int,
        generator: Generator | None = None,
        uniform: Tensor | None = None,
    ) -> ColorDraws:
        """Draws what is done to each of a number of images.

        Args:
            num_images:
                Number of images N, every view counts as one.
            generator:
                CPU generator to draw from; torch's default generator if None.
            uniform:
                Tensor on the CPU with shape (8, N), numbers in [0, 1) that decide on
                everything but the order. None draws them too.

        Returns:
            The draws, on the CPU.

        """
        if uniform is None:
            uniform = torch.rand(8, num_images, generator=generator)
        low, high = torch.tensor(self.jitter_ranges).unbind(dim=1)
        strengths = torch.lerp(low[:, None], high[:, None], uniform[3:7])
        return ColorDraws(
            jitter=uniform[0] < self.cj_prob,
            strengths=strengths,
            order=torch.randperm(len(_JITTER), generator=generator).tolist(),
            gray=uniform[1] < self.random_gray_scale,
            blur=uniform[2] < self.gaussian_blur,
            sigmas=self.sigmas[0] + (self.sigmas[1] - self.sigmas[0]) * uniform[7],
        )

    def colorize(self, images: Tensor, draws: ColorDraws) -> Tensor:
        """Jitters, grays and blurs images as drawn.

        Args:
            images:
                Float tensor with shape (N, 3, H, W), values in [0, 1]; overwritten.
            draws:
                What is done to each of the N images.

        Returns:
            Tensor with shape (N, 3, H, W), values in [0, 1].

        """
        *adjustments, to_gray, blur = self._operations

        def jitter(images: Tensor, *strengths: Tensor) -> Tensor:
            for step in draws.order:
                images = adjustments[step](images, strengths[step])
            return images

        images = apply_to_chosen(images, draws.jitter, jitter, *draws.strengths)
        images = apply_to_chosen(images, draws.gray, to_gray)
        blur = partial(blur, kernel_size=self.kernel_size)
        return apply_to_chosen(images, draws.blur, blur, draws.sigmas)

    def _augment(
        self,
        views: Tensor,
        generator: Generator | None,
        seeds: Tensor | None,
        stream: Stream,
    ) -> Tensor:
        images = views.flatten(0, 1)
        num_images, _, height, width = images.shape
        uniform = None
        if seeds is not None:
            uniform = seeded_uniform(seeds, stream, views.shape[1], 8).flatten(0, 1).T
        draws = self.draw(num_images, generator, uniform)
        result = torch.empty_like(images, dtype=torch.float32)
        pixels = _CPU_PIXELS if images.device.type == "cpu" else _DEVICE_PIXELS
        size = max(1, pixels // (height * width))
        for start in range(0, num_images, size):
            part = slice(start, start + size)
            chunk = images[part] / 255.0
            chunk = self.colorize(chunk, draws.chunk(part))
            torch.sub(chunk, self.mean, out=result[part]).div_(self.std)
        return result.view(views.shape)

    def _check_views(self, name: str, views: Tensor) -> None:
        if views.dtype != torch.uint8:
            raise ValueError(
                f"{name} must be uint8 with values 0 to 255, got {views.dtype}; build "
                "STELLARTransform with normalize=None."
            )
        if views.ndim != 5 or views.shape[1] == 0 or views.shape[2] != 3:
            raise ValueError(
                f"{name} must have shape (batch, views, 3, height, width) with at "
                f"least one view, got {tuple(views.shape)}."
            )
        if min(views.shape[-2:]) <= self.kernel_size // 2:
            raise ValueError(
                f"{name} of {tuple(views.shape[-2:])} pixels are too small for "
                f"kernel_size={self.kernel_size}; use larger views or a smaller kernel."
            )
