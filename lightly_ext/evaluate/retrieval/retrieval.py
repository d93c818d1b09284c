"""Images that find images of their class and, in them, the object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.annotations import find_boxes
from lightly_ext.evaluate.datasets import find_labelled_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.result import RESULT_NAME, Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.retrieval.forms import form_arrays, form_shapes, open_form
from lightly_ext.evaluate.retrieval.locations import Locations
from lightly_ext.evaluate.retrieval.queries import Asked, measure, with_relevant
from lightly_ext.evaluate.retrieval.ranking import expected_seconds
from lightly_ext.evaluate.retrieval.scores import (
    chance_levels,
    classes_csv,
    form_scores,
    retrieval_table,
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
        raise ValueError(
            f"by must be some of {', '.join(RETRIEVAL_FORMS)}, each with a --by of its "
            f"own, got {by}."
        )
    name, files = find_labelled_images(data, results.limit)
    labels = files.label_tensor
    if len(files.classes) < 2:
        raise ValueError(
            f"'{files.root}' has one class, '{files.classes[0]}': every order of its "
            "images is right. Name a folder with a subfolder of images per class."
        )
    if not len(with_relevant(labels)):
        raise ValueError(
            f"None of the {len(files)} images in '{files.root}' has another one of its "
            "class to find: name more images, or a larger --limit."
        )
    if boxes is None:
        return name, files, None
    found = find_boxes(files, boxes)
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
            Folder with a folder of images per class, or labelled tars or parquet; or
            one with `train` and `val` or `test`, hf:NAME of the hub, or the name of a
            known set, of which the test part is taken.
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
    results = results.settled(by=by and list(shapes))
    results.announce(model, protocol)
    if found is None:
        devices.say("No location score: --boxes names no file with boxes of objects.")
    _say_time(devices, shapes, min(queries or len(files), len(files)), len(files))
    kind = f"retrieval {', '.join(shapes)}; {parts} by seed {devices.seed}"
    compute = form_arrays(model, list(shapes), clusters, devices.seed)
    cache = FeatureCache(model, devices, results.contents)
    cached = cache.features(files, protocol, kind, compute)
    chosen = cached.readable.tolist()
    asked = Asked.of(devices, files[chosen], queries)
    locations, inputs = None, {"data": results.fingerprint(files)}
    if found is not None and boxes is not None:
        found = [found[i] for i in chosen]
        _check_boxes(found, boxes, neighbours)
        locations = Locations.of(asked.files, found, protocol)
        inputs["boxes"] = file_sha256(Path(boxes))
    place = model.map_size(protocol.crop), protocol.crop, devices.device
    measured = {
        form: measure(
            devices, form, open_form(form, cached, *place), asked, locations, neighbours
        )
        for form in shapes
    }
    scores, errors = form_scores(measured, asked, locations is not None)
    result = results.result(
        model,
        "retrieval",
        name,
        protocol,
        scores,
        inputs,
        chance_levels(list(shapes), asked, locations, protocol.crop),
        standard_error=errors,
        num_unreadable=cached.num_unreadable,
        num_alone=asked.num_alone,
        num_reused=cached.num_reused,
    )
    folder = results.save(result)
    table = retrieval_table(Result.load(folder / RESULT_NAME), list(shapes))
    devices.say(f"\n{table}\n")
    if devices.rank == 0:
        replace_text(folder / TABLE_NAME, f"{table}\n")
        replace_text(folder / CLASSES_NAME, classes_csv(measured, asked))
    return result


def _check_boxes(boxes: Sequence[Tensor], path: str, neighbours: int) -> None:
    num = sum(len(of_image) > 0 for of_image in boxes)
    if num <= neighbours:
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
