"""Runs of a tiny network that are resumed with another config."""

from __future__ import annotations

import copy
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

SCHEDULE = [
    {"type": "PolyLR", "power": 0.9, "eta_min": 1e-5, "begin": 0, "by_epoch": False},
    {"type": "WarmUpLR", "fraction": 0.5, "begin": 0, "by_epoch": False},
]
BY_EPOCH = {
    "loop": {"type": "EpochBasedTrainLoop", "max_epochs": 4},
    "schedule": [SCHEDULE[0], {"type": "StepLR", "step_size": 2, "gamma": 0.5}],
}
Values = dict[int, tuple[float, float]]


class Line(BaseModel):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x: list[Tensor], mode: str = "loss") -> dict[str, Tensor]:
        return {"loss": self.linear(torch.stack(x)).square().mean()}


class Recorder(Hook):
    """What the optimiser works with in each iteration."""

    def __init__(self) -> None:
        self.values: Values = {}

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        group = runner.optim_wrapper.param_groups[0]
        self.values[runner.iter] = group["lr"], group["weight_decay"]


def run(
    folder: Path,
    max_iters: int = 4,
    *,
    loop: dict[str, Any] | None = None,
    schedule: list[dict[str, Any]] = SCHEDULE,
    optimizer: str = "AdamW",
    lr: float = 0.1,
    weight_decay: float = 0.0,
    width: int = 2,
    resume: bool = False,
) -> Values:
    """Learning rate and weight decay by iteration."""
    torch.manual_seed(0)
    recorder = Recorder()
    by_epoch = loop is not None and "max_epochs" in loop
    save = {"type": "CheckpointHook", "interval": 2 if by_epoch else 4}
    options = {
        "train_cfg": loop or {"type": "IterBasedTrainLoop", "max_iters": max_iters},
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": {"type": optimizer, "lr": lr, "weight_decay": weight_decay},
        },
        "param_scheduler": schedule,
    }
    runner = Runner(
        model=Line(width),
        work_dir=str(folder),
        train_dataloader={
            "dataset": [{"x": torch.ones(width)}] * (4 if by_epoch else 24),
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "batch_size": 2,
        },
        **copy.deepcopy(options),
        cfg=Config(options),
        default_hooks={"checkpoint": {**save, "by_epoch": by_epoch}},
        custom_hooks=[recorder, {"type": "ResumeByConfigHook"}],
        resume=resume,
        default_scope="mmseg",
        experiment_name=uuid.uuid4().hex,
        log_level="WARNING" if not resume else "INFO",
    )
    runner.train()
    return recorder.values


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({}, {"max_iters": 12}),
        ({}, {"max_iters": 8, "lr": 0.3}),
        ({}, {"max_iters": 8, "weight_decay": 0.2}),
        ({}, {"max_iters": 8, "schedule": [{**SCHEDULE[0], "power": 2.0}]}),
        ({}, {"max_iters": 8, "schedule": []}),
        # Two iterations per epoch.
        (BY_EPOCH, {**BY_EPOCH, "loop": {**BY_EPOCH["loop"], "max_epochs": 6}}),
    ],
)
def test_resume__as_a_straight_run(
    before: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    old = run(tmp_path / "run", **before)
    resumed = run(tmp_path / "run", resume=True, **change)
    straight = run(tmp_path / "straight", **change)
    assert list(resumed) == list(straight)[-len(resumed) :]
    assert resumed == {i: straight[i] for i in resumed}  # to the last bit
    first = min(resumed)
    assert old[first - 1] != straight[first - 1] or "schedule" in change


def test_resume__says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    capsys.readouterr()
    run(tmp_path, 8, lr=0.3, resume=True)
    output = capsys.readouterr()
    assert (
        "Resumed at iteration 4; changed: train_cfg.max_iters 4 -> 8, "
        "optim_wrapper.optimizer.lr 0.1 -> 0.3. From here on as in a straight run"
    ) in output.out + output.err


def test_resume__of_a_checkpoint_without_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run")
    path = tmp_path / "run" / "iter_4.pth"
    content = torch.load(path, weights_only=False)
    del content["meta"]["stellar_options"], content["optimizer"]
    torch.save(content, path)
    capsys.readouterr()
    resumed = run(tmp_path / "run", 8, lr=0.3, resume=True)
    straight = run(tmp_path / "straight", 8, lr=0.3)
    assert resumed == {i: straight[i] for i in range(4, 8)}
    output = capsys.readouterr()
    assert "changed: unknown, the checkpoint" in output.out + output.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 3}, r"iter_4\.pth.*linear\.weight \(1, 2\) instead of \(1, 3\)"),
        ({"optimizer": "SGD"}, "optimizer.type was 'AdamW' and is 'SGD'"),
        ({"loop": BY_EPOCH["loop"]}, "train_cfg.type was 'IterBasedTrainLoop'"),
        ({"max_iters": 3}, r"has done 4, and train_cfg\.max_iters is 3"),
    ],
)
def test_resume__what_cannot_change(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=True, **change)


def test_resume__of_a_copied_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own checkpoints, not those of the run that it is a copy of."""
    run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run/iter_4.pth").write_bytes(b"")
    resumed = run(tmp_path / "copy", 8, resume=True)
    assert list(resumed) == [4, 5, 6, 7]
    output = capsys.readouterr()
    assert "copy/iter_4.pth' is taken" in output.out + output.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", r"run/iter_4\.pth' has 3 bytes"),
        (b"PK" * 40, r"run/iter_4\.pth' is cut short"),
        (
            None,
            r"last_checkpoint' names the checkpoint '.*iter_4\.pth', which",
        ),
    ],
)
def test_resume__of_no_checkpoint(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run/iter_4.pth"
    path.parent.mkdir()
    (tmp_path / "run/last_checkpoint").write_text(str(path))
    if content:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "run", resume=True)
