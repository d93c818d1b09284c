from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evaluation import knn_gib, main
from tests.lightly_ext.evaluate.small import write_images


def test_features__a_row_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_images(tmp_path / "images", 6))
    options = ["--model", "test_vit", "--batch-size", "3", "--num-workers", "0"]
    main(["features", "--data", data, *options, "--rounds", "1"])
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| encoder", "| features"]
    assert "% of the encoder's own speed" in shown
    assert "0 readers" in shown


def test_knn__says_what_all_takes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--train", "500", "--queries", "40", "--dim", "16", "--rounds", "1"]
    main(["knn", *options])
    shown = capsys.readouterr().out
    assert "40 queries x 500 of 16 numbers" in shown
    assert "50000 x 1281167 take" in shown


def test_knn_gib__imagenet_fits_one_gpu_of_16_gb() -> None:
    assert knn_gib(1_281_167, 768) == pytest.approx(7.33 + 1, abs=0.01)
    assert knn_gib(1_281_167, 768) * 2**30 < 16e9
