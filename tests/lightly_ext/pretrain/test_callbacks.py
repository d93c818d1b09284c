from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lightly_ext.data import ImageFolderDataset
from lightly_ext.pretrain.callbacks import ImagesPerSecond, ReportUnreadable
from tests.lightly_ext.data.image_files import write_image


class TestImagesPerSecond:
    def test_on_train_batch_end__mean_since_it_was_last_logged(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        callback, module = ImagesPerSecond(), Mock()
        trainer = Mock(world_size=2, log_every_n_steps=2, global_step=0)
        batch = (torch.zeros(5, 1), None)
        # The first step of an epoch, which warms up, does not count.
        clock = iter([10.0, 11.0, 12.5, 16.5, 100.0, 104.0])
        monkeypatch.setattr("time.perf_counter", lambda: next(clock))
        for steps in (4, 2):
            callback.on_train_epoch_start(trainer, module)
            for step in range(steps):
                trainer.global_step += 1
                callback.on_train_batch_end(trainer, module, None, batch, step)
        rates = [call.args for call in module.log.call_args_list]
        # 10 images a step: 1 in 1 s; then 2 in 5.5 s; then a new epoch, 1 in 4 s.
        expected = [10 / 1, 20 / 5.5, 10 / 4]
        assert rates == [("images_per_s", rate) for rate in expected]


class TestReportUnreadable:
    def test_on_train_epoch_end__counts_names_and_lists(self, tmp_path: Path) -> None:
        for name in ("images/0.png", "images/1\n.png", "images/2.png", "bank/a/0.png"):
            write_image(tmp_path / name)
        images = ImageFolderDataset(tmp_path / "images")
        bank = ImageFolderDataset(tmp_path / "bank", labelled=True)
        data = Mock(train_dataset=images, knn_datasets=[bank, bank])
        others = iter([0, 0, 0, torch.tensor([1, 1, 0]), 0, 0])  # of another process
        strategy = Mock(reduce=lambda found, reduce_op: found + next(others))
        trainer = Mock(datamodule=data, strategy=strategy)
        module, file = Mock(device="cpu"), tmp_path / "unreadable.txt"
        callback = ReportUnreadable(file)
        callback.on_train_epoch_end(trainer, module)
        module.log.assert_called_with("unreadable_images", 0.0)
        module.print.assert_not_called()
        assert not file.exists()
        images.file(1).write_bytes(b"")
        with pytest.warns(UserWarning):
            images[1]
        callback.on_train_epoch_end(trainer, module)
        module.log.assert_called_with("unreadable_images", 2.0)
        names = [str(images.file(0)), rf"{images.path}/1\n.png"]
        module.print.assert_called_once_with(
            f"Skipped 2 unreadable of 5 images so far: {', '.join(names)}. They are "
            f"listed in {file}."
        )
        assert file.read_text() == "".join(f"{name}\n" for name in names)
