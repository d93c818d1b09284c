from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import Callback
from torch.multiprocessing import ProcessRaisedException
from torchvision.io import write_png

from benchmarks.gpu.training import StepWatch
from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.pretrain import recipes
from lightly_ext.pretrain.progress import StellarProgress
from stellar_cli.__main__ import main as stellar
from stellar_plugin import Stellar

SMALL = [
    "--config=digit_boards",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.max_steps=-1",
    "--data.batch_size=4",
    "--data.num_workers=0",
    "--model.head.num_prototypes=8",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve readable images in two folders, and a broken one."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        image = torch.randint(256, (3, 60, 60), generator=generator)
        (folder / str(i % 2)).mkdir(exist_ok=True)
        write_png(image.to(torch.uint8), str(folder / str(i % 2) / f"{i}.png"))
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def run(*arguments: str | Path) -> pretrain_cli.Trainer:
    return pretrain_cli.main([*SMALL, *map(str, arguments)])


def logged(output: Path, version: int, column: str) -> list[float]:
    with (output / "csv" / f"version_{version}" / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.slow
class TestPretrain:
    def test_main__trains_logs_and_exports(
        self, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = run(
            *(f"--data.path={images}", f"--output={tmp_path}"),
            *("--trainer.max_epochs=2", "--model.lr=0.01"),
        )
        assert trainer.global_step == 2 * (13 // 4)
        for term in ("total", "reconstruction", "clustering", "alignment", "koleo"):
            assert len(logged(tmp_path, 0, f"train/{term}")) == 6
        assert all(0 <= x <= 1 for x in logged(tmp_path, 0, "health/prototype_usage"))
        assert all(1 <= x <= 32 for x in logged(tmp_path, 0, "health/token_rank"))
        assert min(logged(tmp_path, 0, "images_per_s")) > 0
        assert logged(tmp_path, 0, "unreadable_images")[-1] == 1
        assert "Skipped 1 unreadable of 13 images" in capsys.readouterr().out
        assert (tmp_path / "unreadable.txt").read_text() == f"{images}/broken.png\n"
        assert list((tmp_path / "tensorboard").rglob("events.*"))
        model = Stellar.from_pretrained(tmp_path / "model")
        trained = trainer.lightning_module.model.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained[name]), name

    def test_main__resume_continues(self, images: Path, tmp_path: Path) -> None:
        paths = (f"--data.path={images}", f"--output={tmp_path}")
        run(*paths, "--trainer.max_epochs=1")
        with pytest.raises(FileExistsError, match="--resume"):
            run(*paths, "--trainer.max_epochs=2")
        trainer = run(*paths, "--trainer.max_epochs=2", "--resume")
        assert trainer.global_step == 6
        # A recipe that resumes would be of no use to another run.
        assert not yaml.safe_load((tmp_path / "config.yaml").read_text())["resume"]
        # Steps of the second epoch only, in a log of their own.
        assert logged(tmp_path, 1, "step")[0] == 3
        config = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert config["trainer"]["max_epochs"] == 2

    def test_main__resume_is_exact_without_the_prior(
        self, images: Path, tmp_path: Path
    ) -> None:
        run(f"--data.path={images}", f"--output={tmp_path}/0", "--trainer.max_steps=1")
        prior = (tmp_path / "0" / "model").rename(tmp_path / "prior")
        output = tmp_path / "run"
        command = (
            *(f"--data.path={images}", f"--output={output}", f"--model.prior={prior}"),
            *("--trainer.max_epochs=2", "--save_every_steps=2"),
        )
        whole = run(*command)
        shutil.rmtree(prior)
        # As if the run had been killed behind step 4, inside of the second epoch.
        for path in output.glob("checkpoints/*"):
            if not path.name.startswith("step_00000004"):
                path.unlink()
        again = run(*command, "--resume")
        assert again.global_step == whole.global_step == 6
        state = again.lightning_module.state_dict()
        for name, value in whole.lightning_module.state_dict().items():
            assert torch.equal(state[name], value), name
        for column in ("train/total", "step"):
            expected = logged(output, 0, column)[-2:]
            assert logged(output, 1, column)[-2:] == expected
        config = yaml.safe_load((output / "config.yaml").read_text())
        assert config["model"]["prior"] == str(prior)
        assert not config["resume"]

    def test_main__saved_config_is_a_recipe(self, images: Path, tmp_path: Path) -> None:
        run(
            *(f"--data.path={images}", f"--output={tmp_path / 'first'}"),
            *("--trainer.max_epochs=1", "--model.mask_ratio=0.5"),
            *("--on_nonfinite=skip", "--nonfinite_limit=3"),
        )
        again = tmp_path / "second"
        trainer = pretrain_cli.main(
            [f"--config={tmp_path / 'first' / 'config.yaml'}", f"--output={again}"]
        )
        assert trainer.lightning_module.hparams["mask_ratio"] == 0.5
        guard = trainer.lightning_module.nonfinite
        assert (guard.action, guard.limit) == ("skip", 3)
        first = logged(tmp_path / "first", 0, "train/total")
        assert logged(again, 0, "train/total") == pytest.approx(first, rel=1e-4)

    def test_main__from_run(self, images: Path, tmp_path: Path) -> None:
        first, again = tmp_path / "first", tmp_path / "again"
        options = (
            *("--trainer.max_steps=1", "--model.lr=0.01", "--model.mask_ratio=0.5"),
            # The base recipe has a number.
            "--trainer.gradient_clip_val=null",
        )
        run(f"--data.path={images}", f"--output={first}", *options)
        pretrain_cli.main(
            [f"--from-run={first}", f"--output={again}", "--model.lr=0.02"]
        )
        old, new = (
            yaml.safe_load((folder / "config.yaml").read_text())
            for folder in (first, again)
        )
        assert (old["output"], new.pop("output")) == (old.pop("output"), str(again))
        assert (old["model"].pop("lr"), new["model"].pop("lr")) == (0.01, 0.02)
        assert new == old
        assert new["trainer"]["gradient_clip_val"] is None

    def test_main__online_knn(self, images: Path, tmp_path: Path) -> None:
        labelled = tmp_path / "labelled"
        for name in ("0", "1"):
            (labelled / name).mkdir(parents=True)
            for i in range(12):
                image = torch.full((3, 60, 60), 40 + 160 * int(name) + i)
                path = labelled / name / f"{i}.png"
                write_png(image.to(torch.uint8), str(path))
        output = tmp_path / "run"
        run(
            *(f"--data.path={images}", f"--output={output}"),
            *(f"--data.knn_train={labelled}", f"--data.knn_val={labelled}"),
            "--trainer.max_epochs=1",
        )
        assert logged(output, 0, "knn_top1") == [1.0]

    def test_main__resume_without_a_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = [
            "pretrain",
            "--resume",
            "--config=digit_boards",
            "--data.path=images",
        ]
        with pytest.raises(SystemExit) as ended:
            stellar([*command, f"--output={tmp_path}"])
        assert ended.value.code not in (0, None)
        assert "Nothing to resume" in capsys.readouterr().err


class Signalled(Callback):
    """Receives a signal once the trainer and its loggers are there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        trainer.logger.log_metrics({"loss": 1.0}, step=0)
        trainer.logger.save()
        os.kill(os.getpid(), self.number)


class TestFailedStart:
    @pytest.mark.parametrize(
        "options",
        [
            ("--data.path=nowhere",),
            ("--data.batch_size=14",),
            # Fails in the first step, after the loggers have begun to write.
            ("--data.transform.init_args.global_crop_size=50",),
        ],
    )
    @pytest.mark.parametrize("exists", [False, True])
    def test_main__leaves_the_folder_as_it_was(
        self, options: tuple[str, ...], exists: bool, images: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "runs" / "first"
        if exists:
            output.mkdir(parents=True)
            (output / "notes.txt").write_text("mine")
        before = sorted(tmp_path.rglob("*"))
        paths = (f"--data.path={images}", f"--output={output}")
        with pytest.raises(ValueError, match=r"no folder|fewer than one|no multiple"):
            run(*paths, "--trainer.max_steps=2", *options)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    def test_main__signal_before_training(
        self,
        number: signal.Signals,
        images: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        # A shell ignores SIGINT for what it runs in the background, these tests too.
        usual = signal.signal(number, signal.SIG_DFL)
        output = tmp_path / "runs" / "first"
        name, values = f"{__name__}.Signalled", {"number": int(number)}
        signalled = {"class_path": name, "init_args": values}
        with pytest.raises(SystemExit) as ended:
            run(
                *(f"--data.path={images}", f"--output={output}"),
                f"--trainer.callbacks={json.dumps([signalled])}",
            )
        assert ended.value.code == 128 + number
        said = capfd.readouterr().err
        assert said.count(f"{number.name}: stopped before the first step.\n") == 1
        assert list(tmp_path.iterdir()) == []
        assert signal.signal(number, usual) is signal.SIG_DFL

    def test_main__what_lightning_refuses(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"--trainer: .*max_epochs"):
            run(
                f"--data.path={images}",
                f"--output={tmp_path}",
                "--trainer.max_epochs=-7",
            )

    def test_main__what_a_message_names_is_there(
        self, images: Path, tmp_path: Path
    ) -> None:
        # Infinite in float32, in the very first step.
        loss = ("--model.loss.reconstruction_weight=1e39", "--trainer.max_steps=1")
        with pytest.raises(RuntimeError, match="at step 0") as error:
            run(f"--data.path={images}", f"--output={tmp_path}", *loss)
        assert str(tmp_path / "nonfinite.txt") in str(error.value)
        assert (tmp_path / "nonfinite.txt").exists()
        assert f"--config {tmp_path / 'config.yaml'} --resume" in str(error.value)
        assert (tmp_path / "config.yaml").exists()


class Broken(Callback):
    """Ends training in its second step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            raise OSError("Broken on purpose.")


@pytest.mark.slow
def test_main__processes_that_are_spawned(images: Path, tmp_path: Path) -> None:
    # Everything is pickled for them, and what they have begun is not taken back.
    with pytest.raises(ProcessRaisedException, match="Broken on purpose"):
        run(
            *(f"--data.path={images}", f"--output={tmp_path}"),
            *("--trainer.strategy=ddp_spawn", "--trainer.devices=2"),
            *("--trainer.max_steps=2", "--trainer.accelerator=cpu"),
            f"--trainer.callbacks=[{{class_path: {__name__}.Broken}}]",
        )
    assert len(logged(tmp_path, 0, "train/total")) == 1


class NoSyncs(Callback):
    """Makes it an error in steps 5 and 6 that the host waits for the device."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            torch.cuda.set_sync_debug_mode("default")


class TestHostSyncs:
    # Steps 3 and 7 are logged, and the epoch goes on.
    STEPS = ("--trainer.log_every_n_steps=4", "--trainer.max_steps=8")
    DATA = ("--data.batch_size=1", "--data.num_workers=1")
    BAR = ("--trainer.enable_progress_bar=true",)

    @pytest.mark.slow
    @pytest.mark.parametrize("start, stop, waits", [(4, 7, False), (7, 8, True)])
    def test_main__between_logged_steps(
        self, start: int, stop: int, waits: bool, images: Path, tmp_path: Path
    ) -> None:
        watch = {
            "class_path": "benchmarks.gpu.training.StepWatch",
            "init_args": {"device": "cpu", "counted": [start, stop]},
        }
        trainer = run(
            *(f"--data.path={images}", f"--output={tmp_path}"),
            *(*self.STEPS, *self.DATA, *self.BAR),
            f"--trainer.callbacks={json.dumps([watch])}",
        )
        assert trainer.global_step == 8
        assert any(isinstance(c, StellarProgress) for c in trainer.callbacks)
        (found,) = (c for c in trainer.callbacks if isinstance(c, StepWatch))
        assert bool(found.syncs) == waits, found.syncs

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_main__between_logged_steps_on_a_gpu(
        self, images: Path, tmp_path: Path
    ) -> None:
        try:
            trainer = run(
                *(f"--data.path={images}", f"--output={tmp_path}"),
                *(*self.STEPS, *self.DATA, *self.BAR),
                *("--trainer.accelerator=cuda", "--trainer.precision=bf16-mixed"),
                *("--trainer.gradient_clip_val=3.0", "--model.compile=false"),
                f"--trainer.callbacks=[{{class_path: {__name__}.NoSyncs}}]",
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert trainer.global_step == 8
        assert trainer.optimizers[0].defaults["fused"]


class TestRecipes:
    @pytest.mark.parametrize(
        "name, width, patch, epochs",
        [
            ("vit_base", 768, 16, 150),
            ("vit_large", 1024, 16, 100),
            ("vit_huge", 1280, 14, 50),
        ],
    )
    def test_recipe__values_of_the_paper(
        self, name: str, width: int, patch: int, epochs: int
    ) -> None:
        base = yaml.safe_load(recipes.BASE_RECIPES["stellar"].read_text())
        recipe = yaml.safe_load(Path(recipes._recipe_path(name)).read_text())
        assert recipe["trainer"]["max_epochs"] == epochs
        with torch.device("meta"):
            model = Stellar(**{**base["model"]["model"], **recipe["model"]["model"]})
        assert (model.encoder.embed_dim, model.encoder.patch_size) == (width, patch)
        assert model.encoder.num_queries == 16
        assert base["model"]["head"]["num_prototypes"] == 16384
        assert base["model"]["lr"] == 1.5e-4
        assert base["data"]["batch_size"] * 16 == 2048
