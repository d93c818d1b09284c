"""Queries, and what each of them finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.reduction import reduce_sum
from lightly_ext.evaluate.retrieval.forms import Form
from lightly_ext.evaluate.retrieval.locations import Locations, any_parts
from lightly_ext.evaluate.retrieval.ranking import (
    average_precision,
    likeness,
    queries_at_once,
    ranked,
)


@dataclass(frozen=True)
class Asked:
    """The queries.

    Attributes:
        files:
            All readable images.
        labels:
            Their classes, int64 (num_images,).
        numbers:
            Numbers of the images that are queries, int64 (num_queries,).
        order:
            All numbers, in the order that decides between equal scores.
    """

    files: ImageFiles
    labels: Tensor
    numbers: Tensor
    order: Tensor

    @classmethod
    def of(cls, devices: Devices, files: ImageFiles, queries: int | None) -> Asked:
        """Queries of readable images.

        Raises:
            RuntimeError: If no image has another one of its class.
        """
        labels = files.label_tensor
        numbers = with_relevant(labels)
        alone = len(labels) - len(numbers)
        if alone:
            devices.say(f"No queries: {alone} images without another of their class.")
        if not len(numbers):
            raise RuntimeError("No readable image has another one of its class.")
        if queries is not None and queries < len(numbers):
            numbers = numbers[torch.arange(queries) * len(numbers) // queries]
        generator = torch.Generator().manual_seed(devices.seed)
        order = torch.randperm(len(labels), generator=generator)
        return cls(files, labels, numbers, order)

    @property
    def num_alone(self) -> int:
        """Number of images without another of their class, which are no queries."""
        return len(self.labels) - len(with_relevant(self.labels))

    @property
    def num_relevant(self) -> Tensor:
        """Number of other images of the class of each query."""
        return torch.bincount(self.labels)[self.labels[self.numbers]] - 1


class Measured(NamedTuple):
    """What was found by each image that is a query; of the others zeros.

    Attributes:
        precision: Average precision, float64 (num_images,), as all others.
        answers: Number of answers that a location was scored on.
        hits: How many of these have the region where the object is.
        right: How many of the answers are of the query's class.
        right_hits: How many of those have the region there.
        oracle: How many of the answers have any part there; NaN without parts.
    """

    precision: Tensor
    answers: Tensor
    hits: Tensor
    right: Tensor
    right_hits: Tensor
    oracle: Tensor


def with_relevant(labels: Tensor) -> Tensor:
    """Numbers of the images with another one of their class."""
    return (torch.bincount(labels)[labels] > 1).nonzero().flatten()


def measure(
    devices: Devices,
    name: str,
    form: Form,
    asked: Asked,
    locations: Locations | None,
    neighbours: int,
) -> Measured:
    """Asks the queries of all processes.

    Args:
        devices:
            Where it runs.
        name:
            Name of the form, for the progress bar.
        form:
            The images.
        asked:
            The queries.
        locations:
            Where the objects are; None scores no location.
        neighbours:
            Number of answers that a location is scored on.
    """
    found = torch.zeros(len(Measured._fields), len(form), dtype=torch.float64)
    best = None if locations is None else any_parts(locations, form)
    mine = asked.numbers[devices.rank :: devices.world_size]
    blocks = mine.split(queries_at_once(form))
    for chosen in devices.progress(blocks, name, len(blocks)):
        shares = [
            None if locations is None else locations.asked(i, form.grid_size)
            for i in chosen.tolist()
        ]
        vectors = form.vectors(chosen.numpy())
        weights = form.weights(chosen.numpy())
        inside = torch.stack(
            [
                torch.zeros_like(w) if s is None else form.weights_in(i, s)
                for i, s, w in zip(chosen.tolist(), shares, weights, strict=True)
            ]
        )
        scores = likeness(form, vectors, torch.stack([weights, inside]))
        scores[:, range(len(chosen)), chosen] = -torch.inf  # no image finds itself
        ranks = ranked(scores[0], asked.order)
        relevant = asked.labels[ranks] == asked.labels[chosen][:, None]
        relevant &= ranks != chosen[:, None]
        found[0, chosen] = average_precision(relevant)
        if locations is None:
            continue
        scores[1, :, ~locations.known] = -torch.inf
        answers = ranked(scores[1], asked.order)[:, :neighbours]
        for i, number in enumerate(chosen.tolist()):
            if shares[i] is None:
                continue
            regions = form.regions(vectors[i], inside[i], answers[i].numpy())
            found[1:, number] = _located(
                asked, locations, best, number, answers[i], regions
            )
    return Measured(*reduce_sum(devices, found))


def _located(
    asked: Asked,
    locations: Locations,
    best: Tensor | None,
    number: int,
    answers: Tensor,
    regions: Tensor,
) -> Tensor:
    """The numbers of `Measured` but for the first, of one query."""
    hits = torch.stack(
        [
            locations.hits(answer, region[None])[0]
            for answer, region in zip(answers.tolist(), regions, strict=True)
        ]
    )
    right = asked.labels[answers] == asked.labels[number]
    oracle = torch.nan if best is None else best[answers].sum()
    sums = [len(answers), hits.sum(), right.sum(), (hits & right).sum(), oracle]
    return torch.tensor(sums, dtype=torch.float64)
