from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from lightly_ext import checkpoint_io, durable
from lightly_ext.checkpoint_io import DurableCheckpointIO
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.checkpoint_files import (
    checkpoint_to_start_from,
    damage_of,
    step_checkpoints,
)
from lightly_ext.pretrain.checkpoints import RunCheckpoint
from lightly_ext.pretrain.run_log import read_log
from lightly_ext.pretrain.signals import Interrupted
from stellar_plugin import Stellar, weight_files
from tests.pretraining import loader, tiny, trainer


def fit(
    output: Path,
    checkpoint: Path | None = None,
    every: int | None = None,
    **kwargs: Any,
) -> Trainer:
    """Trains the tiny module; an epoch has two steps."""
    fitted = trainer(
        output,
        callbacks=[RunCheckpoint(output, every)],
        plugins=[DurableCheckpointIO()],
        enable_checkpointing=True,
        **kwargs,
    )
    fitted.fit(tiny(), loader(), ckpt_path=checkpoint, weights_only=True)
    return fitted


def fit_scored(
    output: Path,
    scores: Iterator[float],
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
    **kwargs: Any,
) -> None:
    """Trains with a validation that says these accuracies in turn."""

    class Scored(StellarPretraining):
        def configure_callbacks(self) -> list[Any]:
            return [self.continuation]

        def validation_step(self, *_: Any) -> None:
            self.log("knn_top1", next(scores))

    module = tiny()
    module.__class__ = Scored
    run = trainer(
        output,
        callbacks=[*callbacks, RunCheckpoint(output)],
        plugins=[DurableCheckpointIO()],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **kwargs,
    )
    data = loader(), torch.utils.data.DataLoader([0])
    run.fit(module, *data, ckpt_path=checkpoint, weights_only=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def spy(steps: list[int], write: Callable[..., str]) -> Callable[..., str]:
    """Notes the steps of the checkpoints that are written."""

    def noted(checkpoint: dict[str, Any], path: Path) -> str:
        steps.append(checkpoint["global_step"])
        return write(checkpoint, path)

    return noted


def assert_exported(folder: Path, state: dict[str, Tensor]) -> None:
    """Holds a model with these weights, and their heads, as a whole."""
    model = Stellar.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"]), name
    saved = safetensors.torch.load_file(folder / "heads.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"sparse_head", "cls_head"}
    for name, tensor in saved.items():
        assert torch.equal(tensor, state[name]), name


class TestRunCheckpoint:
    def test_fit__steps_and_ends_of_epochs(self, tmp_path: Path) -> None:
        fit(tmp_path, every=3, max_epochs=4)
        # Steps 2, 3, 4, 6 (both) and 8.
        folder = tmp_path / "checkpoints"
        assert names(folder) == ["last.ckpt", "step_00000006", "step_00000008"]
        assert os.readlink(folder / "last.ckpt") == step_checkpoints(folder)[0].name
        assert all(damage_of(path) is None for path in folder.iterdir())
        assert_exported(tmp_path / "model", weights(folder / "last.ckpt"))
        # Whoever may read other files of the user may read these.
        (tmp_path / "file").touch()
        usual = (tmp_path / "file").stat().st_mode
        modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
        assert modes == {usual}
        assert (tmp_path / "model").lstat().st_mode == folder.lstat().st_mode

    def test_fit__ends_inside_of_an_epoch(self, tmp_path: Path) -> None:
        fit(tmp_path, max_steps=3, max_epochs=-1)
        folder = tmp_path / "checkpoints"
        assert names(folder) == ["last.ckpt", "step_00000002", "step_00000003"]
        loops = torch.load(folder / "last.ckpt", weights_only=True)["loops"]
        # The epoch is not over in it, or a resumed run would skip the other half.
        progress = loops["fit_loop"]["epoch_progress"]["current"]
        assert (progress["started"], progress["processed"]) == (2, 1)

    def test_fit__is_stopped_inside_of_an_epoch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Stop(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                trainer.should_stop = True  # from the first step on

        steps: list[int] = []
        monkeypatch.setattr(checkpoint_io, "_write", spy(steps, checkpoint_io._write))
        run = trainer(
            tmp_path,
            callbacks=[Stop(), RunCheckpoint(tmp_path)],
            plugins=[DurableCheckpointIO()],
            enable_checkpointing=True,
            max_epochs=2,
            min_epochs=0,
            min_steps=5,
        )
        run.fit(tiny(), loader(batch_size=1))
        assert steps == [5]

    def test_fit__accumulated_gradients(self, tmp_path: Path) -> None:
        fit(tmp_path, every=1, max_epochs=2, accumulate_grad_batches=2)
        folder = tmp_path / "checkpoints"
        assert names(folder) == ["last.ckpt", "step_00000001", "step_00000002"]

    def test_fit__minutes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved: list[int] = []
        monkeypatch.setattr(
            RunCheckpoint,
            "_save",
            lambda _, trainer, *__, **___: saved.append(trainer.global_step),
        )
        # Seconds at the start and after every step but the last, whose epoch ends.
        clock = iter([0.0, 1799.0, 1801.0, 1802.0, 3600.0, 3602.0, 3603.0, 3604.0])
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        callback = RunCheckpoint(tmp_path)
        run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
        run.fit(tiny(), loader(batch_size=1))
        assert saved == [2, 5, 8]

    def test_fit__a_saved_step_is_not_written_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit(tmp_path, max_epochs=1)
        (path,) = step_checkpoints(tmp_path / "checkpoints")
        before = path.stat().st_mtime_ns, path.stat().st_ino
        # Nothing is left to train, and then one step of two.
        fit(tmp_path, path, max_epochs=1)
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
        steps: list[int] = []
        monkeypatch.setattr(checkpoint_io, "_write", spy(steps, checkpoint_io._write))
        fit(tmp_path, path, every=1, max_epochs=-1, max_steps=5)
        assert steps == [3, 4, 5]

    def test_fit__no_logged_loss_is_missing_after_a_kill(self, tmp_path: Path) -> None:
        straight, killed = tmp_path / "straight", tmp_path / "killed"

        class Copy(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 3:  # saved, and not yet logged
                    shutil.copytree(straight, killed, symlinks=True)

        def losses(output: Path, *callbacks: Callback, **kwargs: Any) -> list[float]:
            run = trainer(
                output,
                callbacks=[RunCheckpoint(output, every_steps=3), *callbacks],
                plugins=[DurableCheckpointIO()],
                enable_checkpointing=True,
                max_epochs=2,
                logger=CSVLogger(output, name="csv"),
                log_every_n_steps=1,
            )
            run.fit(tiny(), loader(), weights_only=True, **kwargs)
            return list(read_log(output / "csv")["loss"].items())

        expected = losses(straight, Copy())
        assert [step for step, _ in expected] == [0, 1, 2, 3]
        left = read_log(killed / "csv")["loss"]
        assert list(left.items()) == expected[:2]
        last = killed / "checkpoints" / "last.ckpt"
        assert losses(killed, ckpt_path=last) == expected

    def test_fit__moved_and_resumed_twice(self, tmp_path: Path) -> None:
        output = tmp_path / "0"
        fit(output, max_epochs=1)
        for epoch in (1, 2):
            output = output.rename(tmp_path / str(epoch))
            start = checkpoint_to_start_from(output, True)
            run = fit(output, start, max_epochs=epoch + 1)
            assert run.global_step == 2 * (epoch + 1)
            kept = [f"step_{2 * (epoch + i):08d}" for i in (0, 1)]
            assert names(output / "checkpoints") == ["last.ckpt", *kept]

    def test_fit__best_by_online_knn(self, tmp_path: Path) -> None:
        scores = iter([0.5, 0.75, 0.25, 0.75, 0.625])
        fit_scored(tmp_path, scores, max_epochs=3)
        folder = tmp_path / "checkpoints"
        assert os.readlink(folder / "best.ckpt").startswith("step_00000004-")
        last = checkpoint_to_start_from(tmp_path, True)
        fit_scored(tmp_path, scores, last, max_epochs=5)
        # Another 0.75 is no better; the score was kept over the resume.
        assert os.readlink(folder / "best.ckpt").startswith("step_00000004-")
        kept = [f"step_{step:08d}" for step in (4, 8, 10)]
        assert names(folder) == ["best.ckpt", "last.ckpt", *kept]

    def test_fit__best_in_mid_epoch(self, tmp_path: Path) -> None:
        scores = iter([0.5, 0.25, 0.75, 0.625, 0.5, 0.5])
        fit_scored(tmp_path, scores, max_epochs=3, val_check_interval=1)
        folder = tmp_path / "checkpoints"
        assert os.readlink(folder / "best.ckpt").startswith("step_00000003-")
        kept = [f"step_{step:08d}" for step in (3, 4, 6)]
        assert names(folder) == ["best.ckpt", "last.ckpt", *kept]

    def test_fit__signal_at_the_end_of_an_epoch(self, tmp_path: Path) -> None:
        class Terminate(Callback):
            def on_train_epoch_end(self, *_: Any) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

        scores = iter([0.25, 0.75])
        with pytest.raises(Interrupted):
            fit_scored(tmp_path, scores, callbacks=[Terminate()], max_epochs=2)
        # Saved once, as an epoch that has ended.
        (path,) = step_checkpoints(tmp_path / "checkpoints")
        position = torch.load(path, weights_only=True)["position"]
        assert (position["steps"], position["ended"]) == (2, True)
        fit_scored(tmp_path, scores, path, max_epochs=2)
        assert (
            step_checkpoints(tmp_path / "checkpoints")[0].name[:13] == "step_00000004"
        )

    def test_fit__best_after_a_signal_in_validation(self, tmp_path: Path) -> None:
        class Terminate(Callback):
            def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)

        scores = iter([0.25, 0.75, 0.5])
        with pytest.raises(Interrupted):
            fit_scored(tmp_path, scores, callbacks=[Terminate()], max_epochs=3)
        folder = tmp_path / "checkpoints"
        assert os.readlink(folder / "best.ckpt").startswith("step_00000002-")
        fit_scored(
            tmp_path, scores, checkpoint_to_start_from(tmp_path, True), max_epochs=3
        )
        assert os.readlink(folder / "best.ckpt").startswith("step_00000004-")
        kept = [f"step_{step:08d}" for step in (4, 6)]
        assert names(folder) == ["best.ckpt", "last.ckpt", *kept]

    @pytest.mark.parametrize("full", ["checkpoint", "model"])
    def test_fit__full_disk(
        self, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit(tmp_path, max_epochs=1)
        before = files(tmp_path)

        def fail(*_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        start = checkpoint_to_start_from(tmp_path, True)
        if full == "checkpoint":
            monkeypatch.setattr(checkpoint_io._Hashed, "write", fail)
        else:
            monkeypatch.setattr(weight_files, "save_file", fail)
        with pytest.raises(OSError, match="No space left") as error:
            fit(tmp_path, start, max_epochs=2)
        after = files(tmp_path)
        if full == "model":  # which comes second
            start = checkpoint_to_start_from(tmp_path, True)
            assert start is not None and start.name.startswith("step_00000004-")
            content = after.pop(f"checkpoints/{start.name}")
            assert after["checkpoints/last.ckpt"] == content
            after["checkpoints/last.ckpt"] = before["checkpoints/last.ckpt"]
        assert after == before
        config = tmp_path / "config.yaml"
        for text in ("Step 4", str(start), "is intact", f"--config {config} --resume"):
            assert text in str(error.value)

    def test_fit__non_finite_weights(self, tmp_path: Path) -> None:
        fit(tmp_path, max_epochs=1)
        before = files(tmp_path)
        start = checkpoint_to_start_from(tmp_path, True)

        class Damage(Callback):
            """Weights that no step has made so."""

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                if trainer.is_last_batch:
                    pl_module.model.encoder.vit.norm.bias.data.fill_(torch.nan)

        run = trainer(
            tmp_path,
            max_epochs=2,
            callbacks=[Damage(), RunCheckpoint(tmp_path)],
            plugins=[DurableCheckpointIO()],
            enable_checkpointing=True,
        )
        module = tiny()
        with pytest.raises(RuntimeError, match=r"encoder\.vit\S+ is not finite"):
            run.fit(module, loader(), ckpt_path=start, weights_only=True)
        assert files(tmp_path) == before

    @pytest.mark.parametrize("arguments", [{"every_steps": 0}, {"every_minutes": -1.0}])
    def test_init__errors(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        (name,) = arguments
        with pytest.raises(ValueError, match=f"save_{name} must be positive"):
            RunCheckpoint(tmp_path, **arguments)


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder, links by their targets."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# What changes a folder, and what audit hooks are told before it.
CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.symlink", "os.chmod")


class Kill:
    """Ends the process at the n-th moment of a save; they are found as they come.

    Before each call that changes the folder, and inside and after those of which Python
    says nothing.
    """

    def __init__(self, number: int) -> None:
        self.left = number
        self.writes = 0

    def moment(self) -> None:
        if self.left == 0:
            os._exit(1)
        self.left -= 1

    def arm(self) -> None:
        sys.addaudithook(self._hear)
        weight_files.save_file = self._save_in_pieces
        # The disk is not waited for: the system keeps what a killed process wrote.
        os.fsync = self._around(lambda descriptor: None)
        durable._exchange = self._around(durable._exchange)
        write = checkpoint_io._Hashed.write

        def killed(file: Any, data: Any) -> int:
            # Into a file without its name yet: all are alike, and there are thousands.
            self.writes += 1
            if self.writes % 200 == 1:
                self.moment()
            return write(file, data)

        checkpoint_io._Hashed.write = killed

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            self.moment()

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*arguments: Any) -> Any:
            self.moment()
            result = function(*arguments)
            self.moment()
            return result

        return killed

    def _save_in_pieces(self, state: Any, path: Any, metadata: Any) -> None:
        data = safetensors.torch.save(state, metadata)
        with Path(path).open("wb", buffering=0) as file:
            for piece in (data[:100], data[100:]):
                self.moment()
                file.write(piece)
        self.moment()


def assert_one_of(found: dict[str, Tensor], **states: dict[str, Tensor]) -> str:
    """Name of the state that all these tensors are from."""
    equal = {
        name: all(torch.equal(tensor, state[key]) for key, tensor in found.items())
        for name, state in states.items()
    }
    (name,) = [name for name, is_equal in equal.items() if is_equal]
    return name


def in_a_child(function: Callable[..., None], *arguments: Any) -> int:
    """Status of a process that runs a function."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class TestKill:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "first, plain", [(False, False), (False, True), (True, False)]
    )
    def test_save__killed_at_every_moment(
        self, first: bool, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if plain:  # a file system without links and exchange
            monkeypatch.setattr(durable, "_exchange", lambda *_: False)
            error = OSError(errno.EPERM, "no links")
            monkeypatch.setattr(os, "symlink", Mock(side_effect=error))
        before = tmp_path / "before"
        run = fit(before, every=1, max_steps=2)
        module = run.lightning_module
        if first:
            shutil.rmtree(before)
            before.mkdir()
            run.checkpoint_callback._newest = []
        (before / "config.yaml").touch()
        old, new = ({k: v + i for k, v in module.state_dict().items()} for i in (0, 1))

        kept = ["step_00000003"] if first else ["step_00000002", "step_00000003"]

        def save(output: Path, number: int | None = None) -> None:
            module.load_state_dict(new)
            steps = run.fit_loop.epoch_loop.automatic_optimization.optim_progress
            steps.optimizer.step.total.completed = 3
            run.checkpoint_callback.output = output
            run.checkpoint_callback._newest = [
                output / "checkpoints" / path.name
                for path in run.checkpoint_callback._newest
            ]
            run.checkpoint_callback._score = 0.5
            if number is not None:
                Kill(number).arm()
            run.checkpoint_callback._save(run)

        number, status, ages, models, leftovers = 0, 1, {}, [], set()
        while status == 1:
            output = tmp_path / str(number)
            shutil.copytree(before, output, symlinks=True)
            status = in_a_child(save, output, number)
            start = checkpoint_to_start_from(output, True)
            content = None if start is None else start.read_bytes()
            if content not in ages:
                ages[content] = "none"
                if start is not None:
                    ages[content] = assert_one_of(weights(start), old=old, new=new)
            if (output / "model").exists() or not first:
                model = files(output / "model")
                if model not in models:
                    models.append(model)
                    heads = safetensors.torch.load(model["heads.safetensors"])
                    age = assert_one_of(heads, old=old, new=new)
                    assert_exported(output / "model", {"old": old, "new": new}[age])
            # The next save takes away what was left.
            left = tuple(path.name for path in sorted(output.rglob(".*")))
            if left not in leftovers:
                leftovers.add(left)
                assert in_a_child(save, output) == 0
                assert names(output / "checkpoints") == [
                    "best.ckpt",
                    "last.ckpt",
                    *kept,
                ]
                assert names(output) == ["checkpoints", "config.yaml", "model"]
            shutil.rmtree(output)
            number += 1
        assert status == 0
        assert number > 40
        assert sorted(ages.values()) == ["new", "none" if first else "old"]
        assert len(models) == (1 if first else 2)
        assert len(leftovers) > 3

    def test_save__files_are_on_the_disk_before_they_have_their_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced, moved = set(), []
        fsync, replace, exchange = os.fsync, os.replace, durable._exchange

        def noted(descriptor: int) -> None:
            synced.add(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        def check(source: Path) -> None:
            paths = [source, *source.iterdir()] if source.is_dir() else [source]
            if not source.is_symlink():
                moved.append(source.name)
                assert {path.stat().st_ino for path in paths} <= synced

        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(os, "replace", lambda a, b: (check(a), replace(a, b)))
        monkeypatch.setattr(
            durable, "_exchange", lambda a, b: (check(a), exchange(a, b))[1]
        )
        fit(tmp_path, max_epochs=2)
        steps = (f".step_0000000{i}-{{sha256}}.ckpt.partial" for i in (2, 4))
        assert moved == [name for step in steps for name in (step, ".model.partial")]
