"""The page of a try: what there is so far, and at the end what came of it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from lightly_ext.pages import page
from lightly_ext.pages.charts import HEIGHT, WIDTH, Chart, draw_chart
from lightly_ext.pretrain.derived import MEASURED_IMAGES
from lightly_ext.quick_start.files import PhotoSets
from lightly_ext.quick_start.pictures import Gallery
from lightly_ext.quick_start.plan import Choice, duration
from lightly_ext.quick_start.scores import (
    AGAIN,
    KNN,
    PRIOR,
    RAW,
    TRAINED,
    UNTRAINED,
    Scores,
    chance,
    first_scores,
    is_above,
    standard_error,
    tables,
)
from lightly_ext.quick_start.training import PRIOR as PRIOR_RUN
from lightly_ext.quick_start.training import STELLAR as STELLAR_RUN
from lightly_ext.quick_start.training import Stage
from stellar_plugin.visualize import Uint8Array

QUALITY = 80
# Titles of curves of STELLAR's stage, by their names in its log.
CURVES = {
    "train/total": "loss of STELLAR, all terms",
    "train/reconstruction": "of it: reconstruction, squared error",
    "train/alignment": "of it: alignment of tokens, nats",
    "health/token_rank": "rank of the tokens, directions in use",
    "health/localization_usage": "usage of the tokens, 1 if all alike",
}
SWITCH = "STELLAR"
# A score without training that leaves nothing to be gained: what is asked is too easy.
NOTHING_LEFT = 0.98


@dataclass
class Content:
    """What the page tells beside scores and pictures.

    Attributes:
        title:
            Heading.
        output:
            Folder of the try.
        photos:
            The photos.
        state:
            What is going on; empty at the end.
        choices:
            What was chosen.
        steps:
            Steps of the trainings, by name.
        runs:
            Trainings that are finished, by name.
        planned:
            Seconds of each stage as planned.
        seconds:
            Seconds of each stage that is finished.
        facts:
            All else about the try.
    """

    title: str
    output: Path
    photos: PhotoSets
    state: str = ""
    choices: list[Choice] = field(default_factory=list)
    steps: dict[str, Choice] = field(default_factory=dict)
    runs: Mapping[str, Stage] = field(default_factory=dict)
    planned: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_choices(self) -> list[Choice]:
        """What was chosen, the steps too."""
        return [*self.choices, *self.steps.values()]


def render_page(
    content: Content, scores: Mapping[str, Scores], galleries: Sequence[Gallery]
) -> str:
    """Fills the page: one HTML file that needs nothing else.

    Args:
        content:
            What it tells.
        scores:
            Scores by the names of the encoders so far.
        galleries:
            The pictures.
    """
    photos = content.photos
    done = TRAINED in scores
    names = content.planned or content.seconds
    return page.render_page(
        "quick_start/page.html",
        title=content.title,
        state=content.state,
        done=done,
        verdict=verdict(photos, scores) if done else [],
        unlabelled=photos.unlabelled,
        few=MEASURED_IMAGES if len(photos.train) < MEASURED_IMAGES else 0,
        num_train=len(photos.train),
        cards=cards(photos, scores) if done else [],
        choices=content.all_choices,
        times=[
            (
                name,
                duration(content.planned[name]) if name in content.planned else "–",
                duration(content.seconds[name]) if name in content.seconds else "–",
            )
            for name in names
        ],
        charts=charts(content.runs, _references(photos, scores)),
        width=WIDTH,
        height=HEIGHT,
        curves_text=_curves_text(photos),
        galleries=galleries,
        tables=tables(scores, photos),
        next=next_steps(content) if done else {},
        facts=content.facts,
        data_uri=_data_uri,
    )


def verdict(photos: PhotoSets, scores: Mapping[str, Scores]) -> list[str]:
    """The answer in sentences, the first of which says whether it has worked."""
    kind = AGAIN if photos.unlabelled else KNN
    values, number = first_scores(scores, kind), len(photos.test)
    trained, prior = values[TRAINED], values[PRIOR]
    other, name = max((values[UNTRAINED], UNTRAINED), (values[RAW], RAW))
    compared = f"{100 * trained:.1f} % against {100 * other:.1f} % of {_words(name)}"
    what = (
        "finding a photo again by another crop of it"
        if photos.unlabelled
        else f"telling {len(photos.train.classes)} classes apart by nearest neighbours"
    )
    if is_above(trained, other, number):
        first = f"It has learned: in {what}, the trained tokens reach {compared}"
    elif other >= NOTHING_LEFT:
        first = f"This was too easy to say what it has learned: in {what}, the trained "
        first += f"tokens reach {compared}"
    elif trained > other:
        first = f"Perhaps it has learned, that is within the noise of {number} test "
        first += f"photos: in {what}, the trained tokens reach {compared}"
    else:
        first = f"It has not learned what helps here: in {what}, the trained tokens "
        first += f"reach {compared}"
    sentences = [f"{first} (chance {100 * chance(photos):.1f} %)."]
    if prior < NOTHING_LEFT and not is_above(trained, prior, number):
        sentences.append(
            f"They are not above the prior alone ({100 * prior:.1f} %) by more than "
            "chance explains: more time may help."
        )
    return sentences


def cards(
    photos: PhotoSets, scores: Mapping[str, Scores]
) -> list[tuple[str, str, str]]:
    """Title, value of the trained model, and what to compare it with."""
    kind = AGAIN if photos.unlabelled else KNN
    title = "photos found again, %" if photos.unlabelled else "kNN accuracy, %"
    values, number = first_scores(scores, kind), len(photos.test)
    error = standard_error(values[TRAINED], number)
    others = [f"{name} {100 * values[name]:.1f}" for name in (UNTRAINED, RAW, PRIOR)]
    note = f"{', '.join(others)}, chance {100 * chance(photos):.1f}"
    before, after = scores[UNTRAINED], scores[TRAINED]
    found = [(title, f"{100 * values[TRAINED]:.1f} ± {100 * error:.1f}", note)]
    note = f"untrained {before['psnr']:.1f}, mean photo (no model) "
    note += f"{scores[RAW]['psnr']:.1f}; higher is closer"
    found.append(("reconstruction PSNR, dB", f"{after['psnr']:.1f}", note))
    if "share" in after:
        note = (
            f"untrained {100 * before['share']:.0f}; 100: all have as much of a photo, "
            f"which blurred maps have too (blur {100 * after['blur']:.0f})"
        )
        found.append(("tokens in use, %", f"{100 * after['share']:.0f}", note))
    return found


def charts(runs: Mapping[str, Stage], references: Mapping[str, float]) -> list[Chart]:
    """Curves over the minutes of the stages so far.

    Args:
        runs:
            Trainings that are finished, by name.
        references:
            What to compare online kNN with, in 0 to 1.
    """
    prior, stellar = runs.get(PRIOR_RUN), runs.get(STELLAR_RUN)
    if prior is None:
        return []
    switch = prior.minutes
    end = switch + (stellar.minutes if stellar else 0.0)
    marks = {SWITCH: switch} if stellar else {}
    draw = partial(draw_chart, marks=marks, ends=(0.0, end))
    found = []
    knn = [_timed(prior, prior.knn, 0.0)]
    if stellar:
        knn.append(_timed(stellar, stellar.knn, switch))
    if all(knn):
        found.append(draw("online kNN accuracy, 0 to 1", knn, references))
    loss = _timed(prior, _behind(prior, "train/total"), 0.0)
    found.append(draw("loss of the prior, squared error", [loss]))
    for name, title in CURVES.items():
        if stellar and (points := _timed(stellar, _behind(stellar, name), switch)):
            found.append(draw(title, [points]))
    return found


def next_steps(content: Content) -> dict[str, str]:
    """Commands that work as they are, by their purposes."""
    output, photos = content.output, content.photos

    def at(*parts: str) -> str:
        return shlex.quote(str(output.joinpath(*parts)))

    model, folder = at("model"), shlex.quote(str(photos.folder))
    test = shlex.quote(str(photos.test.root / photos.test.names[0]))
    steps = 10 * content.runs[STELLAR_RUN].record["step"]
    found = {
        "look at more photos": f"stellar visualize --model {model} --data {folder}",
        "walk through all of them": f"stellar atlas --model {model} --data {folder}",
        "search them by a photo": f"stellar index --model {model} --data {folder} "
        f"--output {at('index')}\nstellar search {at('index')} {test} "
        f"--page {at('search.html')}",
    }
    if not photos.unlabelled:
        found["measure it"] = (
            f"stellar evaluate knn --model {model} --data {at('photos')}"
        )
    longer = shlex.quote(f"{output}_longer")
    return found | {
        "train ten times as long, from the same prior": (
            f"stellar pretrain --from-run {at(STELLAR_RUN)} --output {longer} "
            f"--trainer.max_steps {steps} --trainer.val_check_interval {steps // 10}"
        ),
        "use it in Python": (
            "python -c "
            + shlex.quote(
                "from stellar_plugin import Stellar; "
                f'print(Stellar.from_pretrained("{output / "model"}").encoder)'
            )
        ),
    }


def _words(name: str) -> str:
    return "random weights" if name == UNTRAINED else name


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
    if photos.unlabelled or RAW not in scores:
        return {}
    return {"chance": chance(photos), RAW: first_scores(scores, KNN)[RAW]}


def _curves_text(photos: PhotoSets) -> str:
    if photos.unlabelled:
        return "Without classes there is no accuracy to follow, but losses and rank."
    return (
        "Online kNN accuracy is computed while they learn: of the mean patch in the "
        "prior, of the mean sparse token in STELLAR, whose queries are new at the "
        "switch."
    )


def _data_uri(picture: Uint8Array) -> str:
    image = Image.fromarray(picture)
    return page.data_uri(image, "jpeg", quality=QUALITY, optimize=True)
