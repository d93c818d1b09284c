from __future__ import annotations

from unittest.mock import MagicMock, Mock

import pytest
import torch

from lightly_ext.pretrain.callbacks import (
    ImagesPerSecond,
    ReportUnreadable,
    StellarProgressBar,
)


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


class TestStellarProgressBar:
    def test_get_metrics__numbers_of_logged_steps(self) -> None:
        bar, shown = StellarProgressBar(), []
        trainer = Mock(log_every_n_steps=2, loggers=[], progress_bar_metrics={"a": 1})
        for step in range(1, 6):
            trainer.global_step = step
            trainer.is_last_batch = step == 5
            trainer.callback_metrics = {"loss": torch.tensor(float(step))}
            shown.append(bar.get_metrics(trainer, Mock()))
        losses = [{}, *[{"loss": x} for x in (2.0, 2.0, 4.0, 5.0)]]
        assert shown == [{"a": 1, **loss} for loss in losses]


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
