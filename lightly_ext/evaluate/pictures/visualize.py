"""`stellar visualize`: localization, patch features and reconstructions of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.data.streams.sources import BUILDERS
from lightly_ext.durable import replacing
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
    CLUSTER_TITLE,
    TOKEN_COLOURS,
    draw_shares,
    draw_sheet,
    enlarged,
    shown_name,
)
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.sizes import described_cut
from stellar_plugin import Stellar
from stellar_plugin.pca import pca_pictures
from stellar_plugin.protocols import CLUSTERS, VISUALIZE, CropProtocol
from stellar_plugin.visualize import (
    ABSENT_PATCHES,
    Uint8Array,
    check_threshold,
    highlight,
    overlay_localization,
    scale_maps,
    shown_mass,
    strongest_token,
    threshold_maps,
    to_pictures,
    token_maps,
    token_masses,
    token_palette,
    without_absent,
)

SHARES_TITLE = "shares of the image"
ROWS_PER_SHEET = 8
TOKEN_COLUMNS = 6


@dataclass(frozen=True)
class Seen:
    """Images, and what a model makes of them.

    Attributes:
        names:
            Names of the files.
        pictures:
            The images as the model gets them, uint8 (num_images, height, width, 3).
        dense:
            Patch features, float32 with shape (num_images, num_patches, dim).
        grid_size:
            Height and width of the patch grid.
        localization:
            Localization matrices, float32 with shape (num_images, num_patches,
            num_tokens), None for a model without.
        clusters:
            Cluster of each patch where there is no localization, int64 with shape
            (num_images, num_patches).
        decoded:
            Reconstructions like `pictures`, None for a model without decoder.
    """

    names: Sequence[str]
    pictures: Uint8Array
    dense: Tensor
    grid_size: tuple[int, int]
    localization: Tensor | None
    clusters: Tensor | None
    decoded: Uint8Array | None


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
    """Draws what a model sees in images: sheets with one row per image.

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
    seen, num_unreadable = _look(model, devices, files, protocol)
    scores = {"num_images": len(seen.names)}
    inputs = {"data": results.fingerprint(files)}
    result = results.result(
        model,
        "visualize",
        name,
        protocol,
        scores,
        inputs,
        num_unreadable=num_unreadable,
    )
    folder = results.save(result, control=False)
    written = []
    if devices.rank == 0:
        shown = f"Images as the model gets them: {described_cut(protocol)}."
        written = _write_sheets(seen, folder, shown)
        if tokens:
            written += _write_tokens(seen, folder, threshold)
        devices.say("\n".join(str(path) for path in written))
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
    model: FrozenModel, devices: Devices, files: ImageFiles, protocol: CropProtocol
) -> tuple[Seen, int]:
    names, pixels = _read(model, devices, files, protocol)
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
    seen = Seen(
        names,
        pixels.permute(0, 2, 3, 1).numpy(),
        torch.cat(dense),
        result.grid_size,
        torch.cat(localization) if localizes else None,
        None if localizes else torch.cat(clusters),
        to_pictures(torch.cat(decoded)) if stellar else None,
    )
    return seen, len(files) - len(names)


def _read(
    model: FrozenModel, devices: Devices, files: ImageFiles, protocol: CropProtocol
) -> tuple[list[str], Tensor]:
    """Names and pixels of the readable images, all of them in every process."""
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
    names = [files.names[i] for i in readable.nonzero()[:, 0].tolist()]
    return names, torch.cat([batch.image for batch in batches])[readable]


def sheet_columns(seen: Seen) -> dict[str, Uint8Array]:
    """Pictures of the sheets by the titles of their columns, in the size of the images.

    Args:
        seen:
            The images and what a model made of them.

    Returns:
        Arrays with shape (num_images, height, width, 3).
    """
    height, width = seen.pictures.shape[1:3]
    columns = {"input": seen.pictures}
    if seen.localization is not None:
        strongest = strongest_token(seen.localization)
        for title, matrix in {
            "tokens, by their lead": seen.localization,
            "strongest token": strongest,
        }.items():
            shown = overlay_localization(seen.pictures, matrix, seen.grid_size)
            columns[title] = shown
    if seen.clusters is not None:
        parts = F.one_hot(seen.clusters, CLUSTERS).float()
        shown = overlay_localization(seen.pictures, parts, seen.grid_size)
        columns[CLUSTER_TITLE] = shown
    columns["patch features, PCA"] = pca_pictures(
        seen.dense, seen.grid_size, (height, width)
    )
    if seen.decoded is not None:
        columns["reconstruction"] = seen.decoded
    return columns


def token_pictures(
    seen: Seen, number: int, threshold: float | None
) -> dict[str, Uint8Array]:
    """Each token of an image alone, how much of the image it has, and of a patch.

    Args:
        seen:
            The images and what a model made of them, localization included.
        number:
            Number of the image.
        threshold:
            As for `run_visualize`.

    Returns:
        Pictures with shape (height, width, 3) by their titles, the input first.
    """
    assert seen.localization is not None
    picture = seen.pictures[number]
    localization = seen.localization[number : number + 1]
    masses, num_patches = token_masses(localization[0]).tolist(), localization.shape[1]
    height, width = picture.shape[:2]
    present = without_absent(localization)
    maps = token_maps(present, seen.grid_size, (height, width))[0]
    peaks = maps.amax(dim=(1, 2)).tolist()
    maps = scale_maps(maps) if threshold is None else threshold_maps(maps, threshold)
    pictures = {"input": picture}
    for token, colour in enumerate(token_palette(len(maps))):
        title = f"token {token}, {shown_mass(masses[token], num_patches)}"
        if peaks[token]:
            title += f", maximum {peaks[token]:.2f}"
        pictures[title] = highlight(picture[None], maps[token, None], colour)[0]
    return pictures


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
    legend += f" {_sheet_legend(seen)}"
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


def _write_tokens(seen: Seen, folder: Path, threshold: float | None) -> list[Path]:
    strength = (
        "none of it where the token has nothing, full at its maximum in the image, "
        "which the title says as part of a patch"
        if threshold is None
        else f"where the token has at least {threshold:g} of its maximum in the image"
    )
    legend = (
        f"Each token alone: its colour over the dimmed image, {strength}. "
        f"{TOKEN_COLOURS} Percent: the share of the image. A token that has less than "
        f"{ABSENT_PATCHES:g} of one patch in all is absent: nothing is in colour."
    )
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
