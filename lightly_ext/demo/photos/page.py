"""The page of the demo on photographs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from lightly_ext.demo.photos.files import PhotoSets
from lightly_ext.demo.photos.pictures import SIDE
from lightly_ext.demo.photos.scores import (
    PRIOR,
    RAW,
    RAW_SIDE,
    TRAINED,
    UNTRAINED,
    Scores,
    Table,
    best,
    chance,
    standard_error,
)
from lightly_ext.demo.photos.training import Stage
from lightly_ext.demo.report import Gallery
from lightly_ext.pages import page
from lightly_ext.pages.charts import HEIGHT, WIDTH, Chart, draw_chart
from lightly_ext.pretrain.derived import MEASURED_IMAGES
from stellar_plugin.visualize import ABSENT_PATCHES, Uint8Array

QUALITY = 82
# Titles of curves of STELLAR's stage, by their names in its log.
CURVES = {
    "train/total": "loss of STELLAR",
    "train/reconstruction": "of it: reconstruction",
    "train/alignment": "of it: alignment of tokens",
    "health/token_rank": "effective rank of the tokens",
}
SWITCH = "STELLAR"


@dataclass(frozen=True)
class Galleries:
    """The pictures of the page.

    Attributes:
        before_after:
            Of `before_after_gallery`.
        tokens:
            Of `token_gallery`.
        near_tokens:
            Of `near_tokens`.
        near_photos:
            Of `near_photos`.
    """

    before_after: Gallery
    tokens: Gallery
    near_tokens: Gallery
    near_photos: Gallery


def render_page(
    title: str,
    photos: PhotoSets,
    stages: Sequence[Stage],
    scores: Mapping[str, Scores],
    tables: Sequence[Table],
    galleries: Galleries,
    side: int,
    facts: Mapping[str, str],
) -> str:
    """Fills the page: one HTML file that needs nothing else.

    Args:
        title:
            Heading of the page.
        photos:
            The photos.
        stages:
            Prior and STELLAR.
        scores:
            Scores by the names of the encoders.
        tables:
            The same as tables.
        galleries:
            The pictures.
        side:
            Side of the photos as the model gets them, in px.
        facts:
            Settings and times of the run, shown as they are.
    """
    labelled = not photos.unlabelled
    error = 0.0
    if labelled:
        error = standard_error(best(scores[TRAINED], "knn"), len(photos.test))
    return page.render_page(
        "demo/photos/page.html",
        title=title,
        minutes=f"{sum(stage.minutes for stage in stages):.1f}",
        steps=" + ".join(str(stage.record["step"]) for stage in stages),
        num_train=len(photos.train),
        num_test=len(photos.test),
        num_bank=len(photos.bank),
        num_classes=len(photos.train.classes),
        num_tokens=len(next(iter(galleries.tokens.rows.values()))) - 1,
        side=side,
        raw_side=min(side, RAW_SIDE),
        error=f"{100 * error:.1f}" if labelled else "",
        unlabelled=photos.unlabelled,
        few=MEASURED_IMAGES if len(photos.train) < MEASURED_IMAGES else 0,
        cards=_cards(photos, scores),
        knn_text=_knn_text(photos),
        charts=charts(stages, _references(photos, scores)),
        width=WIDTH,
        height=HEIGHT,
        absent=ABSENT_PATCHES,
        tables=tables,
        facts=facts,
        data_uri=_data_uri,
        **vars(galleries),
    )


def charts(stages: Sequence[Stage], references: Mapping[str, float]) -> list[Chart]:
    """Curves over the minutes of both stages.

    Args:
        stages:
            Prior and STELLAR.
        references:
            What to compare online kNN with, in 0 to 1.
    """
    prior, stellar = stages
    switch, end = prior.minutes, prior.minutes + stellar.minutes
    draw = partial(draw_chart, marks={SWITCH: switch}, ends=(0.0, end))
    found = []
    knn = [_timed(prior, prior.knn, 0.0), _timed(stellar, stellar.knn, switch)]
    if all(knn):
        found.append(draw("online kNN accuracy", knn, references))
    loss = _timed(prior, _behind(prior, "train/total"), 0.0)
    found.append(draw("loss of the prior", [loss]))
    for name, title in CURVES.items():
        if points := _timed(stellar, _behind(stellar, name), switch):
            found.append(draw(title, [points]))
    return found


def _behind(stage: Stage, name: str) -> dict[int, float]:
    """Finite values by the number of steps that are done."""
    log = stage.log.get(name, {})
    return {k + 1: value for k, value in log.items() if math.isfinite(value)}


def _timed(
    stage: Stage, points: Mapping[int, float], start: float
) -> dict[float, float]:
    """By the minute; steps of a stage take equally long."""
    pace = stage.minutes / stage.record["step"]
    return {start + pace * step: value for step, value in points.items()}


def _references(photos: PhotoSets, scores: Mapping[str, Scores]) -> dict[str, float]:
    if photos.unlabelled:
        return {}
    return {"chance": chance(photos), RAW: best(scores[RAW], "knn")}


def _knn_text(photos: PhotoSets) -> str:
    if photos.unlabelled:
        return "Without classes there is no accuracy to follow, but losses and rank."
    return (
        "Online kNN accuracy, as fractions, is computed while they learn: of the mean "
        "patch in the prior, of the mean sparse token in STELLAR, whose queries are "
        "new at the switch."
    )


def _cards(
    photos: PhotoSets, scores: Mapping[str, Scores]
) -> list[tuple[str, str, str]]:
    """Title, value of the trained model, and what to compare it with."""
    cards = []
    for kind, title in (("knn", "kNN"), ("linear", "linear")):
        if photos.unlabelled:
            continue
        values = {name: 100 * best(scores[name], kind) for name in scores}
        others = ", ".join(
            f"{name} {values[name]:.1f}" for name in (PRIOR, UNTRAINED, RAW)
        )
        note = f"{others}, chance {100 * chance(photos):.1f}; best feature of each, "
        note += "chosen on these test photos"
        cards.append((f"{title} accuracy, %", f"{values[TRAINED]:.1f}", note))
    before, after = scores[UNTRAINED], scores[TRAINED]
    note = f"random weights {before['psnr']:.1f}, mean photo {scores[RAW]['psnr']:.1f}"
    cards.append(("reconstruction PSNR, dB", f"{after['psnr']:.1f}", note))
    if "share" in after:
        note = (
            f"random weights {100 * before['share']:.0f}; 100: all have as much of a "
        )
        note += f"photo, which also blurred maps give (blur {100 * after['blur']:.0f})"
        cards.append(("tokens in use, %", f"{100 * after['share']:.0f}", note))
    return cards


def _data_uri(picture: Uint8Array) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return page.data_uri(image, "jpeg", quality=QUALITY, optimize=True)
