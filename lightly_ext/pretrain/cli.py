"""`stellar pretrain`: recipes in YAML, every value a command-line option."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar
from pytorch_lightning.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.checkpoint_io import DurableCheckpointIO
from lightly_ext.data import StellarDataModule, num_cpus
from lightly_ext.data.listing import printable
from lightly_ext.durable import replace_text
from lightly_ext.pretrain.callbacks import (
    ImagesPerSecond,
    ReportUnreadable,
)
from lightly_ext.pretrain.checkpoint_files import (
    checkpoint_to_start_from,
)
from lightly_ext.pretrain.checkpoints import RunCheckpoint
from lightly_ext.pretrain.derived import flat, resolved, table
from lightly_ext.pretrain.mae import MAEPretraining
from lightly_ext.pretrain.module import StellarPretraining
from lightly_ext.pretrain.next_steps import next_steps
from lightly_ext.pretrain.options import check_groups
from lightly_ext.pretrain.processes import (
    check_machines,
    lost_processes_named,
    note_launch,
)
from lightly_ext.pretrain.progress import LogInterval, StellarProgress
from lightly_ext.pretrain.recipes import (
    BASE_RECIPES,
    RUN_RECIPE,
    merge_recipes,
    recipe_names,
    recipe_of,
)
from lightly_ext.pretrain.resume import without_start
from lightly_ext.pretrain.run_folder import FailedStart, signals_end_start
from lightly_ext.pretrain.run_log import RunLogger
from lightly_ext.pretrain.sharding import check_strategy
from lightly_ext.pretrain.signals import was_requeued
from lightly_ext.pretrain.story import RunStory
from lightly_ext.run_lock import LEASE, RunLock
from stellar_cli.errors import raise_errors

# Options of the run that classes get as arguments, too.
LINKED = {
    "output": "trainer.default_root_dir",
    "on_nonfinite": "model.on_nonfinite",
    "nonfinite_limit": "model.nonfinite_limit",
}
METHODS = {method.METHOD: method for method in (StellarPretraining, MAEPretraining)}


class PretrainCLI(LightningCLI):
    """Lightning's command line with an output folder and `--resume`.

    Parses first and builds later, so that a run can be refused in between.

    Args:
        args:
            Arguments of the command, with one recipe, see `merge_recipes`.
    """

    def __init__(self, args: Sequence[str]) -> None:
        # `stellar` has taken its command off the arguments: both are there on purpose.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        # What is logged at ends of epochs is that of all processes already.
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")
        # Of the size in MB that its table of the model names.
        warnings.filterwarnings("ignore", "Precision .* not supported by the model")
        # The momentum teacher and a frozen tokenizer are, on purpose.
        warnings.filterwarnings("ignore", r"Found .* module\(s\) in eval mode")
        name = recipe_of(args)["method"]
        super().__init__(
            METHODS[name],
            StellarDataModule,
            args=list(args),
            run=False,
            save_config_callback=SaveRecipe,
            parser_kwargs={
                "prog": "stellar pretrain",
                "description": "Pretrains STELLAR, or its prior. Recipes: "
                f"{', '.join(recipe_names())}.",
                "default_config_files": [str(BASE_RECIPES[name])],
            },
        )
        check_groups(self.config["model"], METHODS[name].GROUPS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the options, and puts numbers where the recipe says `auto`."""
        recipe, options = recipe_of(args), args[1:]

        def parse(recipe: dict[str, Any]) -> dict[str, Any]:
            # Without defaults, which would look like values that are given.
            linked = {name: parser.get_default(name) for name in LINKED}
            told = [f"--config={json.dumps({**linked, **recipe})}", *options]
            return parser.parse_args(told, defaults=False).as_dict()

        recipe, derived = resolved(recipe, parse)
        super().parse_arguments(parser, [f"--config={json.dumps(recipe)}", *options])
        values = dict(flat(self.config.as_dict()))
        # An option may have replaced a whole group.
        self.derived = {k: d for k, d in derived.items() if values.get(k) == d.value}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes the parser, whose errors are raised."""
        parser = super().init_parser(**kwargs)
        raise_errors(parser)
        return parser

    def instantiate_classes(self) -> None:
        """Leaves it to `build`."""

    def build(self, *callbacks: Callback, checkpoint: Path | None = None) -> Trainer:
        """Makes data, model and trainer.

        Args:
            callbacks:
                Callbacks of the trainer, beside those of every run.
            checkpoint:
                Of the run to continue, or None. The files that it began with are not
                read again.

        Returns:
            The trainer.
        """
        recipe = self.config.clone()
        if checkpoint is not None:
            starts = without_start(self.config["model"], checkpoint)
            for name, value in starts.items():
                recipe["model"][name] = value
        super().instantiate_classes()
        trainer: Any = self.trainer
        trainer.callbacks.extend(callbacks)
        for callback in trainer.callbacks:
            if isinstance(callback, SaveRecipe):
                callback.config = recipe  # of a run from the start
        return trainer

    @rank_zero_only
    def say_what_follows(self) -> None:
        """Shows what `auto` became, and what a start from random weights lacks."""
        if not self.derived:
            return
        model, given = self.config["model"], self.config["data"]["path"]
        path = shlex.quote(str(given))
        print(
            f"From {printable(given)} and this machine follow, where the recipe says "
            f"auto:\n{table(self.derived)}\n"
            "A value of your own wins (--data.batch_size 32), and others follow it."
        )
        if self.config["method"] == "stellar" and not (
            model["prior"] or model["weights"]
        ):
            print(
                "No --model.prior: training starts from random weights. A prior of the "
                "same images helped where it was measured (docs/learning.md):\n"
                f"  stellar pretrain --config photos_prior --data.path {path}\n"
                f"  stellar pretrain --config photos --data.path {path} "
                "--model.prior runs/photos_prior/model\n"
                "or public weights, --model.prior timm:vit_small_patch16_224.dino"
            )

    @rank_zero_only
    def say_what_was_made(self) -> None:
        """Says where everything is, and what to type next."""
        output = Path(self.config["output"])
        commands = next_steps(output, self.datamodule, self.config["method"])
        lines = [f"  to {purpose}: {text}" for purpose, text in commands.items()]
        print(
            f"Everything is in {output}: look at index.html or summary.md. Go on with\n"
            + "\n".join(lines)
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that are ours."""
        parser.add_argument(
            "--method",
            type=Literal[tuple(METHODS)],
            default="stellar",
            help="What is trained: STELLAR, or the masked autoencoder before it.",
        )
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
        parser.add_argument(
            "--save_every_steps",
            type=int | None,
            default=None,
            help="Save after so many steps too, beside the ends of epochs.",
        )
        parser.add_argument(
            "--save_every_minutes",
            type=float | None,
            default=30.0,
            help="Save when so many minutes have passed since the last time.",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=Literal["stop", "skip"],
            default="stop",
            help="What to do in a step whose loss or gradient is not finite: stop "
            "training, or skip the step. Neither lets it reach a weight.",
        )
        parser.add_argument(
            "--nonfinite_limit",
            type=int,
            default=10,
            help="Number of such steps in a row at which skip ends training, too.",
        )
        for name, argument in LINKED.items():
            parser.link_arguments(name, argument)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the callbacks of every run, and loggers if the recipe names none."""
        output = Path(self.config["output"])
        trainer_config = self.config_init["trainer"]
        check_strategy(trainer_config["strategy"])
        if trainer_config["logger"] is None:
            kwargs["logger"] = [
                RunLogger(output, name="csv"),
                TensorBoardLogger(output, name="tensorboard"),
            ]
        if not self.datamodule.knn_paths:
            kwargs["limit_val_batches"] = 0
        callbacks = trainer_config["callbacks"] or []
        interval = trainer_config["log_every_n_steps"]
        # Lightning warns of intervals before the steps are known.
        kwargs["log_every_n_steps"] = interval or 1
        kwargs["callbacks"] = [
            LogInterval(interval),
            *callbacks,
            RunCheckpoint(
                output,
                self.config["save_every_steps"],
                self.config["save_every_minutes"],
            ),
            LearningRateMonitor(logging_interval="step"),
            ImagesPerSecond(),
            ReportUnreadable(output / "unreadable.txt"),
        ]
        plugins = trainer_config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, DurableCheckpointIO()]
        shown = trainer_config["enable_progress_bar"] is not False
        if shown and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"].append(StellarProgress())
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            raise ValueError(f"--trainer: {error}") from error
        workers = self.datamodule.num_workers
        if isinstance(trainer.accelerator, CPUAccelerator) and workers is not None:
            # Threads beyond the cores wait for each other: a step of the demo with two
            # threads and a busy loader on two cores takes ten times as long.
            free = max(1, num_cpus() - workers)
            torch.set_num_threads(min(free, torch.get_num_threads()))
        return trainer


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe into the output folder."""

    def setup(self, *_: Any, **__: Any) -> None:
        """Writes nothing yet: the start may still fail."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes config.yaml, which starts another run where this one was resumed."""
        note_launch(Path(self.config["output"]))
        if trainer.is_global_zero:
            config = self.config.clone()
            config["resume"] = False
            path = Path(config["output"]) / RUN_RECIPE
            # With null, which may stand against a number of the base recipe.
            replace_text(path, self.parser.dump(config, skip_unset=False))


def main(argv: Sequence[str], *callbacks: Callback) -> Trainer:
    """Runs `stellar pretrain`.

    Args:
        argv:
            Arguments behind the command. `-c` and `--config` take a file or the name of
            a recipe of this package; several are merged, later ones win.
        callbacks:
            Callbacks of the trainer for this time alone: no recipe repeats them, and
            whoever gives them says what follows and what comes next.

    Returns:
        The trainer, after training.

    Raises:
        OptionError: If an option or a recipe does not exist.
        FileNotFoundError: If there is no checkpoint to resume.
        FileExistsError: If the output folder holds a run and `--resume` is not given,
            or is no folder.
        ValueError: If the checkpoints to resume are damaged.
        OSError: If a checkpoint cannot be written.
        RuntimeError: If a run into the folder is going on, or another process of this
            one is lost.
        Interrupted: After a signal, once the run is saved.
        SystemExit: After a signal before training.
    """
    # Matrix products in TF32 where the GPU has it.
    torch.set_float32_matmul_precision("high")
    with signals_end_start():
        cli = PretrainCLI(merge_recipes(argv))
        folder = Path(cli.config["output"])
        check_machines(cli.config["trainer"]["num_nodes"])
        with (
            lost_processes_named(),
            RunLock(folder, LEASE if was_requeued() else 0.0),
            FailedStart(folder) as start,
            RunStory(folder, argv, cli.derived) as story,
        ):
            checkpoint = checkpoint_to_start_from(
                folder, cli.config["resume"], cli.config["method"]
            )
            if not callbacks:
                cli.say_what_follows()
            trainer = cli.build(story, start, *callbacks, checkpoint=checkpoint)
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    if not callbacks:
        cli.say_what_was_made()
    return trainer
