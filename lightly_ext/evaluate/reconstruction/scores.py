"""Scores and pictures of what a frozen autoencoder decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightly_ext.durable import replacing
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, centre_crop
from lightly_ext.evaluate.pictures.gallery import TOKEN_COLOURS, draw_rows
from lightly_ext.evaluate.reconstruction.autoencoder import Autoencoder
from lightly_ext.evaluate.reconstruction.image_metrics import ImageScores, to_uint8
from lightly_ext.evaluate.reconstruction.metric_networks import MetricNetworks
from lightly_ext.evaluate.reduction import ImageMeans, count_unreadable
from stellar_plugin.encoder import Factorization
from stellar_plugin.model import resized
from stellar_plugin.protocols import MOST_PSNR_DB, CropProtocol
from stellar_plugin.visualize import (
    overlay_localization,
    strongest_token,
    to_pictures,
)

NUM_PICTURES = 8


def score_images(
    devices: Devices,
    autoencoder: Autoencoder,
    files: ImageFiles,
    protocol: CropProtocol,
    networks: MetricNetworks,
) -> tuple[dict[str, Any], dict[str, float], int]:
    """Decodes and scores images, each in one process.

    Args:
        devices:
            Where it runs.
        autoencoder:
            Decodes; where it has a tokenizer, that is scored beside it.
        files:
            The images.
        protocol:
            Says how they are cut.
        networks:
            The networks of the metrics.

    Returns:
        Scores of all readable images by name; those of them that have one without a
        model, the images in their mean colour; and the number of unreadable images.

    Raises:
        RuntimeError: If too many images are unreadable, or decoded values not finite.
    """
    images = EvaluationImages(files, centre_crop(protocol, "bicubic"))
    prefixes = ["", "tokenizer_"] if autoencoder.tokenizer is not None else [""]
    metrics = ImageScores(networks, prefixes, devices.device)
    unreadable: list[int] = []
    flat = ImageMeans(["psnr_db"])
    loader = devices.loader(images)
    for batch in devices.progress(loader, "reconstruction", len(loader)):
        unreadable += batch.number[~batch.readable].tolist()
        readable = devices.fabric.to_device(batch.image[batch.readable])
        if len(readable):
            _, decoded = _decode(devices, autoencoder, readable)
            metrics.update(readable, decoded)
            flat.add("psnr_db", mean_colour_psnr(readable))
    num_unreadable = count_unreadable(devices, files, unreadable)
    chance = {name: mean.value for name, mean in flat.reduce(devices).items()}
    return metrics.compute(), chance, num_unreadable


def mean_colour_psnr(images: Tensor) -> Tensor:
    """PSNR in dB of images in their own mean colour, rounded to 8 bits.

    Args:
        images:
            uint8 tensor with shape (batch_size, 3, height, width).

    Returns:
        float64 tensor with shape (batch_size,).
    """
    values = images.double()
    error = (values - values.mean(dim=(2, 3), keepdim=True).round()) / 255
    psnr = -10 * error.square().mean(dim=(1, 2, 3)).log10()
    return psnr.clamp(max=MOST_PSNR_DB)


@torch.no_grad()
def _decode(
    devices: Devices, autoencoder: Autoencoder, images: Tensor
) -> tuple[Factorization, list[Tensor]]:
    """What the encoder finds; uint8 images by the decoder and by the tokenizer."""
    with devices.fabric.autocast():
        result, prediction = autoencoder.predict(images)
    decoded = [autoencoder.to_images(prediction, result.grid_size)]
    if autoencoder.tokenizer is not None:
        codes = autoencoder.tokenizer.encode_to_grid(images / 255, result.grid_size)
        decoded.append(autoencoder.tokenizer.decode_unclamped(codes))
    size, precision = images.shape[-2:], devices.precision
    return result, [to_uint8(resized(d, size), precision) for d in decoded]


def save_pictures(
    devices: Devices,
    autoencoder: Autoencoder,
    files: ImageFiles,
    protocol: CropProtocol,
    folder: Path,
) -> None:
    """Shows the first images: input, decoded, the tokenizer's, strongest token.

    Args:
        devices:
            Where it runs.
        autoencoder:
            Decodes.
        files:
            The images, of which the first 8 are shown.
        protocol:
            Says how they are cut.
        folder:
            Folder for reconstruction.png.
    """
    images = EvaluationImages(files, centre_crop(protocol, "bicubic"))
    first = list(range(min(NUM_PICTURES, len(images))))
    batch = next(iter(devices.loader(images, first, batch_size=NUM_PICTURES)))
    inputs = devices.fabric.to_device(batch.image[batch.readable])
    if not len(inputs):
        return
    result, decoded = _decode(devices, autoencoder, inputs)
    titles = ("images", "decoded", "by the tokenizer alone")
    rows = {
        title: to_pictures(image / 255)
        for title, image in zip(titles, (inputs, *decoded), strict=False)
    }
    if autoencoder.model.has_localization:
        tokens = strongest_token(result.localization)
        rows["strongest token"] = overlay_localization(
            rows["images"], tokens, result.grid_size
        )
    names = [files.names[i] for i in batch.number[batch.readable].tolist()]
    path = folder / "reconstruction.png"
    legend = TOKEN_COLOURS if autoencoder.model.has_localization else ""
    with replacing(path) as new:
        draw_rows(names, rows, legend).save(new, "png")
    devices.say(f"Pictures in {path}.")
