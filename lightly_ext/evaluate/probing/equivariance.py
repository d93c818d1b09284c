"""Shifted crops: does S stay, does L move? The paper's section 5.1, experiment 1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, centre_crop
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
from lightly_ext.loss import match_tokens
from stellar_plugin.protocols import EQUIVARIANCE, EQUIVARIANCE_SHIFTS, CropProtocol

DIRECTIONS = ("horizontal", "vertical")
MEAN = "mean"
CURVES = (MEAN, *DIRECTIONS)
OTHER = "other_image"
MOVED_BACK = "moved_back"
# What is measured, how the image changed, by how many px.
Key = tuple[str, str, int]


class Factors(NamedTuple):
    """What images are made of, and where.

    Attributes:
        sparse: S, with shape (batch_size, num_queries, embed_dim).
        localization: L, with shape (batch_size, num_patches, num_queries), None where
            tokens are nowhere.
    """

    sparse: Tensor
    localization: Tensor | None


def check_equivariance(results: Results, data: str) -> tuple[str, ImageFiles]:
    """Finds the images and their name; see `Results.required`."""
    name, files = find_images(data, limit=results.limit)
    require_pairs(files)
    return name, files


@evaluation
def run_equivariance(
    model: FrozenModel, devices: Devices, results: Results, data: str
) -> Result:
    """Measures how S and L change when the crop shifts.

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

    Returns:
        The scores, `change_of_s` and `change_of_l` by shift in px, the mean of both
        directions, and each by itself; `..._other_image`, the change against another
        image; `change_of_l_moved_back`, where a shift is one patch, against L moved by
        one patch; `identity_matches`, the share of tokens that keep their number. Of
        tokens that are nowhere, as TiTok's, all but the changes of L.

    Raises:
        ValueError: If the model has no S, or is STELLAR and has no L, or a crop does
            not fit into an image.
    """
    name, files = results.required(check_equivariance)
    if model.origin.is_stellar or not model.num_queries:
        model.require_localization()
    elif not model.has_localization:
        devices.say("The tokens have no localization: only changes of S are measured.")
    protocol = results.protocol(model, EQUIVARIANCE, data=name)
    if results.sizes["resize"] is None:  # the size of the model may leave no room
        protocol = protocol.replace(resize=max(protocol.resize, _side(protocol)))
    window = _window(protocol)
    patch = _patch_size(model, protocol)
    results.announce(model, protocol)
    images = EvaluationImages(files, centre_crop(window, model.origin.interpolation))
    measure = partial(_add_batch, model, patch)
    means, num_unreadable = measure_pairs(
        devices, images, _keys(model, patch), "shifts", measure
    )
    result = results.result(
        model,
        "equivariance",
        name,
        protocol,
        {**_scores(means), "num_images": len(files) - num_unreadable},
        {"data": results.fingerprint(files)},
        standard_error=_scores(means, error=True),
        num_unreadable=num_unreadable,
    )
    folder = results.save(result)
    if devices.rank == 0:
        _plot(folder / "equivariance.png", means, f"{result.model} on {name}")
    return result


def match_factors(reference: Factors, other: Factors) -> tuple[Factors, Tensor]:
    """Brings the tokens of other images into the order of the reference.

    Tokens are matched by optimal transport [0]; the columns of L follow.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (eq. 8 and section 5.1)

    Args:
        reference:
            S and L of the reference.
        other:
            S and L of the other images, of the same shapes.

    Returns:
        - S'[match] and L'[:, match].
        - The match: for each token the number of the other one, int64 with shape
          (batch_size, num_queries).
    """
    match = match_tokens(reference.sparse, other.sparse).indices
    rows = match[..., None].expand_as(other.sparse)
    sparse, localization = other.sparse.gather(1, rows), other.localization
    if localization is not None:
        columns = match[:, None].expand_as(localization)
        localization = localization.gather(2, columns)
    return Factors(sparse, localization), match


def relative_change(reference: Tensor, other: Tensor) -> Tensor:
    """||other - reference||_F / ||reference||_F of each image.

    Args:
        reference:
            Tensor with shape (batch_size, ...).
        other:
            Tensor with the same shape.

    Returns:
        float64 tensor with shape (batch_size,).
    """
    reference, other = reference.double().flatten(1), other.double().flatten(1)
    return (other - reference).norm(dim=1) / reference.norm(dim=1)


def moved_back_change(
    reference: Tensor, other: Tensor, grid_size: tuple[int, int], direction: str
) -> Tensor:
    """Relative change of L after a shift by one patch, against L moved by one patch.

    Only patches that both crops have count: where all else stays, the change is 0.

    Args:
        reference:
            Localization matrices with shape (batch_size, num_patches, num_queries).
        other:
            Those of crops one patch further right, or down, with matched columns.
        grid_size:
            Height and width of the patch grid.
        direction:
            "horizontal" or "vertical".

    Returns:
        float64 tensor with shape (batch_size,).
    """
    axis = 2 if direction == "horizontal" else 1
    before, after = (x.unflatten(1, grid_size) for x in (reference, other))
    size = before.shape[axis] - 1
    return relative_change(before.narrow(axis, 1, size), after.narrow(axis, 0, size))


def _side(protocol: CropProtocol) -> int:
    """Side in px of the square that holds all shifted crops."""
    return protocol.crop + max(EQUIVARIANCE_SHIFTS)


def _window(protocol: CropProtocol) -> CropProtocol:
    """The protocol whose crop holds all shifted crops."""
    side = _side(protocol)
    if protocol.resize < side:
        raise ValueError(
            f"A crop of {protocol.crop} px that shifts by {max(EQUIVARIANCE_SHIFTS)} px"
            f" needs images of {side} px, resize is {protocol.resize}: resize to at "
            f"least {side} or crop less."
        )
    return protocol.replace(crop=side)


def _patch_size(model: FrozenModel, protocol: CropProtocol) -> int | None:
    """Side of a patch in px, None where no shift by one can be measured."""
    if not model.has_localization:
        return None
    crop = protocol.crop
    blank = torch.zeros(1, 3, crop, crop, device=model.mean.device)
    rows, columns = model(blank).grid_size
    patch = crop // columns
    if patch * columns != crop or rows != columns or columns == 1:
        return None
    return patch if patch <= max(EQUIVARIANCE_SHIFTS) else None


def _keys(model: FrozenModel, patch: int | None) -> list[Key]:
    shifts = (0, *EQUIVARIANCE_SHIFTS)
    factors = ("s", "l") if model.has_localization else ("s",)
    curves = [(what, where) for what in factors for where in CURVES]
    keys = [(*key, px) for key in [*curves, ("identity", MEAN)] for px in shifts]
    keys += [(what, OTHER, 0) for what in factors]
    return keys + ([("l", MOVED_BACK, patch)] if patch is not None else [])


def _add_batch(
    model: FrozenModel,
    patch: int | None,
    windows: Tensor,
    readable: Tensor,
    means: ImageMeans[Key],
) -> None:
    reference = _factors(model, windows, DIRECTIONS[0], 0)
    for px in (0, *EQUIVARIANCE_SHIFTS):
        across, down = (
            _changes(reference, _factors(model, windows, direction, px))
            for direction in DIRECTIONS
        )
        for what in across:
            both = (across[what] + down[what]) / 2
            means.add((what, MEAN, px), both[readable])
            if what != "identity":
                for direction, values in zip(DIRECTIONS, (across, down), strict=True):
                    means.add((what, direction, px), values[what][readable])
    if patch is not None:
        back = _moved_back(model, windows, reference, patch)
        means.add(("l", MOVED_BACK, patch), back[readable])
    one, two = partners(readable)
    changes = _changes(_rows(reference, one), _rows(reference, two))
    for what in changes.keys() - {"identity"}:
        means.add((what, OTHER, 0), changes[what])


def _rows(factors: Factors, numbers: Tensor) -> Factors:
    """Those of some images."""
    sparse, localization = factors
    return Factors(
        sparse[numbers], None if localization is None else localization[numbers]
    )


def _changes(reference: Factors, other: Factors) -> dict[str, Tensor]:
    """Change of S, of L, share of identical matches: float64 (batch_size,) each."""
    matched, match = match_factors(reference, other)
    same = match == torch.arange(match.shape[1], device=match.device)
    changes = {
        "s": relative_change(reference.sparse, matched.sparse),
        "identity": same.double().mean(dim=1),
    }
    before, after = reference.localization, matched.localization
    if before is not None and after is not None:
        changes["l"] = relative_change(before, after)
    return changes


def _moved_back(
    model: FrozenModel, windows: Tensor, reference: Factors, patch: int
) -> Tensor:
    """Mean of `moved_back_change` over both directions."""
    side = (windows.shape[-1] - max(EQUIVARIANCE_SHIFTS)) // patch
    changes = []
    for direction in DIRECTIONS:
        other = _factors(model, windows, direction, patch)
        after = match_factors(reference, other)[0].localization
        before = reference.localization
        assert before is not None and after is not None
        changes.append(moved_back_change(before, after, (side, side), direction))
    return (changes[0] + changes[1]) / 2


def _factors(model: FrozenModel, windows: Tensor, direction: str, px: int) -> Factors:
    """Factors of crops px to the right of the upper left corner, or below it."""
    side = windows.shape[-1] - max(EQUIVARIANCE_SHIFTS)
    left, top = (px, 0) if direction == "horizontal" else (0, px)
    result = model(windows[..., top : top + side, left : left + side])
    localization = result.localization.float() if model.has_localization else None
    return Factors(result.sparse.float(), localization)


def _curve(
    means: Mapping[Key, Mean], what: str, direction: str, error: bool = False
) -> dict[float, float]:
    """A number by shift in px, or its standard error."""
    return {
        px: mean.standard_error if error else mean.value
        for (name, where, px), mean in means.items()
        if (name, where) == (what, direction)
    }


def _scores(means: Mapping[Key, Mean], error: bool = False) -> dict[str, Any]:
    """Scores by name, or their standard errors."""
    scores: dict[str, Any] = {}
    for what, direction, _ in means:
        name = "identity_matches" if what == "identity" else f"change_of_{what}"
        name = name if direction == MEAN else f"{name}_{direction}"
        curve = _curve(means, what, direction, error)
        keyed = {str(px): value for px, value in curve.items()}
        scores[name] = curve[0] if direction == OTHER else keyed
    return scores


def _plot(path: Path, means: Mapping[Key, Mean], title: str) -> None:
    factors = [what for what, where, _ in means if where == OTHER]
    names = {
        f"{what.upper()}, {direction}": (what, direction)
        for what in factors
        for direction in DIRECTIONS
    }
    series = {name: _curve(means, *key) for name, key in names.items()}
    if back := _curve(means, "l", MOVED_BACK):
        series["L, moved back by a patch"] = back
    save_line_plot(
        path,
        series,
        "shift in px",
        "relative change",
        errors={name: _curve(means, *key, error=True) for name, key in names.items()},
        references={
            f"{what.upper()}, another image": means[what, OTHER, 0].value
            for what in factors
        },
        title=title,
    )
