from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightly_ext.demo.run import run_demo
from lightly_ext.demo.table import METRICS
from stellar_plugin import Stellar


@pytest.mark.slow
class TestRunDemo:
    def test_run_demo__tiny(self, tmp_path: Path) -> None:
        scores = run_demo(
            tmp_path,
            seed=1,
            num_boards={
                "num_train": 96,
                "num_test": 30,
                "num_train_single": 60,
                "num_test_single": 30,
            },
            pretrain_options=["--trainer.max_steps=4", "--trainer.max_epochs=9"],
            mmseg_options={
                "train_cfg.max_iters": 4,
                "train_cfg.val_interval": 4,
                "train_dataloader.num_workers": 0,
                "train_dataloader.persistent_workers": False,
                "val_dataloader.num_workers": 0,
                "val_dataloader.persistent_workers": False,
            },
        )
        assert set(scores["trained"]) == {metric.key for metric in METRICS}
        table = json.loads((tmp_path / "table.json").read_text())
        for key, value in scores["trained"].items():
            assert table["metrics"][key]["trained"] == pytest.approx(value)
        assert "64 boards seen" in table["pretraining"]
        assert len(table["seconds"]) == 4
        for name in ("table.md", "index.html", "pictures/tokens.png"):
            assert (tmp_path / name).stat().st_size > 500
        trained = Stellar.from_pretrained(tmp_path / "checkpoint")
        random = Stellar.from_pretrained(tmp_path / "checkpoint_random")
        weights = zip(trained.parameters(), random.parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in weights)
