"""The systems of the paper's tables: files, commands and published scores.

docs/models.md has the table, printed from `stellar_plugin.checkpoints.methods` and from
the published numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from lightly_ext.evaluate.report.published import (
    CLIP,
    IMAGENET,
    TABLE_2,
    all_published,
)
from lightly_ext.evaluate.report.scores import shown_score
from stellar_plugin.checkpoints.files import WEIGHT_SUFFIXES
from stellar_plugin.checkpoints.methods import METHODS, NOT_STATED, Paper, System

# Of each column: table of the paper, task, score and data sets.
COLUMNS = {
    "ImageNet": (2, "linear-paper", "accuracy", (IMAGENET,)),
    "kNN": (1, "knn", "accuracy", (IMAGENET,)),
    "Pets / Food / GlaS": (
        2,
        "linear-paper",
        "accuracy",
        ("Oxford-IIIT Pet", "Food-101", "GlaS"),
    ),
    "ADE20K / Cityscapes / VOC": (
        2,
        "segmentation",
        "mIoU",
        ("ADE20K", "Cityscapes", "Pascal VOC 2012"),
    ),
    "FID": (1, "reconstruction", "fid", (IMAGENET,)),
}
# Tasks that read the map of dense features, whatever "auto" is.
MAPS = ("segmentation", "reconstruction", "align-text")
# open_clip's copy of OpenAI's ViT-B/16; the paper does not tell which size it means.
TEXT_TOWER = Paper(
    "CLIP",
    "https://arxiv.org/abs/2103.00020",
    (System(CLIP, "open_clip_model.safetensors", stride=None),),
    "MIT",
)


class Row(NamedTuple):
    """A system with its paper and the feature that the paper read."""

    system: System
    paper: Paper
    feature: str | None


def rows() -> list[Row]:
    """The systems in the order of the paper's table 2, then CLIP."""
    found = {
        system.name: Row(system, paper, method.feature)
        for method in METHODS
        for paper in method.papers
        for system in paper.systems
    }
    in_order = [found[name] for name in TABLE_2 if name in found]
    return [*in_order, Row(TEXT_TOWER.systems[0], TEXT_TOWER, None)]


def table() -> str:
    """The systems as a Markdown table, as docs/models.md has it."""
    head = ("system", "file", "licence", "what is read", "commands", *COLUMNS)
    lines = [head, ("---",) * len(head), *(_cells(row) for row in rows())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def commands(row: Row) -> list[str]:
    """What measures a system, for the first set of each kind.

    Args:
        row:
            The system.
    """
    system = row.system
    is_file = system.file.endswith(WEIGHT_SUFFIXES)
    source = f"checkpoints/{system.file}" if is_file else system.file
    if row.feature is None:
        tower = f"--text_model ViT-B-16-quickgelu --text_weights {source}"
        data = "--data annotations/captions_train2017.json --images train2017"
        return [f"stellar evaluate align-text --model stellar-b16 {tower} {data}"]
    options = f"--model {source} {system.options}".rstrip()
    linear = f"stellar evaluate linear-paper {options} --data imagenet"
    if system.stride is None:
        return [
            linear,
            f"stellar evaluate reconstruction {options} --data imagenet/val",
        ]
    if not system.config:
        return [linear]
    return [
        linear,
        f'mim train mmseg "$(stellar configs {system.config}_ade20k_paper)"',
    ]


def scores(system: System) -> dict[str, str]:
    """Published scores of a system as text, by column.

    Args:
        system:
            The system.
    """
    published = {
        (entry.source, entry.task, score, entry.protocol.data): value
        for entry in all_published()
        if entry.model == system.name
        and (entry.task in MAPS or entry.protocol.card()["features"] == "auto")
        for score, value in entry.scores.items()
    }
    texts = {}
    for title, (number, task, score, sets) in COLUMNS.items():
        places = [(f"STELLAR table {number}", task, score, data) for data in sets]
        values = [published[place] for place in places if place in published]
        texts[title] = " / ".join(shown_score(score, value) for value in values) or "-"
    return texts


def _cells(row: Row) -> tuple[str, ...]:
    system, paper, feature = row
    map_of = "no map" if system.stride is None else f"map every {system.stride} px"
    read = f"`{feature}`, {system.size} px, {map_of}" if feature else "texts"
    return (
        f"[{system.name}]({paper.url})",
        f"`{system.file}`",
        paper.license or NOT_STATED,
        read,
        "<br>".join(f"`{command}`" for command in commands(row)),
        *scores(system).values(),
    )
