"""`stellar visualize`: localization, patch features and reconstructions of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.data.streams.sources import BUILDERS
from lightly_ext.durable import replace_text, replacing
from lightly_ext.evaluate.clusters import cluster_patches
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import unreadable_text
from lightly_ext.evaluate.finite import not_finite
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, centre_crop
from lightly_ext.evaluate.loading import load_stellar
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.pictures.gallery import (
    CLUSTER_COLOURS,
    TOKEN_COLOURS,
    draw_shares,
    draw_sheet,
    enlarged,
    shown_name,
)
from lightly_ext.evaluate.pictures.page import PAGE, render_visualize
from lightly_ext.evaluate.pictures.seen import Seen, sheet_columns, token_pictures
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.sizes import described_cut
from stellar_plugin import Stellar
from stellar_plugin.protocols import CLUSTERS, VISUALIZE, CropProtocol
from stellar_plugin.visualize import (
    ABSENT_PATCHES,
    Uint8Array,
    check_threshold,
    to_pictures,
    token_masses,
)

SHARES_TITLE = "shares of the image"
ROWS_PER_SHEET = 8
# Side of a photo of the page in px, at most, if the model's input has no more.
PHOTO_SIDE = 448
TOKEN_COLUMNS = 6


def check_visualize(
    results: Results,
    data: str,
    num_images: int,
    tokens: bool,
    threshold: float | None,
) -> tuple[str, ImageFiles]:
    """Checks the options, finds the images and their name; see `Results.required`."""
    check_positive(num_images=num_images)
    if threshold is not None:
        check_threshold(threshold)
        if not tokens:
            raise ValueError("threshold is about single tokens: add --tokens.")
    name, files = _find(data)
    return name, files.limited(results.limit).limited(num_images)


@evaluation
def run_visualize(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    num_images: int = 16,
    tokens: bool = False,
    threshold: float | None = None,
) -> list[Path]:
    """Draws what a model sees in images: sheets with one row per image, and a page.

    A row has the image, its patches in the colours of their strongest tokens (as opaque
    as these lead, and all alike), the first three principal components of its patch
    features, its reconstruction, and the share of the image that each token has.
    Without localization, k-means clusters of the patches of the image take the place of
    tokens; without decoder there is no reconstruction.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder of images, or tars, parquet or hf:NAME of the hub; the name of a
            known set, or a single image file.
        num_images:
            Number of images to show, spread evenly over the folder.
        tokens:
            Also draw one picture per image with all of its tokens, each alone.
        threshold:
            For `tokens`: colour the patches that have at least this fraction of the
            token's maximum. None colours them by what they have of that maximum.

    Returns:
        The pictures that were written.

    Raises:
        ValueError: If an option is impossible, or no image is readable.
    """
    name, files = results.required(check_visualize)
    if tokens:
        model.require_localization()
    rule = None
    if not model.has_localization:
        rule = f"{VISUALIZE.rule}; {CLUSTERS} k-means clusters of each image's patches"
    protocol = results.protocol(
        model, VISUALIZE, data=f"{len(files)} images of {name}", rule=rule
    )
    results.announce(model, protocol)
    readable, pixels = _read(model, devices, files, protocol)
    seen = _look(model, devices, [files.names[i] for i in readable], pixels)
    scores = {"num_images": len(seen.names)}
    inputs = {"data": results.fingerprint(files)}
    result = results.result(
        model,
        "visualize",
        name,
        protocol,
        scores,
        inputs,
        num_unreadable=len(files) - len(readable),
    )
    folder = results.save(result, control=False)
    written = []
    if devices.rank == 0:
        cut = described_cut(protocol)
        sheet_legend = f"Images as the model gets them: {cut}. {_sheet_legend(seen)}"
        written = _write_sheets(seen, folder, sheet_legend)
        strength = _token_legend(threshold)
        if tokens:
            written += _write_tokens(seen, folder, strength, threshold)
        title = f"What {result.model} sees in {name}"
        legend = f"What the model gets of a photo: {cut}. {_sheet_legend(seen)}"
        photos = _photos(model, files, readable, protocol)
        page = render_visualize(title, seen, photos, legend, strength, threshold)
        replace_text(folder / PAGE, page)
        devices.say("\n".join(map(str, [*written, folder / PAGE])))
    devices.fabric.barrier()
    return written


def _find(data: str) -> tuple[str, ImageFiles]:
    path = Path(data)
    if path.is_file() and path.suffix.lower() not in BUILDERS:
        return path.stem, ImageFiles(path.parent, [path.name])
    return find_images(data)


def _decoder(model: FrozenModel, devices: Devices) -> Stellar | None:
    """The model with its decoder, None if it has none to show."""
    if not model.has_localization:
        devices.say(
            "No localization: clusters of patches take the place of tokens. No "
            "reconstruction."
        )
        return None
    if not model.has_decoder:
        devices.say("No reconstruction: the checkpoint has no decoder.")
        return None
    stellar = load_stellar(model)
    if stellar.target == "tokens" and stellar.tokenizer is None:
        devices.say("No reconstruction: the checkpoint comes without its tokenizer.")
        return None
    return stellar


def _look(
    model: FrozenModel, devices: Devices, names: Sequence[str], pixels: Tensor
) -> Seen:
    stellar = _decoder(model, devices)
    localizes = model.has_localization
    dense, localization, clusters, decoded = [], [], [], []
    batches = pixels.split(devices.batch_size)
    for images in devices.progress(batches, "images", len(batches)):
        images = devices.fabric.to_device(images)
        with torch.no_grad(), devices.fabric.autocast():
            result = model(images)
            dense.append(result.dense.float().cpu())
            if localizes:
                localization.append(result.localization.float().cpu())
            else:
                clusters.append(cluster_patches(result.dense, CLUSTERS, devices.seed))
            if stellar:
                size = (images.shape[-2], images.shape[-1])
                normalised = model.normalize(images)
                decoded.append(stellar.reconstruct(normalised, size).float().cpu())
                if not decoded[-1].isfinite().all():
                    raise not_finite("Reconstructions", devices.precision)
    return Seen(
        names,
        pixels.permute(0, 2, 3, 1).numpy(),
        torch.cat(dense),
        result.grid_size,
        torch.cat(localization) if localizes else None,
        None if localizes else torch.cat(clusters),
        to_pictures(torch.cat(decoded)) if stellar else None,
    )


def _read(
    model: FrozenModel, devices: Devices, files: ImageFiles, protocol: CropProtocol
) -> tuple[list[int], Tensor]:
    """Numbers and pixels of the readable images, all of them in every process."""
    transform = centre_crop(protocol, model.origin.interpolation)
    loader = devices.loader(EvaluationImages(files, transform), range(len(files)))
    batches = list(loader)
    readable = torch.cat([batch.readable for batch in batches])
    broken = (~readable).nonzero()[:, 0].tolist()
    if len(broken) == len(files):
        raise ValueError(
            f"None of the {len(files)} images in '{files.root}' is readable."
        )
    if broken:
        devices.say(f"Skipped: {unreadable_text(files, broken)}.")
    numbers = readable.nonzero()[:, 0].tolist()
    return numbers, torch.cat([batch.image for batch in batches])[readable]


def _photos(
    model: FrozenModel,
    files: ImageFiles,
    numbers: Sequence[int],
    protocol: CropProtocol,
) -> list[Uint8Array]:
    """What the model sees of images, in as many pixels as the files have, or so."""
    photos = []
    for number in numbers:
        image = read_image(files.source(number))
        # Never more than there are, or than a page has room for.
        there = min(image.shape[1:]) // protocol.resize
        factor = max(1, min(there, PHOTO_SIDE // protocol.crop))
        sizes = {k: getattr(protocol, k) * factor for k in ("resize", "crop")}
        cut = centre_crop(protocol.replace(**sizes), model.origin.interpolation)
        photos.append(cut(image).permute(1, 2, 0).numpy())
    return photos


def _sheet_legend(seen: Seen) -> str:
    """What the columns show, in words."""
    said = []
    if seen.localization is not None:
        said += [
            TOKEN_COLOURS,
            "By their lead: a patch has the colour of its strongest token, the more "
            "opaque the further that is ahead of the second; where two are level, the "
            "photo shows alone.",
            "Shares: how much of the image each token has.",
        ]
    if seen.clusters is not None:
        said.append(CLUSTER_COLOURS)
    said.append(
        "PCA: the first three components of the patches of all images as red, green "
        "and blue, each from its 1st to its 99th percentile."
    )
    if seen.decoded is not None:
        said.append("Reconstruction: from the tokens and where they are alone.")
    return " ".join(said)


def _write_sheets(seen: Seen, folder: Path, legend: str) -> list[Path]:
    columns = {k: enlarged(v) for k, v in sheet_columns(seen).items()}
    if seen.localization is not None:
        columns[SHARES_TITLE] = _shares(seen, columns["input"].shape[1:3])
    rows = []
    for i, name in enumerate(seen.names):
        titles = [name, *list(columns)[1:]]
        pictures = [pictures[i] for pictures in columns.values()]
        rows.append(list(zip(titles, pictures, strict=True)))
    written = []
    for start in range(0, len(rows), ROWS_PER_SHEET):
        path = folder / f"sheet_{start // ROWS_PER_SHEET + 1:02d}.png"
        with replacing(path) as new:
            draw_sheet(rows[start : start + ROWS_PER_SHEET], legend).save(new, "png")
        written.append(path)
    return written


def _shares(seen: Seen, size: tuple[int, int]) -> Uint8Array:
    assert seen.localization is not None
    num_patches = seen.localization.shape[1]
    masses = token_masses(seen.localization).tolist()
    return np.stack([draw_shares(of_image, num_patches, size) for of_image in masses])


def _token_legend(threshold: float | None) -> str:
    """What pictures of single tokens show, in words."""
    strength = (
        "none of it where the token has nothing, full at its maximum in the image, "
        "which the title says as part of a patch"
        if threshold is None
        else f"where the token has at least {threshold:g} of its maximum in the image"
    )
    return (
        f"Each token alone: its colour over the dimmed image, {strength}. "
        f"{TOKEN_COLOURS} Percent: the share of the image. A token that has less than "
        f"{ABSENT_PATCHES:g} of one patch in all is absent: nothing is in colour."
    )


def _write_tokens(
    seen: Seen, folder: Path, legend: str, threshold: float | None
) -> list[Path]:
    written = []
    for i, name in enumerate(seen.names):
        pictures = token_pictures(seen, i, threshold)
        pictures = {name: pictures.pop("input"), **pictures}
        titled = [(title, enlarged(picture)) for title, picture in pictures.items()]
        starts = range(0, len(titled), TOKEN_COLUMNS)
        path = folder / f"tokens_{i + 1:02d}_{Path(shown_name(name)).stem[:60]}.png"
        with replacing(path) as new:
            sheet = [titled[k : k + TOKEN_COLUMNS] for k in starts]
            draw_sheet(sheet, legend).save(new, "png")
        written.append(path)
    return written
