"""Features under random crops. The paper's section 5.1, experiment 2."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop, resize

from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel, check_feature_name
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, Sample
from lightly_ext.evaluate.loading import load_like
from lightly_ext.evaluate.plots import save_line_plot
from lightly_ext.evaluate.reduction import (
    ImageMeans,
    Mean,
    measure_pairs,
    partners,
    require_pairs,
)
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.protocols import (
    STABILITY,
    STABILITY_SCALES,
    CropProtocol,
    StabilityProtocol,
)

Means = Mapping[float, Mean]
OTHER = math.inf  # "scale" of another image


def check_stability(
    results: Results, data: str, features: str
) -> tuple[str, ImageFiles]:
    """Finds the images and their name; see `Results.required`."""
    check_feature_name(features)
    name, files = find_images(data, limit=results.limit)
    require_pairs(files)
    return name, files


@evaluation
def run_stability(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: str = "auto",
    against: list[str] | None = None,
) -> list[Result]:
    """Measures how much features change when a part of the image is all there is.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder of images, or tars, parquet or hf:NAME of the hub; or the name of a
            known set.
        features:
            Feature of the model: sparse, dense, cls, cls+dense or lowrank, "auto" as in
            the paper: sparse where it has latent queries, else dense.
        against:
            Other models in one plot with the first, an option for each; named as
            `model` is, their features are "auto".

    Returns:
        One result per model, the first model first; the plot is stored with that one,
        named by the others. Scores are `cosine_distance` by the scale of the crop, and
        `cosine_distance_other_image`: features that are all alike are stable too.

    Raises:
        ValueError: If a model does not have the feature, or the crop is larger than
            the image.
    """
    name, files = results.required(check_stability)
    # All models first: what is wrong with the last one must not come out at the end.
    runs = {_label(model, features): (model, features)}
    for source in against or []:
        other = load_like(model, source)
        label = _label(other, "auto")
        if label in runs:
            raise ValueError(
                f"'{source}' would be a second '{label}' in the plot: rename its "
                "file or folder."
            )
        runs[label] = (other, "auto")
    protocols = {
        label: results.protocol(run, STABILITY, data=name, features=asked)
        for label, (run, asked) in runs.items()
    }
    found, curves = [], {}
    for label, (run, _) in runs.items():
        protocol = protocols[label]
        results.announce(run, protocol)
        result, curves[label] = _run_model(run, results, name, files, protocol)
        found.append(result)
    if devices.rank == 0:
        others = "".join(f"-{result.digest}" for result in found[1:])
        _plot(results.folder(found[0]) / f"stability{others}.png", curves, name)
    return found


class ScaledCrops(EvaluationImages):
    """An image as a whole and random crops of it, the same for every model.

    What is drawn follows from the seed and the name of the file: not from the process,
    the batch or the other images.

    Args:
        files:
            The images.
        protocol:
            Says `resize` and `crop`.
        scales:
            Areas of the crops, as fractions of the image's centre square.
        interpolation:
            "bicubic" or "bilinear", of the model.
        seed:
            Decides on the crops.
    """

    def __init__(
        self,
        files: ImageFiles,
        protocol: CropProtocol,
        scales: Sequence[float],
        interpolation: str,
        seed: int,
    ) -> None:
        super().__init__(files, self._views)
        self.resize, self.crop = protocol.resize, protocol.crop
        self.seed = seed
        self.mode = InterpolationMode(interpolation)
        self.crops = [
            v2.RandomResizedCrop(
                self.crop,
                scale=(scale, scale),
                # Within a square, so that no draw is too wide or too high.
                ratio=(max(3 / 4, scale), min(4 / 3, 1 / scale)),
                interpolation=self.mode,
                antialias=True,
            )
            for scale in scales
        ]

    def __getitem__(self, index: int) -> Sample:
        """Reads an image: views with shape (1 + num_scales, 3, crop, crop)."""
        name = self.files.names[index].encode(errors="surrogateescape")
        state = np.random.SeedSequence((self.seed, zlib.crc32(name)))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(state.generate_state(1)[0]))
            return super().__getitem__(index)

    def _views(self, image: Tensor) -> Tensor:
        side = round(min(image.shape[-2:]) * self.crop / self.resize)
        square = center_crop(image, [side, side])
        whole = resize(square, [self.crop, self.crop], self.mode, antialias=True)
        return torch.stack([whole, *(crop(square) for crop in self.crops)])


def cosine_distance(features: Tensor, reference: Tensor) -> Tensor:
    """1 - cosine similarity of rows, float64 with shape (batch_size,).

    Args:
        features:
            Tensor with shape (batch_size, dim).
        reference:
            Tensor with the same shape.
    """
    similarity = F.cosine_similarity(features.double(), reference.double(), dim=1)
    return (1 - similarity).clamp_min(0)  # below is rounding


def _feature(model: FrozenModel, features: str) -> str:
    if features == "auto":
        return "sparse" if model.num_queries else "dense"
    return model.resolve_feature(features)


def _label(model: FrozenModel, features: str) -> str:
    return f"{model.origin.name}, {_feature(model, features)}"


def _run_model(
    model: FrozenModel,
    results: Results,
    data: str,
    files: ImageFiles,
    protocol: StabilityProtocol,
) -> tuple[Result, Means]:
    devices, feature = results.devices, _feature(model, protocol.features)
    interpolation = model.origin.interpolation
    images = ScaledCrops(files, protocol, STABILITY_SCALES, interpolation, devices.seed)

    def measure(views: Tensor, readable: Tensor, means: ImageMeans[float]) -> None:
        reference = model.pooled(views[:, 0], feature)
        for i, scale in enumerate(STABILITY_SCALES):
            features = model.pooled(views[:, i + 1], feature)
            means.add(scale, cosine_distance(features, reference)[readable])
        one, two = partners(readable)
        means.add(OTHER, cosine_distance(reference[one], reference[two]))

    names = (*STABILITY_SCALES, OTHER)
    means, num_unreadable = measure_pairs(
        devices, images, names, model.origin.name, measure
    )
    scores = {
        "cosine_distance": {str(s): means[s].value for s in STABILITY_SCALES},
        "cosine_distance_other_image": means[OTHER].value,
        "num_images": len(files) - num_unreadable,
    }
    result = results.result(
        model,
        "stability",
        data,
        protocol,
        scores,
        {"data": results.fingerprint(files)},
        features=feature,
        standard_error={str(s): means[s].standard_error for s in STABILITY_SCALES},
        num_unreadable=num_unreadable,
    )
    results.save(result)
    return result, means


def _plot(path: Path, curves: Mapping[str, Means], data: str) -> None:
    save_line_plot(
        path,
        {
            label: {scale: means[scale].value for scale in STABILITY_SCALES}
            for label, means in curves.items()
        },
        "area of the crop",
        "cosine distance",
        errors={
            label: {scale: means[scale].standard_error for scale in STABILITY_SCALES}
            for label, means in curves.items()
        },
        references={label: means[OTHER].value for label, means in curves.items()},
        title=f"on {data}; dashed: another image",
    )
