"""Every command: the size of its images, and what it lacks before it reads one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightly_ext.evaluate import cli, images
from lightly_ext.evaluate.probing import rank
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results
from stellar_cli.tasks import TASKS
from stellar_plugin.encoder import StellarEncoder
from tests.lightly_ext.evaluate.dense.small_sets import write_halves
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import (
    write_classes,
    write_images,
    write_model,
    write_scenes,
)
from tests.lightly_ext.evaluate.text.small_text import write_pairs, write_tower

SIDE, PATCH = 60, 12
# Options of each command, beside model and places. Folders are those of `sets`.
COMMANDS = {
    "knn": ["--data", "classes", "--neighbours", "3"],
    "linear": ["--data", "classes", "--epochs", "1", "--lrs", "[0.001]"],
    "linear-paper": ["--data", "classes", "--epochs", "1", "--lrs", "[0.001]"],
    "finetune": ["--data", "classes", "--epochs", "1"],
    "reconstruction": ["--data", "photos", "--force"],
    "equivariance": ["--data", "photos"],
    "stability": ["--data", "photos"],
    "rank": [
        *("--data", "classes", "--others", "other", "--images", "photos", "--force")
    ],
    "where": ["--data", "photos", "--masks", "masks"],
    "in-context": ["--data", "scenes", "--neighbours", "3"],
    "discover": ["--data", "photos", "--masks", "masks"],
    "unsupervised-segmentation": ["--data", "halves"],
    "retrieval": ["--data", "classes"],
    "efficiency": ["--batch_sizes", "[1]", "--max_seconds", "0.01"],
    "align-text": ["--data", "pairs/pairs.csv", "--epochs", "1"],
    "visualize": ["--data", "photos"],
    "atlas": ["--data", "photos", "--concepts", "3"],
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, by the names that stand in `COMMANDS`."""
    folder = tmp_path_factory.mktemp("sets")
    sizes = {"img_size": SIDE, "patch_size": PATCH}
    write_model(folder / "model", **sizes)
    write_model(folder / "other", num_queries=2, **sizes)
    write_model(folder / "no_localization", num_queries=3, target=None, **sizes)
    write_classes(folder / "classes")
    write_classes(folder / "other_classes", classes=["cat", "fox"], parts=["train"])
    write_classes(folder / "other_classes", classes=["cat", "dog"], parts=["val"])
    write_classes(folder / "one_class", classes=["cat"])
    write_images(folder / "photos", 4)
    write_scenes(folder / "scenes")
    write_halves(folder / "halves")
    write_images(folder / "photo", 1)
    write_pairs(folder / "pairs", copies=1)
    text = "image,caption\n" + "".join(f"images/{i}.png,a\n" for i in range(9))
    text += "images/red_blue_0.png,a\n"
    (folder / "pairs" / "gone.csv").write_text(text)
    for name, size in (("masks", (36, 40)), ("small_masks", (30, 40))):
        (folder / name).mkdir()
        for i in range(4):
            mask = np.arange(size[0] * size[1]).reshape(size[1], size[0]) % 3
            Image.fromarray(mask.astype(np.uint8)).save(folder / name / f"{i:04d}.png")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reconstruction, rank):
        monkeypatch.setattr(module, "load_networks", tiny_networks)


def _run(
    sets: Path, output: Path, task: str, options: Sequence[str], model: str = "model"
) -> None:
    text = ["--text_model", write_tower(output / "tower")] * (task == "align-text")
    places = ["--output", str(output / "out"), "--accelerator", "cpu"]
    names = {path.name for path in sets.iterdir()}
    named = [str(sets / o) if o.split("/")[0] in names else o for o in options]
    options = ["--model", str(sets / model), *places, "--num_workers", "0", *text]
    cli.main([task, *options, *named])


def test_all_commands_are_here() -> None:
    assert set(COMMANDS) == set(TASKS) - {"report"}


@pytest.mark.parametrize("task", COMMANDS)
@pytest.mark.slow
def test_images_have_the_size_of_the_model(
    task: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = set()
    embed = StellarEncoder._embed

    def recorded(self: StellarEncoder, images: Tensor, keep: Tensor | None) -> Tensor:
        sides.add(tuple(images.shape[-2:]))
        return embed(self, images, keep)

    required, left = Results.required, []

    def watched(self: Results, check: Callable[..., Any]) -> Any:
        found = required(self, check)
        left.append(len(self._ahead))
        return found

    monkeypatch.setattr(StellarEncoder, "_embed", recorded)
    monkeypatch.setattr(Results, "required", watched)
    torch.manual_seed(0)
    _run(sets, tmp_path, task, COMMANDS[task])
    assert sides == {(SIDE, SIDE)}
    assert left[0] == 0  # what was found before the model was loaded is used
    paths = list((tmp_path / "out").glob("*/result.json"))
    assert paths
    for card in (Result.load(path).protocol for path in paths):
        assert card.get("crop", SIDE) == SIDE
        resize = SIDE + 30 if task == "equivariance" else SIDE
        assert card.get("resize", resize) == resize


# What is wrong, and what the error says; all of it is known without a model.
WITHOUT_MODEL = [
    *(
        (task, ["--data", "gone"], "'gone'")
        for task in COMMANDS
        if task not in ("where", "efficiency", "rank")
    ),
    ("knn", ["--data", "other_classes"], r"different classes.*fox"),
    ("knn", ["--data", "classes", "--neighbours", "25"], "in 1 to 24"),
    ("knn", ["--data", "classes", "--resize", "100000"], "resize is 16384 px at most"),
    ("knn", ["--data", "classes", "--seed", "-1"], "seed must be in 0 to 4294967295"),
    ("efficiency", ["--resize", "60"], "nothing that --resize could"),
    ("knn", ["--data", "classes", "--features", "spars"], "features must be"),
    ("linear", ["--data", "one_class"], r"has 1 class\(es\)"),
    ("linear-paper", ["--data", "classes", "--limit", "2"], "2 training images for 3"),
    ("finetune", ["--data", "classes", "--lr", "-1"], "lr must be positive"),
    ("reconstruction", ["--data", "photos"], r"There are 4 images, FID needs 2048"),
    (
        "reconstruction",
        ["--data", "photos", "--force", "--tokenizer", "gone"],
        "no file 'gone': --tokenizer",
    ),
    (
        "reconstruction",
        ["--data", "photos", "--force", "--inception", "gone"],
        "no file 'gone': --inception",
    ),
    (
        "reconstruction",
        ["--data", "photos", "--force", "--form", "scratch", "--decoder", "empty"],
        "no trained decoder in '.*empty'",
    ),
    (
        "reconstruction",
        [*("--data", "photos", "--force", "--form", "scratch"), "--train", "photos"],
        "4 images are in the training set and scored too",
    ),
    ("equivariance", ["--data", "photo"], "has one image"),
    ("stability", ["--data", "photo"], "has one image"),
    ("rank", ["--data", "classes", "--others", "other"], "There are 24 images, FID"),
    ("in-context", ["--data", "scenes", "--bank", "2"], "neighbours must be in 1 to 2"),
    ("in-context", ["--data", "scenes", "--temperature", "0"], "must be positive"),
    ("in-context", ["--data", "photos"], r"(?s)masks/train.*classes\.txt"),
    ("where", ["--data", "gone", "--masks", "masks"], "no folder 'gone'"),
    ("where", ["--data", "photos", "--masks", "empty"], "There is no image below"),
    ("where", ["--data", "photos", "--masks", "small_masks"], "is 30 x 40 px, its"),
    (
        "where",
        ["--data", "photos", "--masks", "masks", "--background", "7"],
        "No px is background 7",
    ),
    (
        "where",
        ["--data", "photos", "--masks", "masks", "--split", "gone"],
        "no file 'gone'",
    ),
    (
        "unsupervised-segmentation",
        ["--data", "halves", "--clusters", "2"],
        "2 clusters cannot be matched to the 3 classes",
    ),
    ("unsupervised-segmentation", ["--data", "photos"], "There is no folder"),
    ("retrieval", ["--data", "photos"], "has no class: every image lies in the"),
    ("retrieval", ["--data", "one_class"], r"has one class, 'cat'"),
    ("retrieval", ["--data", "classes", "--boxes", "gone"], "no file 'gone' with box"),
    ("discover", ["--data", "photos"], "nothing to compare with"),
    ("discover", ["--data", "photos", "--masks", "small_masks"], "is 30 x 40 px, its"),
    ("discover", ["--data", "photos", "--boxes", "gone"], "no file 'gone' with boxes"),
    ("efficiency", ["--batch_sizes", "[0]"], "batch_sizes must be 1 or more"),
    ("efficiency", ["--limit", "3"], "leave --limit out"),
    ("align-text", ["--data", "pairs/gone.csv"], "9 of 10 images are not in"),
    ("align-text", ["--probe", "empty", "--mmvp", "empty"], "no trained probe"),
    ("align-text", ["--data", "pairs/pairs.csv", "--winoground", "empty"], "Winogr"),
    (
        "align-text",
        ["--data", "pairs/pairs.csv", "--text_model", "local-dir:gone"],
        "no folder 'gone' for --text_model",
    ),
    ("atlas", ["--data", "photos", "--concepts", "0"], "concepts must be at least 1"),
    ("atlas", ["--data", "photos", "--clusters", "257"], "clusters must be at most"),
    ("atlas", ["--data", "empty"], "There is no image below"),
    ("visualize", ["--data", "empty"], "There is no image below"),
    ("visualize", ["--data", "photos", "--output", "file"], "is no folder"),
]
# What only the model tells, before an image is read.
WITH_MODEL = [
    ("knn", ["--data", "classes", "--features", "lowrank"], "no localization"),
    ("reconstruction", ["--data", "photos", "--force"], "holds no decoder"),
    (
        "reconstruction",
        [
            *("--data", "photos", "--force", "--form", "scratch", "--target", "pixels"),
            *("--train", "classes", "--latent", "lowrank"),
        ],
        "no localization of tokens, so no low-rank",
    ),
    ("equivariance", ["--data", "photos"], "no localization"),
    ("where", ["--data", "photos", "--masks", "masks"], "no localization"),
    (
        "in-context",
        [*COMMANDS["in-context"], "--features", "lowrank"],
        "no localization",
    ),
    (
        "unsupervised-segmentation",
        ["--data", "halves", "--prototypes"],
        "no localization",
    ),
    ("atlas", ["--data", "photos", "--prototypes"], "not of clusters of patches"),
    ("atlas", ["--data", "photos", "--clusters", "26"], "too few for 26 clusters"),
    (
        "discover",
        ["--data", "photos", "--masks", "masks", "--parts", "tokens"],
        "no tokens with a localization",
    ),
    ("visualize", ["--data", "photos", "--tokens"], "no localization"),
    ("retrieval", ["--data", "classes", "--by", "tokens"], "no localization of its"),
    ("efficiency", ["--batch_sizes", "[1]"], "no decoder"),
    *(
        (task, [*options, "--crop", "61"], "no multiple of the patch size 12.*--crop")
        for task, options in COMMANDS.items()
        if task not in ("where", "equivariance", "rank", "efficiency")
    ),
]


@pytest.mark.parametrize(
    ("task", "options", "message", "model"),
    [
        *((*case, "never loaded") for case in WITHOUT_MODEL),
        *((*case, "no_localization") for case in WITH_MODEL),
        ("rank", [*COMMANDS["rank"], "--others", "no_localization"], "no dec", "model"),
        ("where", [*COMMANDS["where"], "--crop", "61"], "no multiple of the", "model"),
        ("atlas", ["--data", "photos", "--prototypes"], "has no prototypes", "model"),
    ],
)
def test_what_is_missing_is_said_before_an_image_is_read(
    task: str,
    options: list[str],
    message: str,
    model: str,
    sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(images, "read_image", lambda path: read.append(path))
    if model == "never loaded":

        @functools.wraps(cli.load_frozen_model)  # whose options are read
        def load(**_: Any) -> None:
            raise AssertionError("A model was loaded.")

        monkeypatch.setattr(cli, "load_frozen_model", load)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _run(sets, tmp_path, task, options, model)
    assert not read
    assert not list(tmp_path.glob("out/*/result.json"))


@pytest.mark.parametrize("task", sorted(set(COMMANDS) - {"efficiency", "finetune"}))
@pytest.mark.slow
def test_features_that_are_not_finite_are_no_features(
    task: str, sets: Path, tmp_path: Path
) -> None:
    if not (sets / "broken").exists():
        write_model(sets / "broken", img_size=SIDE, patch_size=PATCH)
        path = sets / "broken" / "model.safetensors"
        state = load_file(path)
        state["encoder.vit.blocks.0.mlp.fc2.weight"] *= 1e38
        save_file(state, path)
    said = "of '.*broken' are not finite at precision 32-true: the weights are broken"
    with pytest.raises(RuntimeError, match=said):
        _run(sets, tmp_path, task, COMMANDS[task], "broken")
    assert not list(tmp_path.glob("out/*/result.json"))
