"""The images that an index finds, and where in them: what a user gets to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightly_ext.evaluate.boxes import CropPlace
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.metrics.late_interaction import best_matches
from lightly_ext.search.asking import Asked
from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import Found, ImageIndex
from lightly_ext.search.index import find_changes
from lightly_ext.search.regions import crop_place, pixel_boxes
from lightly_ext.search.scoring import unit_length

State = Literal["", "changed", "gone"]


@dataclass(frozen=True)
class Answer:
    """An image that is like a query, and where.

    Attributes:
        file:
            Name of its file, relative to the folder of the images.
        score:
            How alike.
        token:
            Number of its token that is most like the query's heaviest.
        map:
            Where that is, float32 in [0, 1] with the shape of the patch grid.
        box:
            The box around the map's patches that have at least half its maximum: edges
            (x0, y0, x1, y1) in px of the file as it is seen; zeros if it is nowhere.
        place:
            The part of the image that the model saw.
        state:
            Whether the file has changed or is gone since it was indexed.
    """

    file: str
    score: float
    token: int
    map: Tensor
    box: tuple[int, int, int, int]
    place: CropPlace
    state: State

    def json(self) -> dict[str, Any]:
        """What `--json` keeps of it."""
        box = list(self.box)
        return {
            "file": self.file,
            "score": self.score,
            "token": self.token,
            "box": box,
        }


def find_answers(
    index: ImageIndex, asked: Asked, found: Sequence[Found]
) -> list[Answer]:
    """Tells where in images the heaviest token of a query has its like.

    Args:
        index:
            What was searched.
        asked:
            The query.
        found:
            What was found.
    """
    entries = index.entries([f.file for f in found])
    heaviest = unit_length(asked.tokens[asked.heaviest]).float()
    tokens = best_matches(heaviest[None], entries.tokens)[1].flatten().tolist()
    states = _states(Path(index.card.images), entries)
    answers = []
    for i, (one, token) in enumerate(zip(found, tokens, strict=True)):
        where = entries.maps[i, token].unflatten(0, index.card.grid_size)
        place = crop_place(index.card, entries.sizes[i])
        x0, y0, x1, y1 = pixel_boxes(where[None], place, entries.sizes[i])[0].tolist()
        box, state = (x0, y0, x1, y1), states[one.file]
        answers.append(Answer(one.file, one.score, token, where, box, place, state))
    return answers


def _states(root: Path, entries: Entries) -> Mapping[str, State]:
    contents = {
        file: (tuple(stamp), bytes(sha256))
        for file, stamp, sha256 in zip(
            entries.files,
            entries.stamps.tolist(),
            entries.hashes.tolist(),
            strict=True,
        )
    }
    files = ImageFiles(root, list(entries.files))
    changed = {files.names[i] for i in find_changes(contents, files).changed}
    states: dict[str, State] = {}
    for file in files.names:
        there = (root / file).is_file()
        states[file] = "gone" if not there else "changed" if file in changed else ""
    return states
