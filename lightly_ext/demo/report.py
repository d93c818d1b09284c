"""Pictures and the page of the demo."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

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
from stellar_plugin import visualize
from stellar_plugin.model import Stellar

NUM_BOARDS = 8
NUM_TOKEN_BOARDS = 4
PICTURE_SCALE = 3
HIGHLIGHTS = ("map_sparse", "knn_sparse", "patch_miou_lowrank", "psnr")


@dataclass(frozen=True)
class Gallery:
    """Rows of small pictures with titles.

    Attributes:
        rows:
            An array with shape (num_columns, height, width, 3) by its title.
    """

    rows: Mapping[str, Uint8Array]

    def save(self, path: Path) -> None:
        """Writes all pictures as one, enlarged."""
        picture = visualize.tile_pictures(list(self.rows.values()))
        enlarged = picture.repeat(PICTURE_SCALE, 0).repeat(PICTURE_SCALE, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(enlarged).save(path)


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
    return Gallery({f"board {i}": row for i, row in enumerate(rows)})


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
    template = Template(files(__package__).joinpath("page.html").read_text("utf-8"))
    num_tokens = len(next(iter(tokens.rows.values()))) - 1
    return template.substitute(
        cards=_cards(scores),
        table=_table(scores),
        notes="".join(
            f"<dt>{html.escape(m.title)}</dt><dd>{html.escape(m.explanation)}</dd>"
            for m in METRICS
        ),
        before_after=_gallery_rows(before_after),
        num_tokens=num_tokens,
        token_columns=1 + num_tokens,
        token_titles="".join(
            f"<span>{title}</span>"
            for title in ("input", *(f"token {i + 1}" for i in range(num_tokens)))
        ),
        tokens="".join(_figures(row, title) for title, row in tokens.rows.items()),
        facts="".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in facts.items()
        ),
    )


def _gallery_rows(gallery: Gallery) -> str:
    return "".join(
        f'<h3>{html.escape(title)}</h3><div class="strip">{_figures(row, title)}</div>'
        for title, row in gallery.rows.items()
    )


def _figures(row: Uint8Array, title: str) -> str:
    return "".join(
        f'<img alt="{html.escape(title)}" src="{_data_uri(image)}">' for image in row
    )


def _data_uri(image: Uint8Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cards(scores: Mapping[str, Scores]) -> str:
    cards = []
    for metric in METRICS:
        if metric.key not in HIGHLIGHTS:
            continue
        trained = metric.show(scores[TRAINED].get(metric.key))
        random = metric.show(scores[RANDOM].get(metric.key))
        gained = metric.show(gain(metric, scores), sign="+")
        cards.append(
            f'<div class="card"><span>{html.escape(metric.title)}</span>'
            f"<strong>{trained}</strong><small>random weights {random} · "
            f"{gained} over the best untrained</small></div>"
        )
    return "".join(cards)


def _table(scores: Mapping[str, Scores]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEADER)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table_rows(scores)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
