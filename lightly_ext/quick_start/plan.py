"""What a try chooses, why, and how long each part of it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from lightly_ext.data import num_cpus
from lightly_ext.pretrain.derived import (
    BATCH_SIZE,
    CROP,
    MODEL,
    NAME,
    NUM_QUERIES,
    PATCH,
    shown,
)
from lightly_ext.quick_start.files import PhotoSets
from lightly_ext.quick_start.training import (
    PRIOR,
    RECIPES,
    STELLAR,
    Stage,
    Steps,
    Trial,
)

# Minutes for so many photos and fewer; for more they grow with the square root.
MINUTES, PHOTOS, MAX_MINUTES = 10.0, 1500, 30.0
# Parts of the time of training. Most of what a prior gives, it gives early.
SHARES = {PRIOR: 0.4, STELLAR: 0.6}
# Part of the whole time that a trial takes, and the least, in seconds.
TRIAL_SHARE, TRIAL_SECONDS = 0.008, 2.0
# Part of the whole time that training has at least, where nobody asked for a time.
MIN_SHARE = 0.3
# Seconds without which training is none; and part of the time that nothing is planned
# for.
MIN_TRAINING, RESERVE = 10.0, 0.01


class Choice(NamedTuple):
    """Something that was chosen.

    Attributes:
        what: Name of it.
        value: What it is.
        reason: What it follows from.
    """

    what: str
    value: str
    reason: str


class Minutes(NamedTuple):
    """The time of everything.

    Attributes:
        number: How many minutes.
        reason: What they follow from.
        given: Whether somebody asked for them.
    """

    number: float
    reason: str
    given: bool = False


@dataclass(frozen=True)
class Costs:
    """What is measured before the long trainings, in seconds.

    Attributes:
        starts:
            Of each stage beside its steps; those that are finished cost nothing.
        point:
            Of one computation of online kNN, 0 without.
        page:
            Of looking at all photos with one model, and writing the page.
    """

    starts: Mapping[str, float]
    point: float
    page: float


def minutes_for(number: int, kind: str) -> Minutes:
    """The time of a try for so many photos to learn from, on a "cpu" or "gpu"."""
    if number <= PHOTOS:
        minutes, reason = MINUTES, f"for up to {PHOTOS} photos"
    else:
        minutes = min(MINUTES * math.sqrt(number / PHOTOS), MAX_MINUTES)
        reason = f"{MINUTES:g} x sqrt({number} photos / {PHOTOS}), {MAX_MINUTES:g} at "
        reason += "most"
    if kind == "gpu":
        reason += "; a GPU trains a larger model in it"
    return Minutes(float(round(minutes)), f"{reason}; --minutes names another")


def extended(
    asked: Minutes, left: float, costs: Costs, stages: Sequence[str]
) -> Minutes:
    """More time on a machine on which nearly none would be for training.

    Args:
        asked:
            The time; one that somebody asked for stays.
        left:
            Seconds to the end of it.
        costs:
            What all else takes.
        stages:
            Names of the stages that are to come.
    """
    rest = left - _fixed(costs, stages)
    least = MIN_SHARE * 60 * asked.number
    if asked.given or not stages or rest >= least:
        return asked
    more = math.ceil((least - rest) / 60)
    reason = f"{asked.reason}; {more} more, as all else takes long on this machine"
    return Minutes(asked.number + more, reason)


def trial_seconds(minutes: float) -> float:
    """Seconds of each trial."""
    return max(TRIAL_SECONDS, 60 * TRIAL_SHARE * minutes)


def training_seconds(
    left: float, costs: Costs, stages: Sequence[str]
) -> dict[str, float]:
    """Seconds of the steps of each stage that is to come, all at least `MIN_TRAINING`.

    Args:
        left:
            Seconds to the end of the try.
        costs:
            What all else takes.
        stages:
            Names of the stages, in their order.
    """
    rest = max(MIN_TRAINING, left - _fixed(costs, stages))
    whole = sum(SHARES[name] for name in stages)
    return {name: rest * SHARES[name] / whole for name in stages}


def check_minutes(
    minutes: float, left: float, costs: Costs, stages: Sequence[str]
) -> None:
    """Raises a ValueError that names a time that is enough if this one is not.

    Args:
        minutes:
            The time of everything.
        left:
            Seconds to the end of it.
        costs:
            What all else takes.
        stages:
            Names of the stages that are to come.
    """
    fixed = _fixed(costs, stages)
    rest = left - fixed
    if rest < MIN_TRAINING:
        enough = math.ceil(minutes + (2 * MIN_TRAINING - rest) / 60)
        raise ValueError(
            f"{minutes:g} minutes are too few: on this machine, as busy as it is, "
            f"reading and trials took {60 * minutes - left:.0f} s, and starts, scores "
            f"and pages take {fixed:.0f} s more. Name --minutes {enough}, or leave it "
            "out."
        )


def _fixed(costs: Costs, stages: Sequence[str]) -> float:
    return sum(costs.starts[name] + costs.page for name in stages)


def clock(seconds: float) -> str:
    """The time of day in so many seconds."""
    return (datetime.now() + timedelta(seconds=seconds)).strftime("%H:%M")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def choices(photos: PhotoSets, runs: Mapping[str, Stage]) -> list[Choice]:
    """What was chosen, and why.

    Args:
        photos:
            The photos.
        runs:
            Runs of `PRIOR` and `STELLAR`, short or long.
    """
    stellar = runs[STELLAR]
    options = {**runs[PRIOR].options, **stellar.options}
    # The prior is first: what it has decided on is no choice of the other.
    reasons = _reasons(stellar) | _reasons(runs[PRIOR])

    def why(name: str) -> str:
        return reasons.get(shown(name), "as given")

    side, patch = options[CROP], options[PATCH]
    prototypes = options.get("model.head.num_prototypes")
    record = stellar.record
    device, precision = (record["sessions"][0][k] for k in ("device", "precision"))
    workers = options.get("data.num_workers") or 0
    depth = options.get(f"{MODEL}depth")
    return [
        Choice("photos", _numbers(photos), photos.split),
        Choice("classes", _classes(photos), photos.unlabelled or "training reads none"),
        Choice(
            "recipes",
            f"{RECIPES[PRIOR]}, then {RECIPES[STELLAR]}",
            "a prior (masked autoencoder) first: STELLAR learns more from one",
        ),
        Choice(
            "ViT",
            f"{options[NAME]}{f' of depth {depth}' if depth else ''}, "
            f"{record['parameters'] / 1e6:.2g} million parameters with decoder",
            why(NAME),
        ),
        Choice("image size", f"{side} px", why(CROP)),
        Choice("patches", f"{(side // patch) ** 2} of {patch} px", why(PATCH)),
        Choice("tokens", str(options[NUM_QUERIES]), why(NUM_QUERIES)),
        Choice(
            "prototypes",
            "none" if prototypes is None else str(prototypes),
            "a short run learns none; tokens are told from those of other photos",
        ),
        Choice("batch", f"{options[BATCH_SIZE]} photos", why(BATCH_SIZE)),
        Choice("precision", str(precision), why("trainer.precision")),
        Choice(
            "processes",
            f"1 on {device.removeprefix('1 x ')}, {workers} to read photos",
            f"{num_cpus()} CPU cores",
        ),
    ]


def steps_choice(name: str, trial: Trial, steps: Steps) -> Choice:
    """How many steps of a stage there are to be, and why."""
    images = trial.stage.record["sessions"][0]["global_batch"]
    pace = f"{trial.per_step:.2f} s for {images} photos, by a trial; the time ends it"
    return Choice(f"steps, {name}", f"about {steps.number}", f"what fits, at {pace}")


def _reasons(stage: Stage) -> dict[str, str]:
    derived: Mapping[str, Any] = stage.record.get("derived", {})
    texts = {name: text.partition(": ")[2] for name, text in derived.items()}
    return {name: text for name, text in texts.items() if text != "of the prior"}


def _numbers(photos: PhotoSets) -> str:
    left_out = ", ".join(f"{n} {reason}" for reason, n in photos.left_out.items())
    text = f"{len(photos.train)} to learn from, {len(photos.test)} to test with"
    return f"{text}; left out: {left_out}" if left_out else text


def _classes(photos: PhotoSets) -> str:
    if photos.unlabelled:
        return "none"
    return f"{len(photos.train.classes)}, by the names of subfolders"
