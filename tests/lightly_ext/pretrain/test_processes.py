"""Several processes train as one does, at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer

from tests.exact_resume import (
    GATHERED,
    MemoryLogger,
    SaveAlways,
    images,
    write_classes,
)
from tests.lightly_ext.data.streams.shard_files import encoded_images, write_shards
from tests.pretraining import (
    MAE_VIEW,
    TINY,
    assert_same_training,
    tiny,
    tiny_mae,
    trainer,
)

ROOT = Path(__file__).parents[3]
BATCH = 4


class Record(Callback):
    """Writes down what a process saw, and the losses that the first one logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[list[int]] = []
        self.losses: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.images.append(batch.indices.tolist())
        metrics = trainer.callback_metrics
        terms = {k: float(v) for k, v in metrics.items() if k.startswith("train/")}
        self.losses.append(terms)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        content = {"images": self.images, "losses": self.losses}
        path = self.folder / f"{trainer.global_rank}-of-{trainer.world_size}.json"
        path.write_text(json.dumps(content))


def fit(
    folder: Path,
    method: str,
    processes: int,
    checkpoint: Path | None = None,
    save: bool = False,
) -> tuple[Any, list[dict[str, Any]], float]:
    """Trains two epochs; returns module, records of all processes, and kNN accuracy."""
    head = {"num_prototypes": None, "batch_norm": True} if method == "batch" else {}
    module: Any = tiny(
        lr=1e-3,
        warmup_fraction=0.0,
        loss=GATHERED,
        teacher_momentum=0.9,
        head={**TINY["head"], **head},
    )
    views: dict[str, Any] = {}
    if method == "mae":
        module = tiny_mae(lr=1e-3, warmup_fraction=0.0)
        views["transform"] = MAE_VIEW
    if method == "parquet":
        views["path"] = str(folder / "shards")
    labelled = str(folder / "labelled")
    data = images(
        folder / "images",
        batch_size=BATCH // processes,
        knn_train=labelled,
        knn_val=labelled,
        **views,
    )
    several = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {}
    run = trainer(
        folder,
        max_epochs=2,
        callbacks=[Record(folder), *([SaveAlways(folder)] if save else [])],
        logger=MemoryLogger(),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **several,
    )
    run.fit(module, datamodule=data, ckpt_path=checkpoint)
    records = [
        json.loads((folder / f"{rank}-of-{processes}.json").read_text())
        for rank in range(processes)
    ]
    return module, records, float(run.callback_metrics["knn_top1"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stellar", "batch", "mae", "parquet"])
def test_fit__processes_like_one(method: str, tmp_path: Path) -> None:
    # From a process of its own, without threads: it forks.
    code = f"from pathlib import Path; from {__name__} import compare; "
    result = subprocess.run(
        [sys.executable, "-c", f"{code}compare(Path({str(tmp_path)!r}), {method!r})"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def compare(tmp_path: Path, method: str) -> None:
    write_classes(tmp_path / "images", 14)
    if method == "parquet":
        shards = [encoded_images(5), encoded_images(6), encoded_images(3)]
        shards[1][2] = b"no image"
        write_shards(tmp_path / "shards", method, shards)
    write_classes(tmp_path / "labelled", 23)  # so that shares differ
    module, (record,), accuracy = fit(tmp_path, method, 1, save=True)
    assert len(record["images"]) == 6
    # Two processes from the start, and four that go on behind the fourth batch.
    for processes, batches in ((2, 0), (4, 4))[
        : 1 if method in ("batch", "mae") else 2
    ]:
        checkpoint = tmp_path / f"batch-{batches}.ckpt" if batches else None
        other, records, knn = fit(tmp_path, method, processes, checkpoint)
        dealt = zip(*(record["images"] for record in records), strict=True)
        together = [[i for turn in zip(*x, strict=True) for i in turn] for x in dealt]
        assert together == record["images"][batches:]
        losses = records[0]["losses"]
        for ours, expected in zip(losses, record["losses"][batches:], strict=True):
            assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert_same_training(other, module)
        assert knn == pytest.approx(accuracy)
