from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightly_ext.demo import mmseg_probe
from lightly_ext.demo.mmseg_probe import probe_command, read_miou, run_mmseg_probes


def _log(work_dir: Path, run: str, lines: list[dict[str, float]]) -> None:
    path = work_dir / run / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class TestReadMIoU:
    def test_read_miou__last_of_the_newest_run(self, tmp_path: Path) -> None:
        _log(tmp_path, "20260101_000000", [{"mIoU": 99.0}])
        _log(tmp_path, "20260102_000000", [{"loss": 1.0}, {"mIoU": 10}, {"mIoU": 37.5}])
        assert read_miou(tmp_path) == pytest.approx(0.375)

    def test_read_miou__nothing_logged(self, tmp_path: Path) -> None:
        _log(tmp_path, "20260101_000000", [{"loss": 1.0}])
        with pytest.raises(RuntimeError, match="No mIoU"):
            read_miou(tmp_path)


class TestProbeCommand:
    def test_probe_command__as_typed(self, tmp_path: Path) -> None:
        command = probe_command(
            tmp_path / "checkpoint", tmp_path / "data", tmp_path, {"a.b": 3}
        )
        assert command[1:3] == ["train", "mmseg"]
        assert command[3].endswith("mm_configs/stellar_digit_boards.py")
        assert command[4:6] == ["--gpus", "0"]
        options = command[command.index("--cfg-options") + 1 :]
        assert (
            f"model.backbone.init_cfg.checkpoint={tmp_path / 'checkpoint'}" in options
        )
        assert f"val_dataloader.dataset.data_root={tmp_path / 'data'}" in options
        assert options[-1] == "a.b=3"


class TestRunMmsegProbes:
    def test_run_mmseg_probes__failure_shows_the_output(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "mim"
        script.write_text("#!/bin/sh\necho no such checkpoint\nexit 3\n")
        script.chmod(0o755)
        monkeypatch.setattr(mmseg_probe, "find_mim", lambda: str(script))
        with pytest.raises(RuntimeError, match=r"status 3.*\n.*no such checkpoint"):
            run_mmseg_probes({"a": tmp_path}, tmp_path, tmp_path / "work")
