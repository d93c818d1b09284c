"""Several processes train as one does, and know what they have to share."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.pretrain.checkpoint_files import checkpoint_to_start_from
from lightly_ext.pretrain.processes import (
    RANKS,
    check_alike,
    check_machines,
    lost_processes_named,
    note_launch,
    was_relaunched,
)
from stellar_cli.__main__ import main
from tests.distributed import FORKSERVER, say_as_torchrun
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
    TINY_OPTIONS,
    assert_same_training,
    tiny,
    tiny_mae,
    trainer,
)

PROCESSES = "lightly_ext.pretrain.processes"
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


class Kill(Callback):
    """Ends the second process in its third step, as a lack of memory does."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def pretrain_as_torchrun(folder: Path, rank: int, port: int) -> None:
    """`stellar pretrain` in one of two processes; its messages go into a file."""
    warnings.simplefilter("ignore")
    say_as_torchrun(rank, 2)
    os.environ |= {"MASTER_PORT": str(port), "TMPDIR": str(folder)}
    rank_zero_only.rank = rank
    sys.stderr = (folder / f"{rank}.txt").open("w")
    options = {
        "data.path": folder / "images",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "output": folder / "run",
        "trainer.devices": 2,
        "trainer.accelerator": "cpu",
        "trainer.callbacks": f"[{__name__}.Kill]",
        "trainer.enable_progress_bar": "false",
        "save_every_steps": 1,
    }
    views = {"global_crop_size": 32, "local_crop_size": 16}
    options["data.transform"] = f"{{class_path: STELLARTransform, init_args: {views}}}"
    given = [f"--{name}={value}" for name, value in options.items()]
    main(["pretrain", *TINY_OPTIONS, *given])


@pytest.mark.slow
def test_pretrain__a_process_is_killed(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", 14)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    started = [
        FORKSERVER.Process(target=pretrain_as_torchrun, args=(tmp_path, rank, port))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    said = (tmp_path / "0.txt").read_text()
    assert [process.exitcode for process in started] == [1, -signal.SIGKILL], said
    assert "Process 0 has lost another process of the run, which has ended" in said
    # The last save is that of step 1 or 2: the second process may end before it.
    config = tmp_path / "run" / "config.yaml"
    assert "'step_0000000" in said
    assert f"was saved last; go on with: stellar pretrain --config {config}" in said
    assert "Traceback" not in said


class TestCheckMachines:
    @pytest.fixture(autouse=True)
    def no_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        for name in RANKS:
            monkeypatch.delenv(name, raising=False)

    def test_check_machines__nothing_says_which(self) -> None:
        check_machines(1)
        with pytest.raises(ValueError, match=r"num_nodes 2: .*torchrun or srun"):
            check_machines(2)

    @pytest.mark.parametrize(
        ("said", "rank"),
        [
            ({"NODE_RANK": "0"}, 0),
            ({"NODE_RANK": "3"}, 3),
            ({"RANK": "0", "NODE_RANK": "3"}, 0),
            ({"SLURM_PROCID": "0"}, 0),
        ],
    )
    def test_check_machines__the_first_process(
        self, said: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        check_machines(4)
        assert rank_zero_only.rank == rank


class TestCheckAlike:
    def of_two(self, monkeypatch: pytest.MonkeyPatch, **other: Any) -> SimpleNamespace:
        """A trainer, beside one on another machine that differs in this."""
        mine = {"data.path": "/a", "data.batch_size": 4, "data.images": "8 images (1)"}
        monkeypatch.setattr(f"{PROCESSES}.options", lambda _: dict(mine))

        def gathered(value: tuple[str, dict[str, Any]]) -> list[Any]:
            return [("one", value[1]), ("two", {**value[1], **other})]

        monkeypatch.setattr(f"{PROCESSES}.gathered", gathered)
        return SimpleNamespace(ckpt_path="/run/checkpoints/step_4.ckpt")

    def test_check_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_alike(self.of_two(monkeypatch))
        check_alike(self.of_two(monkeypatch, **{"data.path": "/b"}))

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("data.images", "9 images (2)", "is 8 images (1) in process 0 on one, 9 "),
            ("data.batch_size", 2, "is 4 in process 0 on one, 2 in process 1 on two"),
            ("torch", "2.0", "2.0 in process 1 on two"),
            ("checkpoint to go on from", None, "is step_4.ckpt in process 0 on one, "),
        ],
    )
    def test_check_alike__differs(
        self, name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = self.of_two(monkeypatch, **{name: value})
        with pytest.raises(ValueError, match="processes of the run differ") as error:
            check_alike(trainer)
        assert f"differ: {name} is" in str(error.value)
        assert said in str(error.value)


class TestWasRelaunched:
    def test_was_relaunched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        monkeypatch.setattr("os.getppid", lambda: 7)
        note_launch(tmp_path)  # without torchrun
        assert not was_relaunched(tmp_path)
        assert not any(tmp_path.iterdir())
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        assert not was_relaunched(tmp_path)
        other = "none elsewhere 9"
        monkeypatch.setattr(f"{PROCESSES}.gathered", lambda mine: [other, mine, mine])
        note_launch(tmp_path)
        text = (tmp_path / ".launch").read_text()
        assert text == f"{other}\nnone {platform.node()} 7\n"
        assert was_relaunched(tmp_path)
        # Another torchrun, later.
        monkeypatch.setattr("os.getppid", lambda: 8)
        assert not was_relaunched(tmp_path)

    def test_checkpoint_to_start_from(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        (tmp_path / "config.yaml").touch()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with pytest.raises(FileExistsError, match="holds a run already"):
            checkpoint_to_start_from(tmp_path, False)
        note_launch(tmp_path)
        assert checkpoint_to_start_from(tmp_path, False) is None  # at step 0


class TestLostProcessesNamed:
    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (
                RuntimeError(
                    "[/a/gloo/transport/tcp/pair.cc:5] Connection closed by peer "
                    "[10.0.0.2]:43. This is typically caused by a remote worker."
                ),
                "(Connection closed by peer [10.0.0.2]:43)",
            ),
            (
                RuntimeError(
                    "[/a/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting "
                    "8000ms for recv operation to complete. This is typical."
                ),
                "(Timed out waiting 8000ms for recv operation to complete)",
            ),
            (dist.DistNetworkError("Broken pipe"), "(Broken pipe)"),
        ],
    )
    def test_lost_processes_named(self, error: RuntimeError, reason: str) -> None:
        vars(error)["__notes__"] = ["Go on."]
        with (
            pytest.raises(RuntimeError, match="has lost another process") as told,
            lost_processes_named(),
        ):
            raise error
        assert reason in str(told.value)
        assert vars(told.value)["__notes__"] == ["Go on."]

    def test_lost_processes_named__others_stay(self) -> None:
        with pytest.raises(RuntimeError, match=r"^Bad$"), lost_processes_named():
            raise RuntimeError("Bad")
