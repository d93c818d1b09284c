"""The demo on photographs, stage by stage: photos, prior, STELLAR, scores, page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from lightly_ext.data.views import SingleViewTransform
from lightly_ext.demo.photos import scores as measured
from lightly_ext.demo.photos import training
from lightly_ext.demo.photos.files import PhotoSets, copy_photos, find_photos
from lightly_ext.demo.photos.page import Galleries, render_page
from lightly_ext.demo.photos.pictures import (
    Shown,
    before_after_gallery,
    near_photos,
    near_tokens,
    token_gallery,
)
from lightly_ext.demo.photos.scores import (
    PRIOR,
    RAW,
    TRAINED,
    UNTRAINED,
    Scores,
    Seen,
)
from lightly_ext.demo.stages import Stages, start_output
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles
from lightly_ext.evaluate.loading import (
    load_frozen_model,
    load_stellar,
    load_untrained,
)
from lightly_ext.run_lock import RunLock


def run_photo_demo(
    folder: Path,
    output: Path,
    seed: int = 0,
    minutes: float = 10.0,
    title: str = "STELLAR on your photos",
    class_names: Mapping[str, str] | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Scores]:
    """Pretrains a prior and STELLAR on photos, and shows what they have learned.

    Args:
        folder:
            Folder of photos, see `find_photos`.
        output:
            Folder for everything; what an earlier demo left there is replaced.
        seed:
            Decides on weights and views.
        minutes:
            Time of both pretrainings together.
        title:
            Heading of the page.
        class_names:
            Names of class folders in words.
        options:
            More options of `stellar pretrain` by the stages of `training.RECIPES`.

    Returns:
        Scores by the names of the encoders.

    Raises:
        FileNotFoundError: If there is no such folder.
        FileExistsError: If something else than a demo is in `output`.
        ValueError: If it holds too few photos, or one folder lies in the other.
        RuntimeError: If another demo is writing into `output`.
    """
    check_apart(folder, output)
    found = find_photos(folder)
    stages, options = Stages(), options or {}
    with RunLock(output):
        start_output(output)
        with stages("photos"):
            photos = _named(copy_photos(found, output / "photos"), class_names or {})
            _say_photos(stages.console, photos)
        runs = []
        for name, what in (
            (training.PRIOR, "prior, without labels"),
            (training.STELLAR, "STELLAR, without labels"),
        ):
            with stages(what):
                more = options.get(name, ())
                runs.append(
                    training.pretrain(name, photos, output, seed, minutes, more)
                )
        with stages("scores, pictures and page"):
            scores = _report(title, photos, runs, output, seed, stages)
    total = sum(stages.seconds.values())
    stages.console.print(f"{total:.0f} s in all. Open {output / 'index.html'}.")
    return scores


def check_apart(folder: Path, output: Path) -> None:
    """Raises a ValueError if photos and output lie in one another."""
    inner, outer = folder.resolve(), output.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueError(
            f"The photos in '{folder}' and the output in '{output}' lie in one "
            "another: the demo would read or replace its own files. Name another "
            "--output."
        )


def _named(photos: PhotoSets, words: Mapping[str, str]) -> PhotoSets:
    train, test = (
        replace(files, classes=tuple(words.get(name, name) for name in files.classes))
        for files in (photos.train, photos.test)
    )
    return replace(photos, train=train, test=test)


def _say_photos(console: Console, photos: PhotoSets) -> None:
    for name, text in _photo_facts(photos).items():
        console.print(f"{name}: {text}", highlight=False, markup=False)


def _photo_facts(photos: PhotoSets) -> dict[str, str]:
    left_out = ", ".join(f"{n} {reason}" for reason, n in photos.left_out.items())
    classes = photos.unlabelled or (
        f"{len(photos.train.classes)}, by the names of subfolders"
    )
    return {
        "photos": f"{len(photos.train)} to learn from, {len(photos.test)} to test with",
        "split": photos.split,
        "classes": classes,
        "left out": left_out or "none",
    }


def _report(
    title: str,
    photos: PhotoSets,
    runs: Sequence[training.Stage],
    output: Path,
    seed: int,
    stages: Stages,
) -> dict[str, Scores]:
    """Scores all encoders, writes the page and the tables."""
    trained = _loaded(runs[1].folder)
    models = {
        UNTRAINED: load_untrained(trained, seed),
        PRIOR: _loaded(runs[0].folder),
        TRAINED: trained,
    }
    assert trained.origin.image_size is not None
    side = trained.origin.image_size[0]
    images = {"bank": _read(photos.bank, side), "test": _read(photos.test, side)}
    seen = {name: _look(model, images) for name, model in models.items()}
    scores = _scores(photos, images, seen, models)
    bank, test, before = (
        Shown(images[part], seen[name][part], files)
        for name, part, files in (
            (TRAINED, "bank", photos.bank),
            (TRAINED, "test", photos.test),
            (UNTRAINED, "test", photos.test),
        )
    )
    galleries = Galleries(
        before_after_gallery(models[UNTRAINED], trained, before, test),
        token_gallery(test),
        near_tokens(bank, seed),
        near_photos(bank, test),
    )
    chance = None if photos.unlabelled else measured.chance(photos)
    tables = measured.tables(scores, chance)
    facts = {**_photo_facts(photos), **_run_facts(runs, seed, stages)}
    page = render_page(title, photos, runs, scores, tables, galleries, side, facts)
    (output / "index.html").write_text(page)
    (output / "table.md").write_text(measured.to_markdown(tables))
    (output / "table.json").write_text(measured.to_json(scores, chance, facts))
    for table in tables:
        _print_table(stages.console, table)
    return scores


def _loaded(run: Path) -> FrozenModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_frozen_model(str(run / "model")).to(device)


def _read(files: ImageFiles, side: int) -> Tensor:
    """Photos as models get them, uint8 (num_photos, 3, side, side)."""
    photos = EvaluationImages(files, SingleViewTransform(side))
    return torch.stack([photos[i].image for i in range(len(files))])


def _look(model: FrozenModel, images: Mapping[str, Tensor]) -> dict[str, Seen]:
    return {part: measured.look(model, pixels) for part, pixels in images.items()}


def _scores(
    photos: PhotoSets,
    images: Mapping[str, Tensor],
    seen: Mapping[str, Mapping[str, Seen]],
    models: Mapping[str, FrozenModel],
) -> dict[str, Scores]:
    raw = {part: measured.look_raw(pixels) for part, pixels in images.items()}
    scores: dict[str, Scores] = {}
    for name, parts in {RAW: raw, **seen}.items():
        scores[name] = measured.unlabelled_scores(parts["test"])
        if not photos.unlabelled:
            scores[name] |= measured.labelled_scores(
                parts["bank"], parts["test"], photos
            )
    mean = images["bank"].float().mean(dim=0) / 255
    guess = mean.expand(images["test"].shape)
    scores[RAW]["psnr"] = measured.psnr(guess, images["test"])
    for name in (UNTRAINED, TRAINED):
        inputs = models[name].normalize(images["test"].to(models[name].mean.device))
        decoded = measured.reconstructions(load_stellar(models[name]), inputs)
        scores[name]["psnr"] = measured.psnr(decoded, images["test"])
    return scores


def _run_facts(
    runs: Sequence[training.Stage], seed: int, stages: Stages
) -> dict[str, str]:
    facts = {"seed": str(seed)}
    for name, run in zip(("prior", "STELLAR"), runs, strict=True):
        record = run.record
        facts[name] = (
            f"{record['parameters'] / 1e6:.2f} million parameters, {record['step']} "
            f"steps, {record['images_seen']} photos seen, {run.minutes:.1f} minutes on "
            f"{record['sessions'][-1]['device']}; everything in {run.folder}"
        )
    facts["machine"] = f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    times = {k: f"{seconds:.1f} s" for k, seconds in stages.seconds.items()}
    return facts | {f"time, {name}": text for name, text in times.items()}


def _print_table(console: Console, table: measured.Table) -> None:
    shown = RichTable(table.title, *table.columns.values())
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in table.cells():
        shown.add_row(*row)
    console.print(shown)
