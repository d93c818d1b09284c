"""The commands of a user, as typed, on tiny sets in the standard folder layouts."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from lightly_ext.evaluate.result import Result
from tests.stellar_plugin.mmseg.mmseg_sets import (
    REPOSITORY,
    WRITERS,
    mim,
    miou,
    run,
    tiny_options,
    tool,
    train_resume_test,
    write_checkpoint,
    write_digit_boards,
)

CONFIGS = REPOSITORY / "mm_configs"
MIM = Path(sys.executable).with_name("mim")

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "stellar")


class TestMim:
    @pytest.mark.parametrize("name", WRITERS)
    def test_train_resume_test(
        self, name: str, checkpoint: Path, tmp_path: Path
    ) -> None:
        options = tiny_options(checkpoint, WRITERS[name](tmp_path / "data"))
        # As typed for one, for the others without what mim adds around the same tools.
        command = partial(mim, MIM) if name == "voc" else tool
        train_resume_test(command, CONFIGS / f"stellar_{name}.py", options, tmp_path)

    def test_train__digit_boards(self, tmp_path: Path) -> None:
        data = write_digit_boards(tmp_path / "data")
        sizes = {"img_size": 60, "patch_size": 12, "embed_dim": 96, "depth": 4}
        checkpoint = write_checkpoint(tmp_path / "stellar", num_queries=8, **sizes)
        splits = ("train", "val", "test")
        options = [f"{s}_dataloader.dataset.data_root={data}" for s in splits]
        options.append(f"model.backbone.init_cfg.checkpoint={checkpoint}")
        arguments = [CONFIGS / "stellar_digit_boards.py", "--work-dir", "probe"]
        output = tool("train", *arguments, "--cfg-options", *options, folder=tmp_path)
        assert "Iter(train) [300/300]" in output
        # Four boards of flat colours are no task: the probe has to learn them.
        assert miou(output) > 10
        assert (tmp_path / "probe/iter_300.pth").is_file()
        stored = Result.load(tmp_path / "probe/result.json")
        assert stored.scores["mIoU"] == pytest.approx(miou(output) / 100, abs=1e-6)
        assert (stored.task, stored.data) == ("segmentation", "digit boards")
        assert stored.protocol["features"] == "lowrank"
        assert "  iterations: 300\n  warmup: 30\n" in output

    def test_train__no_checkpoint(self, tmp_path: Path) -> None:
        options = tiny_options(tmp_path / "nowhere", WRITERS["voc"](tmp_path / "data"))
        arguments = [CONFIGS / "stellar_voc.py", "--cfg-options", *options]
        with pytest.raises(AssertionError, match=r"There is no checkpoint '.*nowhere'"):
            tool("train", *arguments, folder=tmp_path)


class TestTrainModule:
    def test_as_mim(self, checkpoint: Path, tmp_path: Path) -> None:
        options = tiny_options(checkpoint, WRITERS["voc"](tmp_path / "data"))
        options = [*options, "model.backbone.init_cfg=None"]
        command = [sys.executable, "-m", "stellar_plugin.mmseg.train"]
        command += [CONFIGS / "stellar_voc.py", "--work-dir", tmp_path / "probe"]
        output = run([*command, "--cfg-options", *options], tmp_path)
        assert "Iter(train) [2/2]" in output
        assert "its weights are random" in output
        assert (tmp_path / "probe/iter_2.pth").is_file()
