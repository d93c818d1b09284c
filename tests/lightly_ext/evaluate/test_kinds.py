"""Every kind of network through every task, as the table of docs/evaluation.md says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate import images
from lightly_ext.evaluate.atlas.atlas import run_atlas
from lightly_ext.evaluate.classification.finetune import run_finetune
from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.classification.linear import run_linear, run_linear_paper
from lightly_ext.evaluate.dense.in_context import run_in_context
from lightly_ext.evaluate.dense.unsupervised import run_unsupervised_segmentation
from lightly_ext.evaluate.discovery.discover import run_discover
from lightly_ext.evaluate.efficiency import run_efficiency
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.pictures.visualize import run_visualize
from lightly_ext.evaluate.probing.equivariance import run_equivariance
from lightly_ext.evaluate.probing.rank import run_rank
from lightly_ext.evaluate.probing.stability import run_stability
from lightly_ext.evaluate.probing.where import run_where
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.evaluate.reconstruction.reconstruction import run_reconstruction
from lightly_ext.evaluate.result import RESULT_NAME, Result
from lightly_ext.evaluate.retrieval.retrieval import run_retrieval
from lightly_ext.evaluate.text.align_text import run_align_text
from stellar_cli.tasks import TASKS
from tests.lightly_ext.evaluate.dense.small_sets import write_halves
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import (
    Given,
    make_given,
    write_classes,
    write_images,
    write_scenes,
)
from tests.lightly_ext.evaluate.text.small_text import write_pairs, write_tower
from tests.published_vits import aim, msn
from tests.resnet_files import resnet_state
from tests.titok_files import Sizes, write_titok
from tests.window_files import beit_shapes, filled, swin_shapes

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
SIDE = 128  # a map of stride 32 has as many cells as there are clusters
# What a file holds as it is published, of small sizes.
FILES: dict[str, Callable[[], Any]] = {
    "ViT": lambda: msn(side=SIDE // 16, width=192, depth=1),
    "AIM": lambda: aim(patch_size=16, depth=1),
    "BEiT": lambda: {"model": filled(beit_shapes(64, 1, 1, SIDE // 16, 16, 8192))},
    "ResNet": lambda: {"state_dict": resnet_state(), "author": "DenseCL"},
    "Swin": lambda: {"model": filled(swin_shapes(8, (1,) * 4, (1, 2, 2, 4), 4))},
}
METHODS = {
    "ViT": "MSN",
    "AIM": "AIM",
    "BEiT": "BEiT",
    "ResNet": "DenseCL",
    "Swin": "SimMIM",
    "TiTok": "TiTok",
}


@functools.cache
def _frozen(kind: str, folder: Path) -> FrozenModel:
    """The network, of a small file as it is published."""
    path = folder / f"{kind}.pth"
    if kind == "patches":
        return load_frozen_model("patches:16")
    if kind == "TiTok":
        write_titok(path, Sizes(grid=SIDE // 16, depth=1))
    else:
        torch.manual_seed(0)
        torch.save(FILES[kind](), path)
    model = load_frozen_model(str(path))
    assert model.origin.method == METHODS[kind]
    return model


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_classes(folder / "classes", num=3)
    write_images(folder / "photos", 4)
    write_scenes(folder / "scenes")
    write_images(folder / "train", 4, seed=1)
    write_pairs(folder / "pairs", copies=1, colours=("red", "green", "blue", "white"))
    write_halves(folder / "halves")
    (folder / "masks").mkdir()
    mask = np.arange(40 * 36, dtype=np.uint8).reshape(40, 36) // 5 % 3
    for i in range(4):
        Image.fromarray(mask).save(folder / "masks" / f"{i:04d}.png")
    return folder


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "load_networks", tiny_networks)


def _scratch(given: Given, sets: Path) -> Any:
    options: Any = {"form": "scratch", "target": "pixels", "epochs": 1, "force": True}
    train = str(sets / "train")
    return run_reconstruction(*given, str(sets / "photos"), train=train, **options)


def _align_text(given: Given, sets: Path) -> Any:
    tower = write_tower(given.results.output / "tower")
    pairs = str(sets / "pairs" / "pairs.csv")
    options: Any = {"text_model": tower, "text_weights": None, "epochs": 1}
    return run_align_text(*given, pairs, **options)[0]


CHEAP: Mapping[str, Callable[[Given, Path], Any]] = {
    "knn": lambda g, s: run_knn(*g, str(s / "classes"), neighbours=3),
    "reconstruction": lambda g, s: run_reconstruction(
        *g, str(s / "photos"), force=True
    ),
    "equivariance": lambda g, s: run_equivariance(*g, str(s / "photos")),
    "stability": lambda g, s: run_stability(*g, str(s / "photos"))[0],
    "rank": lambda g, s: run_rank(
        *g, str(s / "classes"), ["other"], str(s / "photos"), force=True
    ),
    "where": lambda g, s: run_where(*g, str(s / "photos"), str(s / "masks")),
    "in-context": lambda g, s: run_in_context(*g, str(s / "scenes"), neighbours=3),
    "unsupervised-segmentation": lambda g, s: run_unsupervised_segmentation(
        *g, str(s / "halves")
    ),
    "retrieval": lambda g, s: run_retrieval(*g, str(s / "classes")),
    "discover": lambda g, s: run_discover(*g, str(s / "photos"), str(s / "masks")),
    "visualize": lambda g, s: run_visualize(*g, str(s / "photos"), 2),
    "atlas": lambda g, s: run_atlas(*g, str(s / "photos"), 4),
}
ALL = {
    **CHEAP,
    "where --clusters 4": lambda g, s: run_where(
        *g, str(s / "photos"), str(s / "masks"), clusters=4
    ),
    "linear": lambda g, s: run_linear(*g, str(s / "classes"), epochs=1, lrs=[1e-3]),
    "linear-paper": lambda g, s: run_linear_paper(
        *g, str(s / "classes"), epochs=1, lrs=[1e-3]
    ),
    "finetune": lambda g, s: run_finetune(*g, str(s / "classes"), epochs=1),
    "reconstruction --form scratch": _scratch,
    "efficiency": lambda g, s: run_efficiency(*g, (1,), max_seconds=0.001),
    "align-text": _align_text,
}


def _table() -> tuple[list[str], dict[str, dict[str, str]]]:
    """The kinds, and by task and kind what is read, or "no"."""
    text = DOCS.read_text().split("<!-- kinds -->\n")[1].split("\n\n")[0]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
    )
    kinds = head[1:]
    return kinds, {
        task.strip("`"): dict(zip(kinds, cells, strict=True))
        for names, *cells in rows
        for task in names.split(", ")
    }


KINDS, TABLE = _table()


def test_all_tasks_are_in_the_table() -> None:
    assert {task.split(" ")[0] for task in TABLE} == set(TASKS) - {"report"}
    assert set(TABLE) == set(ALL)


def _pairs() -> list[Any]:
    """Every task with every kind; in the quick loop each of them once."""
    return [
        pytest.param(
            task,
            kind,
            id=f"{task}-{kind}",
            marks=[] if (i - j) % len(KINDS) == 0 else pytest.mark.slow,
        )
        for i, task in enumerate(CHEAP)
        for j, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize("task, kind", _pairs())
def test_cheap_tasks(task: str, kind: str, sets: Path, tmp_path: Path) -> None:
    _check(task, kind, sets, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", sorted(set(ALL) - set(CHEAP)))
@pytest.mark.slow
def test_other_tasks(task: str, kind: str, sets: Path, tmp_path: Path) -> None:
    _check(task, kind, sets, tmp_path)


def _check(task: str, kind: str, sets: Path, tmp_path: Path) -> None:
    """A task reads what the table says, or says before it reads an image why not."""
    room = 30 if task == "equivariance" else 0  # to shift the crop
    sizes = {} if task == "efficiency" else {"resize": SIDE + room}
    given = make_given(tmp_path, _frozen(kind, sets), crop=SIDE, **sizes)
    cell = TABLE[task][kind]
    if cell == "no":
        said = f"'{given.model.origin.label}'|nothing to fine-tune"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "read_image", None)
            with pytest.raises(ValueError, match=said):
                ALL[task](given, sets)
        return
    found = ALL[task](given, sets)
    if task == "visualize":
        found = Result.load(found[0].parent / RESULT_NAME)
    if task == "atlas":
        found = Result.load(found.parents[1] / RESULT_NAME)
    auto = str(given.model.origin.feature)
    assert _read(found, task) in cell.replace("auto", auto).split(" or ")


def _read(result: Result, task: str) -> str:
    """What the result says that was read."""
    if task.startswith("where") or task == "atlas":
        return "clusters" if "clusters" in result.protocol["parts"] else "tokens"
    if task == "discover":
        return "clusters, cut" if "clusters:" in result.protocol["parts"] else "tokens"
    if task == "equivariance":
        return "S and L" if "change_of_l" in result.scores else "changes of S"
    if task == "efficiency":
        return "parts" if "decoder_ms" in result.scores else "encoder"
    if task == "retrieval":
        known = ("tokens", "mean_token", "clusters")
        return ", ".join(n for n in known if f"{n}_map" in result.scores)
    if task == "visualize":
        return "PCA, clusters" if "clusters" in result.protocol["rule"] else "PCA"
    if task == "in-context":
        return str(result.protocol["features"])
    of = result.provenance
    return str(of.get("feature") or of.get("features") or of["latent"])
