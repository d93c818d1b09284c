"""Pictures and the page of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightly_ext.demo.boards import Boards, Uint8Array
from lightly_ext.demo.features import normalized
from lightly_ext.demo.metrics import Scores
from lightly_ext.demo.table import (
    HEADER,
    METRICS,
    RANDOM,
    TRAINED,
    gain,
    table_rows,
)
from lightly_ext.evaluate.pictures.gallery import draw_sheet, draw_strips, enlarged
from lightly_ext.pages import page
from stellar_plugin import visualize
from stellar_plugin.model import Stellar

NUM_BOARDS = 8
NUM_TOKEN_BOARDS = 4
HIGHLIGHTS = ("map_sparse", "knn_sparse", "patch_miou_lowrank", "psnr")


@dataclass(frozen=True)
class Gallery:
    """Rows of small pictures with titles.

    Attributes:
        rows:
            An array with shape (num_columns, height, width, 3) by its title.
        notes:
            What to say of each picture of a row, by its title.
    """

    rows: Mapping[str, Uint8Array]
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes all pictures as one, enlarged: notes, or else titles, above them."""
        rows = {title: enlarged(row) for title, row in self.rows.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.notes:
            titled = [
                list(zip(self.notes[title], row, strict=True))
                for title, row in rows.items()
            ]
            draw_sheet(titled).save(path)
        else:
            draw_strips(rows).save(path)


def before_after_gallery(random: Stellar, trained: Stellar, boards: Boards) -> Gallery:
    """Input, reconstruction and tokens of some boards, before and after training."""
    before = visualize.reconstruction_rows(random, normalized(random, boards.images))
    after = visualize.reconstruction_rows(trained, normalized(trained, boards.images))
    return Gallery(
        {
            "input": before[0],
            "reconstruction, random weights": before[1],
            "reconstruction, trained": after[1],
            "strongest token per patch, random weights": before[2],
            "strongest token per patch, trained": after[2],
        }
    )


@torch.no_grad()
def token_gallery(model: Stellar, boards: Boards) -> Gallery:
    """Where each token of some boards is: one board per row, one token per column."""
    result = model(normalized(model, boards.images))
    tokens = [
        visualize.overlay_token(boards.images, result, token)
        for token in range(result.sparse.shape[1])
    ]
    rows = np.stack([boards.images, *tokens], axis=1)  # (boards, 1 + tokens, 60, 60, 3)
    notes = {
        f"board {i}": [f"board {i}", *_token_notes(localization)]
        for i, localization in enumerate(result.localization)
    }
    return Gallery(dict(zip(notes, rows, strict=True)), notes)


def _token_notes(localization: Tensor) -> list[str]:
    """Number, share and maximum of each token of a localization matrix."""
    masses = visualize.token_masses(localization).tolist()
    peaks = localization.amax(dim=0).tolist()
    notes = []
    for token, (mass, peak) in enumerate(zip(masses, peaks, strict=True)):
        note = f"token {token}, {visualize.shown_mass(mass, len(localization))}"
        absent = visualize.is_absent(mass, len(localization))
        notes.append(note if absent else f"{note}, maximum {peak:.2f}")
    return notes


def render_page(
    scores: Mapping[str, Scores],
    before_after: Gallery,
    tokens: Gallery,
    facts: Mapping[str, str],
) -> str:
    """Fills the page: one HTML file that needs nothing else.

    Args:
        scores:
            Scores by column of the table.
        before_after:
            Pictures of `before_after_gallery`.
        tokens:
            Pictures of `token_gallery`.
        facts:
            Settings and times of the run, shown as they are.

    Returns:
        HTML with all pictures embedded.
    """
    return page.render_page(
        "demo/page.html",
        title="STELLAR on digit boards",
        cards=_cards(scores),
        header=HEADER,
        table=table_rows(scores),
        metrics=METRICS,
        before_after=before_after.rows,
        tokens=tokens.rows,
        notes=tokens.notes,
        absent=visualize.ABSENT_PATCHES,
        num_tokens=len(next(iter(tokens.rows.values()))) - 1,
        facts=facts,
        data_uri=_data_uri,
    )


def _data_uri(picture: Uint8Array) -> str:
    return page.data_uri(Image.fromarray(picture), "png", optimize=True)


def _cards(scores: Mapping[str, Scores]) -> list[tuple[str, str, str, str]]:
    """Title, value after and before training, and gain of what matters most."""
    return [
        (
            metric.title,
            metric.show(scores[TRAINED].get(metric.key)),
            metric.show(scores[RANDOM].get(metric.key)),
            metric.show(gain(metric, scores), sign="+"),
        )
        for metric in METRICS
        if metric.key in HIGHLIGHTS
    ]
