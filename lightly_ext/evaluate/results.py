"""Where results are kept, and how a run departs from the published protocols."""

from __future__ import annotations

import datetime
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.options import check_positive, check_writable
from lightly_ext.evaluate.result import Result, shown_value
from lightly_ext.evaluate.sizes import described_sizes, image_sizes
from stellar_plugin.protocols import Protocol

P = TypeVar("P", bound=Protocol)
T = TypeVar("T")
PACKAGES = ("stellar-plugin", "torch", "torchvision", "timm", "torchmetrics")


class Results:
    """Where results are kept, and how they depart from the published protocols.

    Args:
        devices:
            Where the evaluation runs.
        output:
            Folder for results and cached features.
        resize:
            Length of the shorter side after resizing in px, instead of the model's.
        crop:
            Side of the crop in px, instead of the model's.
        limit:
            Use so many images of each part only, to try things out.

    Raises:
        ValueError: If an option is impossible, or nothing can be written to `output`.
    """

    def __init__(
        self,
        devices: Devices,
        output: str = "runs/evaluate",
        resize: int | None = None,
        crop: int | None = None,
        limit: int | None = None,
    ) -> None:
        check_positive(resize=resize, crop=crop, limit=limit)
        self.devices = devices
        self.output = Path(output)
        check_writable(self.output)
        self.limit = limit
        self._options = {"resize": resize, "crop": crop, "limit": limit}
        self._ahead: dict[str, Any] = {}

    def look_ahead(self, check: Callable[..., Any], **options: Any) -> None:
        """Finds what a task needs before its model is loaded; see `required`."""
        self._ahead[_call(check, options)] = check(self, **options)

    def required(self, check: Callable[..., T], **options: Any) -> T:
        """What a task needs beside its model; every task begins with it.

        Args:
            check:
                `check_TASK`, beside `run_TASK`: raises if something is missing.
            options:
                Its arguments, those of the task's that it depends on.

        Returns:
            What it found, now or by `look_ahead`.
        """
        call = _call(check, options)
        return self._ahead.pop(call) if call in self._ahead else check(self, **options)

    @property
    def cache(self) -> Path:
        """Folder for what is computed once."""
        return self.output / "cache"

    def protocol(self, model: FrozenModel, protocol: P, **fields: Any) -> P:
        """A protocol as the model and the options of this run change it.

        Images have the size that the model was made for, where it has one. Those of the
        protocol's own `crop` are cut as the protocol says, so that they share a column
        with published numbers; of others timm's `crop_pct` tells `resize`, and without
        one the shorter side becomes the crop. The options `resize` and `crop` go first.

        Args:
            model:
                What is evaluated.
            protocol:
                The protocol as published.
            fields:
                Other fields of it; None leaves what it says.

        Raises:
            ValueError: If the protocol does not have an option that was given, or the
                sizes do not fit each other or the model.
        """
        given = {k: v for k, v in self._options.items() if v is not None}
        for name in given:
            if not hasattr(protocol, name):
                raise ValueError(
                    f"{protocol.name} has nothing that --{name} could change: leave it "
                    "out."
                )
        sizes = image_sizes(model.origin, protocol, **self.sizes)
        model.check_size(sizes["crop"])
        changes = {**given, **sizes, **fields}
        return protocol.replace(**{k: v for k, v in changes.items() if v is not None})

    @property
    def sizes(self) -> dict[str, int | None]:
        """The options `resize` and `crop`."""
        return {name: self._options[name] for name in ("resize", "crop")}

    def announce(self, model: FrozenModel, protocol: Protocol) -> None:
        """Prints the card of a protocol, before the work."""
        lines = [f"  {k}: {shown_value(v)}" for k, v in protocol.card().items()]
        lines = [f"Protocol, {model.origin.name}:", *lines]
        if hasattr(protocol, "crop"):
            lines.append(described_sizes(model.origin, protocol))
        self.devices.say("\n".join(lines))

    def result(
        self,
        model: FrozenModel,
        task: str,
        data: str,
        protocol: Protocol,
        scores: dict[str, Any],
        **provenance: Any,
    ) -> Result:
        """Puts scores, card and provenance together.

        Args:
            model:
                What was evaluated.
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
            model.origin.name,
            data,
            scores,
            protocol.card(),
            {**provenance, **self._provenance(model)},
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
        if self.devices.rank == 0:
            result.save(folder)
            scores = ", ".join(
                f"{k} {shown_value(v)}" for k, v in result.scores.items()
            )
            self.devices.say(
                f"{result.task}, {result.model} on {result.data}: {scores}"
            )
            self.devices.say(f"Stored in {folder}.")
        self.devices.fabric.barrier()
        return folder

    def _provenance(self, model: FrozenModel) -> dict[str, Any]:
        origin, devices = model.origin, self.devices
        return {
            "model": origin.label,
            "method": origin.method,
            "sha256": origin.sha256,
            "mean": origin.mean,
            "std": origin.std,
            "interpolation": origin.interpolation,
            "image_size": origin.image_size,
            "crop_pct": origin.crop_pct,
            "num_queries": model.num_queries,
            "seed": devices.seed,
            "precision": devices.precision,
            "batch_size": devices.batch_size,
            "device": f"{devices.world_size} x {_device_name(devices.device)}",
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


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")


def _call(check: Callable[..., Any], options: dict[str, Any]) -> str:
    return repr((check, sorted(options.items())))
