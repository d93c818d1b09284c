from __future__ import annotations

from unittest.mock import MagicMock, Mock

import pytest
import torch

from lightly_ext.pretrain.callbacks import ImagesPerSecond, ReportUnreadable


class TestImagesPerSecond:
    def test_on_train_batch_end__mean_since_it_was_last_logged(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        callback, module = ImagesPerSecond(), Mock()
        trainer = Mock(world_size=2, log_every_n_steps=2)
        batch = (torch.zeros(5, 1), None)
        # The first step of an epoch, which warms up, does not count.
        clock = iter([10.0, 11.0, 12.5, 16.5, 100.0, 104.0])
        monkeypatch.setattr("time.perf_counter", lambda: next(clock))
        for _ in range(2):
            callback.on_train_epoch_start(trainer, module)
            for step in range(4 if module.log.call_count == 0 else 2):
                callback.on_train_batch_end(trainer, module, None, batch, step)
        rates = [call.args for call in module.log.call_args_list]
        # 10 images a step: 1 in 1 s, 2 in 2.5 s; then 1 in 4 s; then a new epoch.
        expected = [10 / 1, 20 / 2.5, 10 / 4, 10 / 4]
        assert rates == [("images_per_s", rate) for rate in expected]


class TestReportUnreadable:
    def test_on_train_epoch_end__counts_and_says(self) -> None:
        module, dataset = Mock(), MagicMock(num_unreadable=0)
        dataset.__len__.return_value = 9
        trainer = Mock(train_dataloader=Mock(dataset=dataset))
        callback = ReportUnreadable()
        callback.on_train_epoch_end(trainer, module)
        module.log.assert_called_with("unreadable_images", 0.0)
        module.print.assert_not_called()
        dataset.num_unreadable = 2
        callback.on_train_epoch_end(trainer, module)
        module.log.assert_called_with("unreadable_images", 2.0)
        module.print.assert_called_once_with("Skipped 2 unreadable of 9 images so far.")
