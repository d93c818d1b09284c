"""`stellar pretrain`: recipes in YAML, every value a command-line option."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import get_loader
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
)
from pytorch_lightning.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightly_ext.data import StellarDataModule, num_cpus
from lightly_ext.pretrain.callbacks import (
    ExportModel,
    ImagesPerSecond,
    ReportUnreadable,
    StellarProgressBar,
)
from lightly_ext.pretrain.module import StellarPretraining

RECIPES = Path(__file__).parents[1] / "recipes"
# What every recipe starts from.
BASE_RECIPE = RECIPES / "base.yaml"


class PretrainCLI(LightningCLI):
    """Lightning's command line with an output folder and `--resume`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that are ours."""
        parser.add_argument(
            "--output",
            type=str,
            default="runs/pretrain",
            help="Folder for checkpoints, logs and the exported model.",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Continue from the last checkpoint in the output folder.",
        )
        parser.link_arguments("output", "trainer.default_root_dir")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the callbacks of every run, and loggers if the recipe names none."""
        output = Path(self.config["output"])
        trainer_config = self.config_init["trainer"]
        if trainer_config["logger"] is None:
            kwargs["logger"] = [
                CSVLogger(output, name="csv"),
                TensorBoardLogger(output, name="tensorboard"),
            ]
        if not self.datamodule.knn_paths:
            kwargs["limit_val_batches"] = 0
        callbacks = trainer_config["callbacks"] or []
        kwargs["callbacks"] = [
            *callbacks,
            ModelCheckpoint(output / "checkpoints", save_last="link"),
            LearningRateMonitor(logging_interval="step"),
            ImagesPerSecond(),
            ExportModel(output / "model"),
            ReportUnreadable(),
        ]
        shown = trainer_config["enable_progress_bar"] is not False
        if shown and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"].append(StellarProgressBar())
        trainer = super().instantiate_trainer(**kwargs)
        workers = self.datamodule.num_workers
        if isinstance(trainer.accelerator, CPUAccelerator) and workers is not None:
            # Threads beyond the cores wait for each other: a step of the demo with two
            # threads and a busy loader on two cores takes ten times as long.
            free = max(1, num_cpus() - workers)
            torch.set_num_threads(min(free, torch.get_num_threads()))
        return trainer


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe into the output folder."""

    def save_config(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Writes config.yaml, which starts another run where this one was resumed."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config["resume"] = False
        self.parser.save(config, folder / "config.yaml", overwrite=True)


def main(argv: Sequence[str]) -> Trainer:
    """Runs `stellar pretrain`.

    Args:
        argv:
            Arguments behind the command. `-c` and `--config` take a file or the name of
            a recipe of this package; several are merged, later ones win.

    Returns:
        The trainer, after training.

    Raises:
        FileNotFoundError: If a recipe or the checkpoint to resume does not exist.
        FileExistsError: If the output folder holds a run and `--resume` is not given.
    """
    # `stellar` has taken its command off the arguments, so both are there on purpose.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    # Matrix products in TF32 where the GPU has it.
    torch.set_float32_matmul_precision("high")
    cli = PretrainCLI(
        StellarPretraining,
        StellarDataModule,
        args=merge_recipes(argv),
        run=False,
        save_config_callback=SaveRecipe,
        save_config_kwargs={"save_to_log_dir": False},
        parser_kwargs={
            "prog": "stellar pretrain",
            "description": f"Pretrains STELLAR. Recipes: {', '.join(recipe_names())}.",
            "default_config_files": [str(BASE_RECIPE)],
        },
    )
    checkpoint = _checkpoint(Path(cli.config["output"]), cli.config["resume"])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    return cli.trainer


def recipe_names() -> list[str]:
    """Names of the recipes in this package, for `--config`."""
    paths = [path for path in RECIPES.rglob("*.yaml") if path != BASE_RECIPE]
    return sorted(
        path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths
    )


def merge_recipes(argv: Sequence[str]) -> list[str]:
    """Makes one recipe of the base and all that `-c` and `--config` name.

    Later ones win. jsonargparse replaces arguments that are dictionaries as a whole: a
    recipe with one weight of the loss would silently drop what the base says of the
    others.

    Args:
        argv:
            Arguments behind the command.

    Returns:
        The arguments with one `--config`, in front of the options that it yields to.

    Raises:
        FileNotFoundError: If a recipe does not exist.
    """
    parser = argparse.ArgumentParser(
        "stellar pretrain", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", action="append", default=[])
    known, rest = parser.parse_known_args(argv)
    recipe: Any = {}
    for path in [BASE_RECIPE, *map(_recipe_path, known.config)]:
        recipe = _merged(recipe, get_loader("yaml")(path.read_text()) or {})
    return [f"--config={json.dumps(recipe)}", *rest]


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if old.get("class_path") != new.get("class_path", old.get("class_path")):
        return new  # the arguments of another class
    return {**old, **{k: _merged(old[k], v) if k in old else v for k, v in new.items()}}


def _recipe_path(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    raise FileNotFoundError(
        f"There is no recipe file '{name}'; recipes of the package: "
        f"{', '.join(recipe_names())}."
    )


def _checkpoint(output: Path, resume: bool) -> Path | None:
    last = output / "checkpoints" / "last.ckpt"
    if resume and not last.exists():
        raise FileNotFoundError(
            f"Nothing to resume: there is no '{last}'. Start without --resume."
        )
    if not resume and last.exists():
        raise FileExistsError(
            f"'{output}' holds a run already; continue it with --resume or choose "
            "another --output."
        )
    return last if resume else None
