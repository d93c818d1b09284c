from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Callback

from lightly_ext.data import ImageFolderDataset
from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.pretrain.provenance import versions
from lightly_ext.pretrain.run_log import read_log
from lightly_ext.pretrain.samples import moments, sample_images
from lightly_ext.pretrain.story import RunStory, tell
from stellar_cli.__main__ import main as stellar
from stellar_plugin.hashes import file_sha256
from tests.lightly_ext.data.image_files import write_image
from tests.page import Page

SMALL = [
    *("--config=digit_boards", "--trainer.enable_model_summary=false"),
    *("--data.batch_size=4", "--data.num_workers=0", "--model.head.num_prototypes=8"),
]


class Watches(Callback):
    """Warns in the third step, twice, and reads how far the log is in each."""

    logged: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        log = read_log(Path(trainer.default_root_dir) / "csv")
        self.logged.append(max(log["train/total"], default=-1) if log else -1)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            for _ in range(2):
                warnings.warn("Something\n odd.", stacklevel=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images, dark and bright, in two parts, and a broken file."""
    folder = tmp_path_factory.mktemp("set")
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, bright in (("dark", 0), ("light", 150)):
            for i in range(12):
                pixels = bright + generator.integers(100, size=(60, 60, 3))
                path = folder / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "train" / "light" / "11.png").write_bytes(b"not an image")
    (folder / "train" / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def story(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of six steps that was resumed to ten, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "a run"
    warns = [{"class_path": f"{__name__}.Watches"}]
    options = [
        *(*SMALL, f"--output={output}", f"--data.path={images / 'train'}"),
        "--trainer.precision=bf16-mixed",  # as on a GPU
        *(f"--data.knn_train={images / 'train'}", f"--data.knn_val={images / 'val'}"),
        f"--trainer.callbacks={json.dumps(warns)}",
    ]
    with pytest.warns(UserWarning, match="odd"):
        pretrain_cli.main([*options, "--trainer.max_steps=6"])
    said = pytest.MonkeyPatch()
    printed: list[str] = []
    said.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(args)))
    try:
        pretrain_cli.main(
            [*options, "--trainer.max_steps=10", "--model.lr=0.002", "--resume"]
        )
    finally:
        said.undo()
    return output, "\n".join(printed)


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


@pytest.mark.slow
class TestRunStory:
    def test_record__counts(self, story: tuple[Path, str], images: Path) -> None:
        record = record_of(story[0])
        assert (record["step"], record["total_steps"]) == (10, 10)
        assert record["images_seen"] == 10 * 4
        assert record["seconds"] > 0
        assert record["unreadable_images"] == 1
        data, files = record["data"], list((images / "train").rglob("*.png"))
        assert data["images"] == len(files) == 24
        assert data["bytes"] == sum(file.stat().st_size for file in files)
        assert record["knn"] == {"untrained": 1.0, "chance": 0.5}

    def test_record__sessions(self, story: tuple[Path, str]) -> None:
        first, second = record_of(story[0])["sessions"]
        assert (first["from_step"], first["to_step"]) == (0, 6)
        assert (second["from_step"], second["to_step"]) == (6, 10)
        assert [first["ended"], second["ended"]] == ["finished", "finished"]
        assert first["versions"] == versions()
        command = shlex.split(second["command"])
        assert command[:2] == ["stellar", "pretrain"]
        assert f"--output={story[0]}" in command and command[-1] == "--resume"

    def test_model__says_what_it_was_trained_on(self, story: tuple[Path, str]) -> None:
        record, model = record_of(story[0]), story[0] / "model"
        told = json.loads((model / "provenance.json").read_text())
        assert told["commands"] == [s["command"] for s in record["sessions"]]
        assert told["data"] == record["data"]
        assert (told["step"], told["images_seen"]) == (10, 40)
        assert told["versions"] == versions() and told["settings"]["lr"] == 0.002
        assert told["weights_sha256"] == file_sha256(model / "model.safetensors")
        card = (model / "README.md").read_text()
        assert told["commands"][1] in card and "24 images of `train`" in card
        assert "random weights" in card and "sparse_head, cls_head" in card

    def test_record__events(self, story: tuple[Path, str]) -> None:
        events = {(e["kind"], e["step"]): e for e in record_of(story[0])["events"]}
        assert events["warning", 3]["text"] == "Something odd."
        assert events["resumed", 6]["text"].startswith("Goes on behind step 6, from st")
        texts = [e["text"] for e in record_of(story[0])["events"]]
        assert texts.count("Something odd.") == 1
        assert sum(text.startswith("Not read as images") for text in texts) == 1
        assert events["changed", 6]["text"] == (
            "model.lr 0.001 -> 0.002, trainer.max_steps 6 -> 10."
        )

    def test_samples__moments_of_both_sessions(self, story: tuple[Path, str]) -> None:
        samples = record_of(story[0])["samples"]
        assert samples["images"][5] == "light/2.png"  # in place of the broken one
        assert list(samples["moments"]) == ["0", "1", "3", "6", "10"]
        for name in samples["moments"].values():
            with Image.open(story[0] / name) as picture:
                assert picture.size == (8 * 62 + 2, 2 * 62 + 2)

    def test_page__needs_nothing_else(self, story: tuple[Path, str]) -> None:
        text = (story[0] / "index.html").read_text()
        assert len(text) < 2e6
        page = Page(text)
        assert all(a.startswith("data:image/jpeg") for a in page.addresses)
        assert not {"script", "link", "iframe"} & page.tags
        assert len(page.decoded()) == 1 + 5
        names = ", ".join(record_of(story[0])["samples"]["images"])
        assert f"From left to right:\n{names}." in text
        for said in (
            *("train/total", "knn_top1", "untrained 1", "chance 0.5", "lr-AdamW"),
            *("Something odd.", "stellar visualize", "10", "of 10", "40 images seen"),
        ):
            assert said in page.text, said

    def test_summary(self, story: tuple[Path, str]) -> None:
        text = (story[0] / "summary.md").read_text()
        for line in (
            "- status: finished",
            "- step: 10 (of 10)",
            "- online kNN: 1 (untrained 1, chance 0.5)",
            "- step 3, warning: Something odd.",
            "- unreadable: 1 file, see unreadable.txt",
        ):
            assert line in text.splitlines()

    def test_commands__run(
        self, story: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        output, said = story
        commands = list(record_of(output)["next"].values())
        assert [shlex.split(c)[1] for c in commands] == [
            *("visualize", "evaluate", "convert"),
        ]
        monkeypatch.chdir(tmp_path)
        for command in commands:
            assert command in said
            stellar(shlex.split(command)[1:])
        assert (output / "timm.safetensors").is_file()
        assert list(tmp_path.glob("runs/evaluate/knn-*/result.json"))
        assert list(tmp_path.glob("runs/evaluate/visualize-*/*.png"))

    def test_log__a_row_is_there_as_soon_as_it_is_logged(
        self, story: tuple[Path, str]
    ) -> None:
        # Which a process that is killed leaves behind.
        assert Watches.logged == [-1, *range(9)]
        log = read_log(story[0] / "csv")
        assert list(log["train/total"]) == list(range(10))

    def test_failure_to_write__is_reported_and_ends_nothing(
        self, images: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "index.html").mkdir()
        options = [*SMALL, f"--data.path={images / 'train'}", f"--output={tmp_path}"]
        with pytest.warns(UserWarning, match=r"could not be written: IsADirectory"):
            trainer = pretrain_cli.main([*options, "--trainer.max_steps=2"])
        assert trainer.global_step == 2
        assert record_of(tmp_path)["step"] == 2
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())


@pytest.mark.slow
def test_several_processes__one_message(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "stellar_cli", "pretrain", *SMALL),
            *(f"--data.path={images / 'train'}", f"--output={output}"),
            *("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=13"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.count("fewer than one batch needs") == 1
    assert result.stderr.count("`--debug` shows where it happened.\n") == 1
    assert "Traceback" not in result.stderr
    assert not output.exists()


class TestEvents:
    def test_tell__once_and_not_without_end(self, tmp_path: Path) -> None:
        story = RunStory(tmp_path, [])
        for i in [*range(100), *range(10)]:
            tell(Mock(callbacks=[Mock(), story]), "warning", f"number {i}")
        tell(Mock(callbacks=[story]), "resumed", "again")
        events = story.record["events"]
        assert [e["text"] for e in events[:50]] == [f"number {i}" for i in range(50)]
        assert [e["kind"] for e in events[50:]] == ["resumed"]

    def test_on_exception__names_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        story = RunStory(tmp_path, [])
        monkeypatch.setattr(story, "_write", lambda trainer: None)
        trainer = Mock(is_global_zero=True)
        story.on_exception(trainer, Mock(), ValueError("early"))
        story.record["sessions"] = [{"ended": None}]
        story._step = 3
        story.on_exception(trainer, Mock(), ValueError("not\n finite"))
        assert story.record["sessions"] == [{"ended": "failed"}]
        (event,) = story.record["events"]
        assert (event["kind"], event["text"]) == ("failed", "ValueError: not finite")


@pytest.mark.parametrize(
    ("total", "steps"),
    [
        (1, [0, 1]),
        (3, [0, 2, 3]),
        (3200, [0, 100, 400, 1600, 3200]),
    ],
)
def test_moments(total: int, steps: list[int]) -> None:
    assert moments(total) == steps


def test_sample_images__spread_evenly(tmp_path: Path) -> None:
    for i in range(20):
        write_image(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"broken")
    dataset = ImageFolderDataset(tmp_path, transform=Mock())
    with pytest.warns(UserWarning, match=r"05\.png"):
        views, names = sample_images(dataset, 16)
    assert names == [f"{i:02}.png" for i in (0, 2, 6, 7, 10, 12, 15, 17)]
    assert views.shape == (8, 3, 16, 16) and views.dtype == torch.uint8
    dataset.transform.assert_not_called()
