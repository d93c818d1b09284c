"""What every evaluation needs: a model, devices, a place for results."""

from __future__ import annotations

import copy
import datetime
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from lightly_ext.data import num_cpus
from lightly_ext.evaluate.frozen_model import FrozenModel, load_frozen_model
from lightly_ext.evaluate.images import EvaluationImages, Sample
from lightly_ext.evaluate.result import Result, shown_value
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import model_config, read_checkpoint
from stellar_plugin.protocols import Protocol

T = TypeVar("T")
P = TypeVar("P", bound=Protocol)
PACKAGES = ("stellar-plugin", "torch", "torchvision", "timm", "torchmetrics")


class Session:
    """One run of an evaluation: its model, its devices and its folder.

    Args:
        model:
            What to evaluate: file, folder, "stellar-b16", hub repository or "timm:NAME"
            (ViT or not), of any layout that is read; "patches" is no model at all.
        weights:
            Weight file of a timm model, instead of timm's own weights.
        untrained:
            Evaluate the same architecture with random weights, drawn by the seed.
        name:
            Name of the model in tables. None makes one of `model`.
        output:
            Folder for results and cached features.
        batch_size:
            Number of images that a device computes at once; changes no score.
        num_workers:
            Processes that read images, per device. None shares the CPU cores.
        accelerator:
            "auto", "cpu" or "cuda".
        devices:
            Number of devices; each computes a share of the images.
        precision:
            Precision of the encoder.
        resize:
            Length of the shorter side after resizing in px, instead of the protocol's.
        crop:
            Side of the crop in px, instead of the protocol's.
        limit:
            Use so many images of each part only, to try things out.
        seed:
            Decides on everything random.

    Raises:
        ValueError: If an option is impossible.
    """

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        untrained: bool = False,
        name: str | None = None,
        output: str = "runs/evaluate",
        batch_size: int = 64,
        num_workers: int | None = None,
        accelerator: str = "auto",
        devices: int = 1,
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        resize: int | None = None,
        crop: int | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        for option, value in {
            "batch_size": batch_size,
            "devices": devices,
            "resize": resize,
            "crop": crop,
            "limit": limit,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}.")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
        self.source = model
        self.weights = weights
        self.untrained = untrained
        self.name = _table_name(name or _short_name(weights or model), untrained)
        self.output = Path(output)
        self.batch_size = batch_size
        self.num_workers = (
            max(1, num_cpus() // (2 * devices)) if num_workers is None else num_workers
        )
        self.precision = precision
        self.seed = seed
        options = {"resize": resize, "crop": crop, "limit": limit}
        self._options = {k: v for k, v in options.items() if v is not None}
        self.console = Console()
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision=precision,
        )
        self.fabric.launch()
        self.fabric.seed_everything(seed, verbose=False)
        if self.fabric.device.type == "cpu":
            # Threads beyond the cores wait for each other.
            free = max(1, num_cpus() // devices - self.num_workers)
            torch.set_num_threads(min(free, torch.get_num_threads()))

    @cached_property
    def model(self) -> FrozenModel:
        """The encoder, on the device.

        Raises:
            FileNotFoundError: If there are no weights.
            ValueError: If they are of no known layout.
        """
        model = load_frozen_model(self.source, self.weights, self.untrained, self.seed)
        return model.to(self.fabric.device)

    def with_model(self, model: str) -> Session:
        """The same session with another model, for comparisons."""
        other = copy.copy(self)
        other.__dict__.pop("model", None)  # of cached_property
        other.source, other.weights = model, None
        other.name = _table_name(_short_name(model), self.untrained)
        return other

    def load_stellar(self) -> Stellar:
        """The whole model with decoder, on the device, without gradients.

        Its encoder has the weights of `self.model`.

        Raises:
            ValueError: If the model is not STELLAR.
        """
        if self.model.origin.method != "STELLAR":
            raise ValueError(
                f"This needs a STELLAR model with its decoder, '{self.source}' is "
                f"{self.model.origin.method}."
            )
        if self.untrained:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)  # as in load_frozen_model
                model = Stellar(**model_config(read_checkpoint(self.source))).eval()
        else:
            model = Stellar.from_pretrained(self.source)
        return model.requires_grad_(False).to(self.fabric.device)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.fabric.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.fabric.world_size

    def protocol(self, protocol: P, **fields: Any) -> P:
        """A protocol as the options of this run change it, those that it knows."""
        options = {k: v for k, v in self._options.items() if hasattr(protocol, k)}
        return protocol.replace(**{**options, **fields})

    @property
    def limit(self) -> int | None:
        """Number of images of each part that is used, None for all."""
        return self._options.get("limit")

    def loader(
        self,
        images: EvaluationImages,
        chosen: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> DataLoader[Sample]:
        """Loads images in the given order; batches are `Sample`s of tensors.

        Args:
            images:
                The images.
            chosen:
                Numbers of the images to load. None loads the share of this process,
                every `world_size`-th image.
            batch_size:
                Images in a batch, `self.batch_size` by default.
        """
        if chosen is None:
            chosen = range(self.rank, len(images), self.world_size)
        return DataLoader(
            Subset(images, chosen),
            batch_size=batch_size or self.batch_size,
            num_workers=self.num_workers if len(chosen) > self.batch_size else 0,
            pin_memory=self.fabric.device.type == "cuda",
        )

    def progress(self, steps: Iterable[T], text: str, total: int) -> Iterable[T]:
        """Shows a progress bar in the first process."""
        return track(
            steps,
            description=text,
            total=total,
            console=self.console,
            disable=self.rank > 0,
        )

    def say(self, text: str) -> None:
        """Prints in the first process."""
        if self.rank == 0:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def announce(self, protocol: Protocol) -> None:
        """Prints the card of a protocol, before the work."""
        lines = [f"  {k}: {shown_value(v)}" for k, v in protocol.card().items()]
        self.say("\n".join([f"Protocol, {self.name}:", *lines]))

    def result(
        self,
        task: str,
        data: str,
        protocol: Protocol,
        scores: dict[str, Any],
        **provenance: Any,
    ) -> Result:
        """Puts scores, card and provenance together.

        Args:
            task:
                Name of the task.
            data:
                Name of the data set.
            protocol:
                The protocol as it was run.
            scores:
                Numbers by name, fractions in 0 to 1.
            provenance:
                What is special to this run: chosen values, numbers of images.
        """
        return Result(
            task,
            self.name,
            data,
            scores,
            protocol.card(),
            {**provenance, **self._provenance()},
        )

    def folder(self, result: Result) -> Path:
        """Folder of a result: the same for the same run, another for any other."""
        parts = (result.task, _slug(result.data), _slug(result.model), result.digest)
        return self.output / "-".join(parts)

    def save(self, result: Result) -> Path:
        """Writes a result into its folder, in the first process, and prints it.

        Returns:
            The folder.
        """
        folder = self.folder(result)
        if self.rank == 0:
            result.save(folder)
            scores = ", ".join(
                f"{k} {shown_value(v)}" for k, v in result.scores.items()
            )
            self.say(f"{result.task}, {result.model} on {result.data}: {scores}")
            self.say(f"Stored in {folder}.")
        self.fabric.barrier()
        return folder

    def _provenance(self) -> dict[str, Any]:
        origin = self.model.origin
        return {
            "model": origin.source,
            "method": origin.method,
            "sha256": origin.sha256,
            "mean": origin.mean,
            "std": origin.std,
            "interpolation": origin.interpolation,
            "num_queries": self.model.num_queries,
            "seed": self.seed,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "device": f"{self.world_size} x {_device_name(self.fabric.device)}",
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["stellar", *sys.argv[1:]]),
        }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def _short_name(source: str) -> str:
    """Short: "my_run" of "runs/my_run/model", "mae" of "x/mae.pth"."""
    path = Path(source)
    parts = [p for p in path.parts if p not in ("model", "checkpoint", "checkpoints")]
    name = parts[-1] if parts else source
    if path.suffix in (".pth", ".pt", ".ckpt", ".tar", ".safetensors", ".bin"):
        name = name.removesuffix(path.suffix)
    return name


def _table_name(name: str, untrained: bool) -> str:
    return f"{name} (untrained)" if untrained else name


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")
