"""A try, stage by stage: photos, trials, prior, STELLAR, scores; a page all along."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table as RichTable

from lightly_ext.durable import partial, replace_folder, replace_text
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.loading import load_frozen_model, load_untrained
from lightly_ext.pretrain.provenance import versions
from lightly_ext.quick_start import plan
from lightly_ext.quick_start import scores as measured
from lightly_ext.quick_start.comparison import Comparison
from lightly_ext.quick_start.files import MAX_TRAIN, PhotoSets, copy_photos, find_photos
from lightly_ext.quick_start.page import Content, render_page, verdict
from lightly_ext.quick_start.plan import Choice, Costs, clock, duration
from lightly_ext.quick_start.scores import TRAINED, UNTRAINED, Scores
from lightly_ext.quick_start.stages import Progress, Stages
from lightly_ext.quick_start.training import (
    PRIOR,
    STELLAR,
    Pretrainings,
    Stage,
    Trial,
    read_stage,
    steps_within,
)
from lightly_ext.run_lock import RunLock
from stellar_plugin.wording import counted

TITLE = "STELLAR on your photos"
# What the stages of training are called.
TITLES = {PRIOR: "prior, without labels", STELLAR: "STELLAR, without labels"}
LAST = "scores and page"


def run_try(
    folder: Path,
    output: Path,
    seed: int = 0,
    minutes: float | None = None,
    began: float | None = None,
    title: str = TITLE,
    class_names: Mapping[str, str] | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Scores]:
    """Pretrains a prior and STELLAR on photos, and shows what they have learned.

    Args:
        folder:
            Folder of photos, see `find_photos`.
        output:
            Folder for everything. What an earlier try left there is replaced; what is
            finished of the same try that was stopped is kept.
        seed:
            Decides on weights and views.
        minutes:
            Time of everything. None chooses it by photos and machine.
        began:
            When the time began, by `time.monotonic`; None for now.
        title:
            Heading of the page.
        class_names:
            Names of class folders in words.
        options:
            More options of `stellar pretrain` by the names of `training.RECIPES`.

    Returns:
        Scores by the names of the encoders.

    Raises:
        FileNotFoundError: If there is no such folder.
        FileExistsError: If something else than a try is in `output`.
        ValueError: If it holds too few photos, one folder lies in the other, or the
            time is too short.
        RuntimeError: If another try is writing into `output`.
    """
    check_apart(folder, output)
    stages = Stages()
    if began is not None:
        stages.began = began
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    found = find_photos(folder, MAX_TRAIN[kind])
    asked = plan.minutes_for(len(found.train), kind)
    if minutes is not None:
        asked = plan.Minutes(minutes, "as asked for by --minutes", given=True)
    options = options or {}
    with RunLock(output):
        progress = Progress(output, _key(found, seed, asked.number, options))
        progress.start()
        this = Try(found, output, seed, asked, title, options, stages, progress)
        with _how_to_go_on(stages, progress):
            return this.run(class_names or {})


def check_apart(folder: Path, output: Path) -> None:
    """Raises a ValueError if photos and output lie in one another."""
    inner, outer = folder.resolve(), output.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueError(
            f"The photos in '{folder}' and the output in '{output}' lie in one "
            "another: a try would read or replace its own files. Name another "
            "--output."
        )


class Try:
    """One try in its folder.

    Attributes:
        photos:
            The photos, from the second stage on the copies.
        output:
            The folder, which is ours.
        seed:
            Decides on weights and views.
        asked:
            The time of everything.
        options:
            More options of `stellar pretrain` by the names of `training.RECIPES`.
        stages:
            Times.
        progress:
            What is finished already.
        content:
            Of the page.
        runs:
            Trainings that are finished, by name.
    """

    def __init__(
        self,
        found: PhotoSets,
        output: Path,
        seed: int,
        asked: plan.Minutes,
        title: str,
        options: Mapping[str, Sequence[str]],
        stages: Stages,
        progress: Progress,
    ) -> None:
        self.photos = found
        self.output = output
        self.seed = seed
        self.asked = asked
        self.options = options
        self.stages = stages
        self.progress = progress
        self.content = Content(title, output, found)
        # Time of what is finished is gone.
        stages.began -= sum(progress.seconds.values())
        self.runs: dict[str, Stage] = {}
        self.planned: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds to the end."""
        return 60 * self.asked.number * (1 - plan.RESERVE) - self.stages.gone

    def run(self, class_names: Mapping[str, str]) -> dict[str, Scores]:
        """All stages, see `run_try`."""
        self._say_kept()
        with self.stages("photos"):
            copied = copy_photos(self.photos, self.output / "photos")
            self.photos = self.content.photos = _named(copied, class_names)
        with self.stages("trial"):
            trainer = Pretrainings(self.photos, self.output, self.seed, self.options)
            trials = self._attempt(trainer)
        with self.stages("first page"):
            compared, costs = self._first_page(trials)
        self._plan(trials, costs)
        self._write(compared, f"The prior is trained now; {self._ends()}")
        self._train(PRIOR, trainer, trials, costs)
        compared.add(measured.PRIOR, _loaded(self.runs[PRIOR].folder))
        self._write(compared, f"STELLAR is trained now; {self._ends()}")
        self._train(STELLAR, trainer, trials, costs)
        with self.stages(LAST):
            compared.add(TRAINED, _loaded(self.runs[STELLAR].folder))
        self._end(compared)
        return compared.scores

    def _say_kept(self) -> None:
        if kept := self.progress.seconds:
            self.stages.say(
                f"An earlier try of the same photos was stopped in '{self.output}': "
                f"its {' and '.join(kept)} is finished and kept, all else starts anew."
            )

    def _attempt(self, trainer: Pretrainings) -> dict[str, Trial]:
        """Short runs of what is to come; what is finished is read."""
        trials = {}
        seconds = plan.trial_seconds(self.asked.number)
        prior = self.output / PRIOR / "model"
        for name in (PRIOR, STELLAR):
            if name in self.progress.seconds:
                self.runs[name] = read_stage(self.output / name)
                continue
            trials[name] = trainer.attempt(name, seconds, prior)
            prior = trials[name].stage.folder / "model"
        return trials

    def _first_page(self, trials: Mapping[str, Trial]) -> tuple[Comparison, Costs]:
        """A page of what there is before training, and what scoring takes."""
        start = time.monotonic()
        runs = {name: trial.stage for name, trial in trials.items()} | self.runs
        self.content.choices = plan.choices(self.photos, runs)
        model = _loaded(runs[STELLAR].folder)
        assert model.origin.image_size is not None
        compared = Comparison(self.photos, model.origin.image_size[0])
        compared.add_raw()
        compared.add(UNTRAINED, load_untrained(model, self.seed))
        looked = time.monotonic() - start
        self._write(compared, "Nothing is trained yet.")
        shutil.rmtree(self.output / "trial", ignore_errors=True)
        point = 0.0 if self.photos.unlabelled else looked
        starts = {name: trial.start + point for name, trial in trials.items()}
        return compared, Costs(starts, point, time.monotonic() - start)

    def _plan(self, trials: Mapping[str, Trial], costs: Costs) -> None:
        """Divides the time that is left, and says so."""
        self.planned = dict(self.stages.seconds)
        self.asked = plan.extended(self.asked, self.left, costs, list(trials))
        chosen = Choice("time", f"{self.asked.number:g} minutes", self.asked.reason)
        self.content.choices.append(chosen)
        if not self.runs:  # what is finished is worth more than the time
            plan.check_minutes(self.asked.number, self.left, costs, list(trials))
        seconds = plan.training_seconds(self.left, costs, list(trials))
        for name, trial in trials.items():
            steps = steps_within(seconds[name], trial.per_step, costs.point)
            self.content.steps[name] = plan.steps_choice(name, trial, steps)
            self.planned[TITLES[name]] = costs.starts[name] + seconds[name]
        self.planned[LAST] = (1 + (PRIOR in trials)) * costs.page
        self._say_plan()

    def _say_plan(self) -> None:
        table = RichTable("chosen", "", "because")
        for choice in self.content.all_choices:
            table.add_row(*choice)
        self.stages.console.print(table)
        table = RichTable("stage", "takes", "until")
        behind = -sum(self.stages.seconds.values())
        for name, seconds in self.planned.items():
            behind += seconds
            done = name in self.stages.seconds
            table.add_row(name, duration(seconds), "done" if done else clock(behind))
        self.stages.console.print(table)
        page = self.output / "index.html"
        self.stages.say(f"First pictures are in {page}, {self._ends()}")

    def _train(
        self,
        name: str,
        trainer: Pretrainings,
        trials: Mapping[str, Trial],
        costs: Costs,
    ) -> None:
        """Trains a stage in its part of what is left."""
        if name in self.runs:
            return
        with self.stages(TITLES[name]):
            start = time.monotonic()
            names = [other for other in trials if other not in self.runs]
            seconds = plan.training_seconds(self.left, costs, names)[name]
            steps = steps_within(seconds, trials[name].per_step, costs.point)
            chosen = plan.steps_choice(name, trials[name], steps)
            self.content.steps[name] = chosen
            # The last online kNN comes behind the last step.
            end = start + costs.starts[name] + seconds - costs.point
            self.runs[name] = trainer.train(name, end, steps)
        self.progress.finish(name, time.monotonic() - start)

    def _end(self, compared: Comparison) -> None:
        """Writes the last page, tables and model, and says what came of it."""
        model = self.output / "model"
        shutil.copytree(self.runs[STELLAR].folder / "model", partial(model))
        replace_folder(partial(model), model)
        tables = measured.tables(compared.scores, self.photos)
        facts = self._facts()
        chosen = {what: f"{x} ({why})" for what, x, why in self.content.all_choices}
        replace_text(self.output / "table.md", measured.to_markdown(tables))
        chance = measured.chance(self.photos)
        text = measured.to_json(compared.scores, chance, chosen | facts)
        replace_text(self.output / "table.json", text)
        self.content.facts = facts
        self._write(compared, "")
        self.progress.complete()
        for table in tables:
            self._print_table(table)
        for sentence in verdict(self.photos, compared.scores):
            self.stages.say(sentence)
        self.stages.say(
            f"{duration(self.stages.gone)} in all, of {self.asked.number:g} min. Open "
            f"{self.output / 'index.html'}; the model is {model}."
        )

    def _write(self, compared: Comparison, state: str) -> None:
        self.content.state = state
        self.content.runs = self.runs
        self.content.planned = self.planned
        self.content.seconds = self.stages.seconds
        galleries = compared.galleries(self.seed)
        text = render_page(self.content, compared.scores, galleries)
        replace_text(self.output / "index.html", text)

    def _ends(self) -> str:
        return f"the end is at about {clock(self.left)}."

    def _facts(self) -> dict[str, str]:
        facts = {"seed": str(self.seed)}
        for name, run in self.runs.items():
            record = run.record
            facts[f"run, {name}"] = (
                f"{counted(record['step'], 'step')}, "
                f"{counted(record['images_seen'], 'photo')} seen, "
                f"{run.minutes:.1f} minutes; everything in {run.folder}"
            )
        facts |= {f"version, {name}": text for name, text in versions().items()}
        return facts | {"time in all": f"{self.stages.gone:.1f} s"}

    def _print_table(self, table: measured.Table) -> None:
        shown = RichTable(table.title, *table.columns.values())
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in table.cells():
            shown.add_row(*row)
        self.stages.console.print(shown)


@contextlib.contextmanager
def _how_to_go_on(stages: Stages, progress: Progress) -> Iterator[None]:
    """Says what is left where a try is stopped."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = " and ".join(progress.seconds)
        left = f"The {kept} is finished and kept" if kept else "No stage is finished"
        stages.say(f"Stopped. {left}; the same command starts the rest anew.")
        raise


def _named(photos: PhotoSets, words: Mapping[str, str]) -> PhotoSets:
    train, test = (
        replace(files, classes=tuple(words.get(name, name) for name in files.classes))
        for files in (photos.train, photos.test)
    )
    return replace(photos, train=train, test=test)


def _loaded(run: Path) -> FrozenModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_frozen_model(str(run / "model")).to(device)


def _key(
    photos: PhotoSets,
    seed: int,
    minutes: float,
    options: Mapping[str, Sequence[str]],
) -> str:
    """Tells tries that have the same photos, options and versions from others."""
    files = []
    for part in (photos.train, photos.test):
        for name in part.names:
            with contextlib.suppress(OSError):  # a broken link
                state = (part.root / name).stat()
                files.append((name, state.st_size, state.st_mtime_ns))
    given = {name: list(values) for name, values in options.items()}
    content = json.dumps([files, seed, minutes, given, versions()])
    return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
