"""`stellar concepts`: what a token stands for, shown by the tokens nearest to it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightly_ext.durable import replace_text, replacing
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, centre_crop
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.pictures.concept_queries import (
    NO_IMAGE,
    Choice,
    Search,
    plan_search,
)
from lightly_ext.evaluate.pictures.gallery import (
    Row,
    Tile,
    draw_gallery,
    render_gallery,
)
from lightly_ext.evaluate.pictures.token_index import (
    Neighbours,
    TokenIndex,
    index_tokens,
)
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.sizes import described_cut
from stellar_plugin.protocols import CONCEPTS, CropProtocol
from stellar_plugin.visualize import (
    ABSENT_PATCHES,
    Uint8Array,
    check_threshold,
    is_absent,
    shown_mass,
    threshold_maps,
    token_palette,
)

PAGE, PICTURE, NEIGHBOURS = "index.html", "concepts.png", "neighbours.json"
ROWS_OF_PICTURE, NEIGHBOURS_OF_PICTURE = 6, 6
WHAT = {
    "random": "random tokens",
    "distinct": "most distinct tokens",
    "prototypes": "most used prototypes",
}
LEAD = (
    "Each row is a concept: a token of one image, or a prototype, and the tokens of "
    "other images that are most similar to it, the nearest first."
)
LEGEND = (
    "In colour: patches where the localization of the token is at least {threshold:g} "
    "of its maximum in the image. The colour is that of the token's number, counted "
    "from 0. Percent: the share of the image that it has; with less than "
    "{absent:g} of one patch in all it is absent, and nothing is in colour. Images as "
    "the model gets them: {cut}."
)


def check_concepts(
    results: Results,
    data: str,
    query: list[str] | None,
    prototypes: list[str] | None,
    num_queries: int,
    num_neighbours: int,
    threshold: float,
) -> tuple[str, ImageFiles]:
    """Checks the options, finds the images and their name; see `Results.required`."""
    if query and prototypes:
        raise ValueError("Name tokens (query) or prototypes, not both.")
    check_positive(num_queries=num_queries, num_neighbours=num_neighbours)
    check_threshold(threshold)
    name, files = find_images(data, limit=results.limit)
    _check_number(len(files), files)
    return name, files


@evaluation
def run_concepts(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    query: list[str] | None = None,
    prototypes: list[str] | None = None,
    choose: Choice = "random",
    num_queries: int = 12,
    num_neighbours: int = 12,
    one_per_image: bool = True,
    threshold: float = 0.5,
) -> Path:
    """Shows tokens, or prototypes, and the tokens of a folder that are nearest to them.

    Writes index.html, one page that needs nothing else, its first rows as concepts.png,
    and neighbours.json. The tokens of the folder are computed once and kept on disk.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder of images, or name of a data set.
        query:
            Tokens to show, as IMAGE:TOKEN, for example "cats/001.jpg:3"; the option may
            be given several times. Names are relative to the folder, tokens are counted
            from 0.
        prototypes:
            Prototypes to show, by their numbers from 0, for example "12,57".
        choose:
            What to show if nothing is named: tokens at random, the most distinct ones
            of a thousand random tokens, or the prototypes that are the nearest of most
            tokens.
        num_queries:
            How many of them.
        num_neighbours:
            Number of neighbours of each.
        one_per_image:
            Show an image at most once per row, with its most similar token.
        threshold:
            Patches are in colour where the localization of a token is at least this
            fraction of its maximum in the image.

    Returns:
        The page.

    Raises:
        ValueError: If an option is impossible, an image is not in the folder, or the
            model has no tokens, no localization or no prototypes.
    """
    name, files = results.required(check_concepts)
    model.require_localization()
    plan = plan_search(model, devices, files, query, prototypes, choose, num_queries)
    wanted = ", ".join(query or prototypes or [f"{num_queries} {WHAT[choose]}"])
    count = "the nearest token" if one_per_image else "each token"
    protocol = results.protocol(
        model,
        CONCEPTS,
        data=name,
        split=f"queries: {wanted}; neighbours: all other images",
        neighbours=num_neighbours,
        rule=f"{count} of an image; in colour: localization at least {threshold:g} of "
        f"its maximum in the image; absent: less than {ABSENT_PATCHES:g} of one patch",
    )
    results.announce(model, protocol)
    index, cached = index_tokens(
        FeatureCache(model, devices, results.cache), files, protocol
    )
    _check_number(len(index.readable), files)
    num_images = len(index.readable)
    num_tokens = num_images * index.num_tokens
    devices.say(f"Searching {num_tokens} tokens.")
    search = plan(index)
    result = results.result(
        model,
        "concepts",
        name,
        protocol,
        {"num_images": num_images, "num_tokens": num_tokens},
        {"data": results.fingerprint(files)},
        similarity=search.measure,
        num_reused=cached.num_reused,
        num_unreadable=cached.num_unreadable,
    )
    folder = results.save(result, control=False)
    if devices.rank == 0:
        neighbours = search.run(index, num_neighbours, one_per_image)
        found = Found(files, index, search, neighbours, threshold)
        _write(model, devices, found, result, protocol, folder)
    devices.fabric.barrier()
    return folder / PAGE


@dataclass(frozen=True)
class Found:
    """Queries with their neighbours, and where all of it is.

    Attributes:
        files:
            The images.
        index:
            Their tokens.
        search:
            What was looked for.
        neighbours:
            What was found.
        threshold:
            As for `run_concepts`.
    """

    files: ImageFiles
    index: TokenIndex
    search: Search
    neighbours: Neighbours
    threshold: float

    def of(self, row: int) -> list[tuple[int, int, float]]:
        """Image, token and similarity of the neighbours of a query."""
        lists = self.neighbours
        columns = (lists.images[row], lists.tokens[row], lists.similarity[row])
        found = zip(*(column.tolist() for column in columns), strict=True)
        return [entry for entry in found if math.isfinite(entry[2])]

    def to_json(self) -> str:
        """Names, tokens, counted from 0, masses and similarities as JSON."""
        concepts = []
        for row, query in enumerate(self.search.queries):
            asked = (
                {"prototype": query.number}
                if query.image == NO_IMAGE
                else self._place(query.image, query.number)
            )
            neighbours = [
                {**self._place(image, token), "similarity": similarity}
                for image, token, similarity in self.of(row)
            ]
            concepts.append({"query": asked, "neighbours": neighbours})
        stored = {"similarity": self.search.measure, "concepts": concepts}
        return json.dumps(stored, indent=2) + "\n"

    def _place(self, image: int, token: int) -> dict[str, Any]:
        mass = self.index.mass(image, token)
        return {"image": self.files.names[image], "token": token, "mass": mass}

    def tile(
        self, picture: Uint8Array, image: int, token: int, similarity: float | None
    ) -> Tile:
        """A picture with the area of a token, which is empty where it is absent."""
        token_map = self.index.token_map(image, token)
        mass, num_patches = self.index.mass(image, token), token_map.numel()
        area = threshold_maps(token_map, self.threshold).numpy() > 0
        if is_absent(mass, num_patches):
            area[:] = False
        note = f"token {token}, {shown_mass(mass, num_patches)}"
        if similarity is not None:
            note += f", similarity {similarity:.3f}"
        colour = token_palette(self.index.num_tokens)[token]
        return Tile(picture, area, self.files.names[image], note, colour)

    def rows(self, pictures: Mapping[int, Uint8Array]) -> list[Row]:
        """The gallery: a row per query.

        Args:
            pictures:
                Pictures by the numbers of their images.
        """
        rows = []
        for i, query in enumerate(self.search.queries):
            neighbours = [
                self.tile(pictures[image], image, token, similarity)
                for image, token, similarity in self.of(i)
            ]
            if query.image == NO_IMAGE:
                title, asked = f"Prototype {query.number}", None
            else:
                title = f"{self.files.names[query.image]}, token {query.number}"
                picture = pictures[query.image]
                asked = self.tile(picture, query.image, query.number, None)
            rows.append(Row(title, query.note, asked, neighbours))
        return rows


def _check_number(num_images: int, files: ImageFiles) -> None:
    if num_images < 2:
        raise ValueError(
            f"Neighbours need 2 readable images, '{files.root}' has {num_images}."
        )


def _write(
    model: FrozenModel,
    devices: Devices,
    found: Found,
    result: Result,
    protocol: CropProtocol,
    folder: Path,
) -> None:
    shown = {query.image for query in found.search.queries} - {NO_IMAGE}
    for row in range(len(found.search.queries)):
        shown |= {image for image, _, _ in found.of(row)}
    rows = found.rows(_pictures(model, devices, found, protocol, sorted(shown)))
    facts = {
        "model": result.model,
        **result.protocol,
        **result.scores,
        "similarity": found.search.measure,
    }
    legend = LEGEND.format(
        threshold=found.threshold,
        absent=ABSENT_PATCHES,
        cut=described_cut(protocol),
    )
    title = f"Concepts of {result.model} in {result.data}"
    page = render_gallery(title, f"{LEAD} {legend}", rows, facts)
    replace_text(folder / PAGE, page)
    replace_text(folder / NEIGHBOURS, found.to_json())
    picture = draw_gallery(rows[:ROWS_OF_PICTURE], NEIGHBOURS_OF_PICTURE, legend)
    with replacing(folder / PICTURE) as new:
        picture.save(new, "png")
    devices.say("\n".join(str(folder / name) for name in (PAGE, PICTURE, NEIGHBOURS)))


def _pictures(
    model: FrozenModel,
    devices: Devices,
    found: Found,
    protocol: CropProtocol,
    numbers: Sequence[int],
) -> dict[int, Uint8Array]:
    transform = centre_crop(protocol, model.origin.interpolation)
    loader = devices.loader(EvaluationImages(found.files, transform), numbers)
    return {
        number: picture
        for batch in loader
        for number, picture in zip(
            batch.number.tolist(), batch.image.permute(0, 2, 3, 1).numpy(), strict=True
        )
    }
