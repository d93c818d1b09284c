"""Images that find images of their class and, in them, the object."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.annotations import find_boxes
from lightly_ext.evaluate.datasets import find_labelled_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.reduction import reduce_sum
from lightly_ext.evaluate.report.scores import RETRIEVAL_MEASURES
from lightly_ext.evaluate.result import (
    RESULT_NAME,
    Result,
    is_untrained,
    markdown_table,
)
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.retrieval.forms import (
    Form,
    form_arrays,
    form_shapes,
    open_form,
)
from lightly_ext.evaluate.retrieval.locations import (
    Locations,
    any_parts,
    whole_crops,
)
from lightly_ext.evaluate.retrieval.ranking import (
    average_precision,
    expected_seconds,
    likeness,
    queries_at_once,
    random_precision,
    ranked,
)
from stellar_plugin.hashes import file_sha256
from stellar_plugin.protocols import CLUSTERS, RETRIEVAL, RETRIEVAL_FORMS

TABLE_NAME, CLASSES_NAME = "table.md", "classes.csv"
# From there on a user is told how long comparisons take.
LONG = 120.0


def check_retrieval(
    results: Results,
    data: str,
    boxes: str | None,
    by: list[str] | None,
    queries: int | None,
    clusters: int,
    neighbours: int,
) -> tuple[str, ImageFiles, list[Tensor] | None]:
    """Finds images, their name and their boxes; see `Results.required`."""
    check_positive(queries=queries, clusters=clusters, neighbours=neighbours)
    unknown = [name for name in by or () if name not in RETRIEVAL_FORMS]
    if unknown or by == []:
        raise ValueError(f"by must be some of {', '.join(RETRIEVAL_FORMS)}, got {by}.")
    name, files = find_labelled_images(data, results.limit)
    labels = files.label_tensor
    if len(files.classes) < 2:
        raise ValueError(
            f"'{files.root}' has one class, '{files.classes[0]}': every order of its "
            "images is right. Name a folder with a subfolder of images per class."
        )
    if not len(_with_relevant(labels)):
        raise ValueError(
            f"None of the {len(files)} images in '{files.root}' has another one of its "
            "class to find: name more images, or a larger --limit."
        )
    found = None if boxes is None else find_boxes(files, boxes)
    _check_boxes(found, boxes, neighbours)
    return name, files, found


@evaluation
def run_retrieval(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    boxes: str | None = None,
    by: list[str] | None = None,
    queries: int | None = None,
    clusters: int = CLUSTERS,
    neighbours: int = RETRIEVAL.neighbours,
) -> Result:
    """Every image finds the others, by tokens and by what stands for an image else.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder with a folder of images per class; or one with `train` and `val` or
            `test`, or the name of a known set, of which the test part is taken.
        boxes:
            File with the boxes of objects: JSON of COCO, or CSV `file,x0,y0,x1,y1` in
            px, inclusive. None scores no location.
        by:
            What stands for an image: some of tokens, cls, mean_token, mean_patch,
            patches, clusters, pixels, colours. None takes all that the model has.
        queries:
            Ask so many images only, spread evenly; they still rank all others.
        clusters:
            Number of k-means clusters of patches.
        neighbours:
            Number of answers that a location is scored on.

    Returns:
        The scores, see `stellar_plugin.protocols.RETRIEVAL`: "tokens_map",
        "tokens_location", ...; and the same of the others.

    Raises:
        ValueError: If an option or the data set is impossible, or the model does not
            have what `by` names.
        RuntimeError: If too many images are unreadable, or features are not finite.
    """
    name, files, found = results.required(check_retrieval)
    parts = RETRIEVAL.parts.replace(str(CLUSTERS), str(clusters))
    protocol = results.protocol(
        model, RETRIEVAL, data=name, parts=parts, neighbours=neighbours
    )
    shapes = _chosen_shapes(model, devices, protocol.crop, by, clusters)
    results.announce(model, protocol)
    if found is None:
        devices.say("No location score: --boxes names no file with boxes of objects.")
    _say_time(devices, shapes, min(queries or len(files), len(files)), len(files))
    kind = f"retrieval {', '.join(shapes)}; {parts} by seed {devices.seed}"
    cached = FeatureCache(model, devices, results.cache).features(
        files,
        protocol,
        kind,
        form_arrays(model, list(shapes), clusters, devices.seed),
    )
    readable = files[cached.readable.tolist()]
    if found is not None:
        found = [found[i] for i in cached.readable.tolist()]
        _check_boxes(found, boxes, neighbours)
    asked = Asked.of(devices, readable, queries)
    locations = found and Locations.of(readable, found, protocol)
    grid_size = model.map_size(protocol.crop)
    measured = {}
    for form_name in shapes:
        form = open_form(form_name, cached, grid_size, protocol.crop, devices.device)
        measured[form_name] = _measure(
            devices, form_name, form, asked, locations or None, neighbours
        )
    counts = _counts(measured, asked, locations is not None)
    if not counts.get("num_located_queries", 1):
        raise RuntimeError(
            f"No query has anything of a box of '{boxes}' in its crop: leave --boxes "
            "out, or name other images."
        )
    scores, errors = _scores(measured, asked, locations is not None)
    inputs = {"data": results.fingerprint(files)}
    if boxes is not None:
        inputs["boxes"] = file_sha256(Path(boxes))
    result = results.result(
        model,
        "retrieval",
        name,
        protocol,
        {**scores, **counts},
        inputs,
        _chance(list(shapes), asked, locations or None, protocol.crop),
        standard_error=errors,
        num_unreadable=cached.num_unreadable,
        num_alone=len(readable) - len(_with_relevant(asked.labels)),
        num_reused=cached.num_reused,
    )
    folder = results.save(result)
    table = retrieval_table(Result.load(folder / RESULT_NAME), list(shapes))
    devices.say(f"\n{table}\n")
    if devices.rank == 0:
        replace_text(folder / TABLE_NAME, f"{table}\n")
        replace_text(folder / CLASSES_NAME, _classes_csv(measured, asked))
    return result


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
        numbers = _with_relevant(labels)
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


def retrieval_table(result: Result, names: Sequence[str]) -> str:
    """The scores as a Markdown table: a row for each form of an image.

    Args:
        result:
            The result, with chance and the untrained scores.
        names:
            The forms.
    """
    found = {
        measure: title
        for measure, title in RETRIEVAL_MEASURES.items()
        if any(f"{name}_{measure}" in result.scores for name in names)
        and measure != "query_map"
    }
    untrained = [] if is_untrained(result) else ["untrained"]
    head = [result.model]
    for title in found.values():
        head += [title, *(f"{title}, {u}" for u in untrained)]
    rows = [head]
    for name in names:
        rows.append([name])
        for measure in found:
            for scores in (result.scores, result.untrained)[: 1 + len(untrained)]:
                rows[-1].append(_percent(scores.get(f"{name}_{measure}")))
    chance = [result.chance.get(f"{names[0]}_{measure}") for measure in found]
    rows.append(["chance"])
    for value in chance:
        rows[-1] += [_percent(value), *([""] * len(untrained))]
    return markdown_table(rows)


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _with_relevant(labels: Tensor) -> Tensor:
    """Numbers of the images with another one of their class."""
    return (torch.bincount(labels)[labels] > 1).nonzero().flatten()


def _check_boxes(
    boxes: Sequence[Tensor] | None, path: str | None, neighbours: int
) -> None:
    num = sum(map(bool, map(len, boxes or ())))
    if boxes is not None and num <= neighbours:
        raise ValueError(
            f"'{path}' has boxes of {num} of the images, so that no query has "
            f"{neighbours} answers with a box: name fewer with --neighbours."
        )


def _chosen_shapes(
    model: FrozenModel,
    devices: Devices,
    crop: int,
    by: Sequence[str] | None,
    clusters: int,
) -> dict[str, tuple[int, int]]:
    """Shapes of the forms that are scored; those that a model lacks are told."""
    shapes, missing = form_shapes(model, crop, clusters)
    wanted = [name for name in by or () if name in missing]
    texts = [f"{name} ({missing[name]})" for name in (wanted or missing)]
    if wanted:
        raise ValueError(f"'{model.origin.label}' does not have {', '.join(texts)}.")
    if texts and by is None:
        devices.say(f"{model.origin.name} does not have {', '.join(texts)}.")
    return {name: s for name, s in shapes.items() if by is None or name in by}


def _say_time(
    devices: Devices,
    shapes: dict[str, tuple[int, int]],
    num_queries: int,
    num_images: int,
) -> None:
    for name, shape in shapes.items():
        share = -(-num_queries // devices.world_size)
        seconds = expected_seconds(shape, share, num_images, devices.device)
        if seconds > LONG:
            devices.say(
                f"{name}: to compare {num_queries} x {num_images} images of {shape[0]} "
                f"vectors takes about {seconds / 60:.0f} minutes. Fewer: --queries N "
                f"asks N images, --limit N uses N, --by leaves {name} out."
            )


def _measure(
    devices: Devices,
    name: str,
    form: Form,
    asked: Asked,
    locations: Locations | None,
    neighbours: int,
) -> Measured:
    """Asks the queries of all processes."""
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
            if shares[i] is not None:
                found[1:, number] = _located(
                    form, asked, locations, best, number, answers[i],
                    form.regions(vectors[i], inside[i], answers[i].numpy()),
                )  # fmt: skip
    return Measured(*reduce_sum(devices, found))


def _located(
    form: Form,
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


def _scores(
    measured: dict[str, Measured], asked: Asked, located: bool
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Scores, and standard errors of those that are means over queries."""
    scores: dict[str, float | None] = {}
    errors = {}
    for name, of in measured.items():
        precision = of.precision[asked.numbers]
        scores[f"{name}_map"] = float(_class_means(precision, asked).mean())
        scores[f"{name}_query_map"] = float(precision.mean())
        errors[f"{name}_query_map"] = _standard_error(precision)
        if not located:
            continue
        of_located = Measured(*(v[of.answers > 0] for v in of))
        shares = of_located.hits / of_located.answers
        scores[f"{name}_location"] = float(shares.mean())
        errors[f"{name}_location"] = _standard_error(shares)
        right = float(of_located.right.sum())
        scores[f"{name}_location_of_class"] = (
            float(of_located.right_hits.sum()) / right if right else None
        )
        oracle = of_located.oracle / of_located.answers
        if not oracle.isnan().any():
            scores[f"{name}_location_oracle"] = float(oracle.mean())
    return scores, errors


def _class_means(values: Tensor, asked: Asked) -> Tensor:
    """Means of a value of each query over the classes of queries, float64."""
    labels = asked.labels[asked.numbers]
    sums = torch.bincount(labels, values.double(), minlength=len(asked.files.classes))
    counts = torch.bincount(labels, minlength=len(asked.files.classes))
    return sums[counts > 0] / counts[counts > 0]


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _counts(
    measured: dict[str, Measured], asked: Asked, located: bool
) -> dict[str, int]:
    counts = {"num_images": len(asked.files), "num_queries": len(asked.numbers)}
    if located:
        of = next(iter(measured.values()))
        counts["num_located_queries"] = int((of.answers > 0).sum())
    return counts


def _chance(
    names: Sequence[str], asked: Asked, locations: Locations | None, crop: int
) -> dict[str, float]:
    """A random order; and of a random image with a box, the whole crop."""
    precision = random_precision(asked.num_relevant, len(asked.files) - 1)
    levels = {
        "map": float(_class_means(precision, asked).mean()),
        "query_map": float(precision.mean()),
    }
    if locations is not None:
        known = locations.known
        hits = whole_crops(locations, crop)[known].double()
        levels["location"] = float(hits.mean())
    return {f"{name}_{measure}": v for name in names for measure, v in levels.items()}


def _classes_csv(measured: dict[str, Measured], asked: Asked) -> str:
    """Mean average precision of every class."""
    labels = asked.labels[asked.numbers]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["class", "num_queries", *(f"{name}_map" for name in measured)])
    means = [
        _class_means(of.precision[asked.numbers], asked) for of in measured.values()
    ]
    found = labels.unique()
    for i, label in enumerate(found.tolist()):
        values = [f"{float(m[i]):.6f}" for m in means]
        rows.writerow(
            [asked.files.classes[label], int((labels == label).sum()), *values]
        )
    return text.getvalue()
