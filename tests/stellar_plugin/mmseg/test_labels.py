from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image

from stellar_plugin.mmseg.labels import check_dataset, check_labels


def write(root: Path, maps: list[np.ndarray]) -> None:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, labels in enumerate(maps):
        image = np.zeros((*labels.shape, 3), np.uint8)
        Image.fromarray(image).save(root / f"images/{number:03d}.png")
        Image.fromarray(labels.astype(np.uint8)).save(root / f"labels/{number:03d}.png")


def dataset(root: Path, num_classes: int, reduce: bool = False) -> BaseSegDataset:
    return BaseSegDataset(
        data_root=str(root),
        data_prefix={"img_path": "images", "seg_map_path": "labels"},
        img_suffix=".png",
        metainfo={"classes": [str(number) for number in range(num_classes)]},
        reduce_zero_label=reduce,
        pipeline=[{"type": "mmseg.LoadAnnotations"}],
    )


class TestCheckDataset:
    def test_all_values_are_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 3], [255, 2]])])
        check_dataset(dataset(tmp_path, 4), 4)

    def test_shifted_labels(self, tmp_path: Path) -> None:
        # 0 is ignored, 1 to 4 become 0 to 3, 255 stays ignored.
        write(tmp_path, [np.array([[0, 4], [255, 1]])])
        check_dataset(dataset(tmp_path, 4, reduce=True), 4)
        shifted = dataset(tmp_path, 4, reduce=True)[0]["gt_seg_map"]
        assert shifted.tolist() == [[255, 3], [255, 0]]

    def test_value_beyond_the_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2)), np.array([[0, 4], [7, 4]])])
        message = (
            r"001\.png' of .* has the label values 4, 7 after.*0 to 3.*reduce_zero"
        )
        with pytest.raises(ValueError, match=message):
            check_dataset(dataset(tmp_path, 4), 4)

    def test_wrapped_sets(self, tmp_path: Path) -> None:
        write(tmp_path / "good", [np.array([[0, 3]])])
        write(tmp_path / "bad", [np.array([[0, 4]])])
        good, bad = (dataset(tmp_path / name, 4) for name in ("good", "bad"))
        check_dataset(RepeatDataset(good, 2), 4)
        check_dataset(ConcatDataset([good, good]), 4)
        with pytest.raises(ValueError, match=r"bad/labels/000\.png' of .* values 4 "):
            check_dataset(ConcatDataset([good, bad]), 4)

    @pytest.mark.slow
    def test_many_files__evenly_spread_ones_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stellar_plugin.mmseg.labels.NUM_READ", 3)
        write(tmp_path, [np.zeros((2, 2))] * 9)
        for unread in (1, 2, 3, 5, 6, 7):
            (tmp_path / f"labels/{unread:03d}.png").unlink()
        check_dataset(dataset(tmp_path, 4), 4)
        for read in (0, 4, 8):
            write(tmp_path, [np.full((2, 2), 4 if i == read else 0) for i in range(9)])
            with pytest.raises(ValueError, match=rf"00{read}\.png' of .* values 4 "):
                check_dataset(dataset(tmp_path, 4), 4)

    def test_other_number_of_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2))])
        with pytest.raises(ValueError, match=r"has 4 classes, .*num_classes is 5"):
            check_dataset(dataset(tmp_path, 4), 5)

    def test_missing_label_file(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2)), np.zeros((2, 2))])
        (tmp_path / "labels/001.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"001\.png"):
            check_dataset(dataset(tmp_path, 4), 4)


class TestCheckLabels:
    def test_first_few_of_many_values(self) -> None:
        labels = torch.arange(100)
        with pytest.raises(ValueError, match=r"'x' has .* 9, 10, 11, \.\.\. after"):
            check_labels(labels, 4, 255, "'x'")
