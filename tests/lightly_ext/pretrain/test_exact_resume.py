"""A run that is cut and continued is the same, bit for bit, as one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer

from tests.exact_resume import Run, SaveAlways, assert_equal_states, write_classes
from tests.lightly_ext.data.streams.shard_files import encoded_images, write_shards
from tests.pretraining import MAE_VIEW, TINY, loader, tiny, tiny_mae, trainer

STEPS = {"max_epochs": -1, "max_steps": 5}
EPOCHS = {"max_epochs": 2}


def assert_exact(folder: Path, names: tuple[str, ...] = (), **options: Any) -> None:
    """Continues a run behind all of its batches and epochs, or the named ones."""
    save = SaveAlways(folder)
    whole = Run(folder, callbacks=[save], **options)
    for name in names or save.saved:
        rows, batches = save.saved[name]
        again = Run(folder, folder / f"{name}.ckpt", **options)
        assert again.rows == whole.rows[rows:], name
        assert again.seen.batches == whole.seen.batches[batches:], name
        assert_equal_states(again.state, whole.state)
    assert len(whole.seen.batches) == whole.trainer.fit_loop.total_batch_idx + 1


class TestExactResume:
    def test_fit__in_mid_epoch_and_at_its_end(self, tmp_path: Path) -> None:
        assert_exact(tmp_path, ("batch-2", "batch-3", "epoch-1"), **STEPS)

    def test_fit__from_a_batch_whose_gradients_are_lost(self, tmp_path: Path) -> None:
        assert_exact(tmp_path, ("batch-1",), accumulate_grad_batches=2, max_epochs=1)

    @pytest.mark.slow
    # Four steps end with an epoch.
    @pytest.mark.parametrize(
        "end", [{**STEPS, "max_steps": 4}, EPOCHS], ids=["steps", "epochs"]
    )
    def test_fit__with_teacher_accumulation_and_online_knn(
        self, end: dict[str, int], tmp_path: Path
    ) -> None:
        labelled = str(write_classes(tmp_path / "labelled", 24))
        assert_exact(
            tmp_path,
            module={"teacher_momentum": 0.9},
            data={"knn_train": labelled, "knn_val": labelled},
            accumulate_grad_batches=2,
            **end,
        )

    @pytest.mark.slow
    def test_fit__with_workers_and_epochs(self, tmp_path: Path) -> None:
        assert_exact(tmp_path, data={"num_workers": 2}, **EPOCHS)

    @pytest.mark.slow
    def test_fit__validation_within_epochs(self, tmp_path: Path) -> None:
        labelled = str(write_classes(tmp_path / "labelled", 24))
        data = {"knn_train": labelled, "knn_val": labelled}
        assert_exact(tmp_path, data=data, val_check_interval=2, **STEPS)

    def test_fit__dropout_too(self, tmp_path: Path) -> None:
        model = {**TINY["model"], "drop_path_rate": 0.5, "proj_drop_rate": 0.1}
        assert_exact(tmp_path, ("batch-2",), module={"model": model}, **STEPS)

    def test_fit__mae(self, tmp_path: Path) -> None:
        assert_exact(
            tmp_path,
            ("batch-2",),
            make=tiny_mae,
            data={"transform": MAE_VIEW},
            **STEPS,
        )

    def test_fit__tars_and_parquet(self, tmp_path: Path) -> None:
        images = encoded_images(7)
        for kind in ("tar", "parquet"):
            folder = tmp_path / kind
            write_shards(folder, kind, [images[:3], [b"no image", *images[4:]]])
            data = {"path": str(folder), "shuffle_buffer": 4}
            with pytest.warns(UserWarning, match="unreadable"):
                assert_exact(folder, ("batch-2", "epoch-1"), data=data, **STEPS)

    @pytest.mark.slow
    def test_fit__parquet_with_other_workers(self, tmp_path: Path) -> None:
        images = encoded_images(7)
        write_shards(tmp_path / "shards", "parquet", [images[:3], images[3:]])
        data = {"path": str(tmp_path / "shards")}
        save = SaveAlways(tmp_path)
        whole = Run(tmp_path, callbacks=[save], data=data, **STEPS)
        data["num_workers"] = 2
        again = Run(tmp_path, tmp_path / "batch-2.ckpt", data=data, **STEPS)
        assert again.seen.batches == whole.seen.batches[2:]
        assert_equal_states(again.state, whole.state)

    def test_fit__from_a_loader_without_seeds(self, tmp_path: Path) -> None:
        # Nothing but epoch ends, where such a loader starts anew.
        whole, again = tiny(), tiny()
        save = SaveEpochs(tmp_path)
        trainer(tmp_path, max_epochs=3, callbacks=[save]).fit(whole, loader())
        fit = trainer(tmp_path, max_epochs=3)
        fit.fit(again, loader(), ckpt_path=tmp_path / "1.ckpt")
        assert_equal_states(again.state_dict(), whole.state_dict())


class SaveEpochs(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")
