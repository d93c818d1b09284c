"""Colour operations on batches of images, with one strength per image.

The values are those of ``torchvision.transforms.v2.functional``, which takes one
strength for a whole batch. Shapes: N images, 3 channels RGB, H x W pixels. Images are
floats in [0, 1]; the operations do not change them in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# ITU-R 601 luma as torchvision and Pillow round it.
_LUMA = (0.2989, 0.587, 0.114)


def rgb_to_grayscale(images: Tensor) -> Tensor:
    """Computes the luma of images.

    Args:
        images:
            Tensor with shape (N, 3, H, W), values in [0, 1].

    Returns:
        Tensor with shape (N, 1, H, W), values in [0, 1].

    """
    red, green, blue = images.unbind(dim=1)
    luma = red * _LUMA[0]
    luma.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return luma.unsqueeze(dim=1)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiplies images by a factor each and clamps.

    Args:
        images:
            Tensor with shape (N, 3, H, W), values in [0, 1].
        factors:
            Tensor with shape (N,), values >= 0; 1 keeps the image.

    Returns:
        Tensor with shape (N, 3, H, W), values in [0, 1].

    """
    return (images * _per_image(factors)).clamp_(0.0, 1.0)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blends every image with the mean of its luma.

    Args:
        images:
            Tensor with shape (N, 3, H, W), values in [0, 1].
        factors:
            Tensor with shape (N,), values >= 0; 1 keeps the image, 0 makes it uniform.

    Returns:
        Tensor with shape (N, 3, H, W), values in [0, 1].

    """
    mean = rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blends every image with its luma.

    Args:
        images:
            Tensor with shape (N, 3, H, W), values in [0, 1].
        factors:
            Tensor with shape (N,), values >= 0; 1 keeps the image, 0 makes it gray.

    Returns:
        Tensor with shape (N, 3, H, W), values in [0, 1].

    """
    return _blend(images, rgb_to_grayscale(images), factors)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turns the hue of every image, keeping value and saturation of HSV.

    Args:
        images:
            Tensor with shape (N, 3, H, W), values in [0, 1].
        shifts:
            Tensor with shape (N,), values in [-0.5, 0.5], fractions of the hue circle.

    Returns:
        Tensor with shape (N, 3, H, W), values in [0, 1].

    """
    low, high = images.amin(dim=1), images.amax(dim=1)  # (N, H, W)
    chroma = high - low
    hue = _hue(images, high, chroma)  # (N, H, W), six is the full circle
    hue.add_(6.0 * shifts.view(-1, 1, 1))
    hue.sub_((hue / 6.0).floor_(), alpha=6.0)  # remainder_ takes four times as long
    # A channel of a fully saturated colour is a trapezoid over the hue circle; red's
    # is centred on 0, green's on 2, blue's on 4.
    red = (hue - 3.0).abs_().sub_(1.0)
    green = (hue - 2.0).abs_().neg_().add_(2.0)
    blue = hue.sub_(4.0).abs_().neg_().add_(2.0)
    result = torch.stack((red, green, blue), dim=1).clamp_(0.0, 1.0)
    return result.mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


def gaussian_blur(images: Tensor, sigmas: Tensor, kernel_size: int) -> Tensor:
    """Blurs every image with a Gaussian of its own width, reflecting at the border.

    Args:
        images:
            Tensor with shape (N, 3, H, W).
        sigmas:
            Tensor with shape (N,), standard deviations in pixels, > 0.
        kernel_size:
            Odd number of pixels after which the Gaussian is cut off; its half must be
            smaller than H and W.

    Returns:
        Tensor with shape (N, 3, H, W).

    """
    radius = kernel_size // 2
    offsets = torch.arange(radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigmas.unsqueeze(1)) ** 2)  # (N, radius + 1)
    weights /= 2.0 * weights.sum(dim=1, keepdim=True) - 1.0
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    return _symmetric_filter(_symmetric_filter(padded, weights, dim=3), weights, dim=2)


def apply_to_chosen(
    images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *args: Tensor
) -> Tensor:
    """Applies an operation to some of the images only.

    Args:
        images:
            Tensor with shape (N, 3, H, W); overwritten.
        chosen:
            Boolean tensor with shape (N,) on the CPU.
        operation:
            Called with M chosen images, shape (M, 3, H, W), and their arguments, each
            with shape (M,), all on the device of the images.
        *args:
            Tensors with shape (N,) on the CPU.

    Returns:
        Tensor with shape (N, 3, H, W).

    """
    if bool(chosen.all()):
        return operation(images, *(to_device(arg, images.device) for arg in args))
    index = chosen.nonzero().squeeze(1)
    if index.numel() == 0:
        return images
    values = [to_device(arg[index], images.device) for arg in args]
    index = to_device(index, images.device)
    return images.index_copy_(0, index, operation(images[index], *values))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Moves values from the CPU to a device, for which the CPU does not wait."""
    if device.type != "cuda":
        return values.to(device)
    # From pinned memory the copy is queued and the CPU goes on at once.
    return values.pin_memory().to(device, non_blocking=True)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    weights = _per_image(factors)
    return (images * weights).add_((1.0 - weights) * other).clamp_(0.0, 1.0)


def _hue(images: Tensor, high: Tensor, chroma: Tensor) -> Tensor:
    """Hue in [-1, 5); gray pixels have chroma 0 and get some finite value."""
    red, green, blue = images.unbind(dim=1)
    scale = chroma.clamp(min=1e-12).reciprocal_()
    from_red = (green - blue).mul_(scale)
    from_green = (blue - red).mul_(scale).add_(2.0)
    from_blue = (red - green).mul_(scale).add_(4.0)
    hue = torch.where(high == green, from_green, from_blue)
    return torch.where(high == red, from_red, hue)


def _symmetric_filter(images: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Filters along dim, which gets shorter by twice the radius.

    A sum of shifted images: depthwise convolutions with a kernel per image take between
    half and five times as long on a CPU, depending on the number of images.
    """
    radius = weights.shape[1] - 1
    size = images.shape[dim] - 2 * radius
    result = images.narrow(dim, radius, size) * _per_image(weights[:, 0])
    for offset in range(1, radius + 1):
        before = images.narrow(dim, radius - offset, size)
        after = images.narrow(dim, radius + offset, size)
        result.addcmul_(before + after, _per_image(weights[:, offset]))
    return result
