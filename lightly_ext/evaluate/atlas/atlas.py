"""`stellar atlas`: what a model finds in a folder of images, as a page to walk."""

from __future__ import annotations

from pathlib import Path

from lightly_ext.evaluate.atlas.concepts import (
    Concepts,
    cluster_concepts,
    prototype_concepts,
)
from lightly_ext.evaluate.atlas.folder import DATA, PAGE, AtlasFolder
from lightly_ext.evaluate.atlas.part_table import part_table
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.parts import choose_cut
from lightly_ext.evaluate.prototypes import load_sparse_head
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.protocols import ATLAS

FOLDER = "atlas"
# The number of a part is kept in a byte.
MOST_PARTS, MOST_CONCEPTS = 256, 1024


def check_atlas(
    results: Results, data: str, concepts: int, clusters: int | None
) -> tuple[str, ImageFiles]:
    """Checks the options, finds the images and their name; see `Results.required`."""
    check_positive(concepts=concepts, clusters=clusters)
    for name, value, most in (
        ("concepts", concepts, MOST_CONCEPTS),
        ("clusters", clusters or 1, MOST_PARTS),
    ):
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}.")
    return find_images(data, limit=results.limit)


@evaluation
def run_atlas(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    concepts: int = 64,
    prototypes: bool = False,
    clusters: int | None = None,
) -> Path:
    """Makes a page to walk of the concepts that a model finds in a folder of images.

    The parts of all images that are similar to one another are a concept. The page
    leads from concepts to images, from an image to its parts, and from a part to
    similar ones. Its folder needs nothing else: no server, no network. The parts are
    computed once and kept on disk.

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
        concepts:
            Number of concepts, at most.
        prototypes:
            Concepts are the prototypes that the model was trained with, those that
            cover most of the images, and not clusters of parts.
        clusters:
            Cut each image into so many clusters of patches. None takes the tokens of a
            model that has them, else 16 clusters.

    Returns:
        The page.

    Raises:
        ValueError: If an option is impossible, no image is readable, or the model has
            no prototypes.
        RuntimeError: If more than 5 % of the images are unreadable, or images change
            meanwhile.
    """
    name, files = results.required(check_atlas)
    cut = choose_cut(model, results.protocol(model, ATLAS).crop, clusters, devices.seed)
    if prototypes and cut.clusters:
        raise ValueError(
            "Prototypes are of the tokens of STELLAR, not of clusters of patches: "
            "leave --prototypes out."
        )
    head = load_sparse_head(model) if prototypes else None
    what = "prototypes" if prototypes else "k-means clusters of all parts"
    protocol = results.protocol(
        model, ATLAS, data=name, parts=cut.kind, rule=f"{concepts} {what}, {ATLAS.rule}"
    )
    results.announce(model, protocol)
    cache = FeatureCache(model, devices, results.contents)
    table, cached = part_table(cache, files, protocol, cut)
    if not len(table.rows):
        raise ValueError(f"No image of '{files.root}' is readable.")

    def find() -> Concepts:
        if head is not None:
            return prototype_concepts(table, head, concepts, devices)
        return cluster_concepts(table, concepts, devices)

    found = devices.of_first(find)
    result = results.result(
        model,
        "atlas",
        name,
        protocol,
        {
            "num_images": len(table.rows),
            "num_parts": int(table.present.sum()),
            "num_concepts": len(found),
        },
        {"data": results.fingerprint(files)},
        num_reused=cached.num_reused,
        num_unreadable=cached.num_unreadable,
        covered=float(found.coverage.sum()),
    )
    folder = results.save(result, control=False) / FOLDER
    if devices.rank == 0:
        AtlasFolder(model, devices, table, found, cut, protocol, result).write(folder)
        devices.say(f"{folder / PAGE}\n{folder / DATA}")
    devices.fabric.barrier()
    return folder / PAGE
