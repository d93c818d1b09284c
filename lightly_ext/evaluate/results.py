"""Where results are kept, and how a run departs from the published protocols."""

from __future__ import annotations

import datetime
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.result import Result, shown_value
from stellar_plugin.protocols import Protocol

P = TypeVar("P", bound=Protocol)
PACKAGES = ("stellar-plugin", "torch", "torchvision", "timm", "torchmetrics")


class Results:
    """Where results are kept, and how they depart from the published protocols.

    Args:
        devices:
            Where the evaluation runs.
        output:
            Folder for results and cached features.
        resize:
            Length of the shorter side after resizing in px, instead of the protocol's.
        crop:
            Side of the crop in px, instead of the protocol's.
        limit:
            Use so many images of each part only, to try things out.

    Raises:
        ValueError: If an option is impossible.
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
        self.limit = limit
        self._options = {"resize": resize, "crop": crop, "limit": limit}

    @property
    def cache(self) -> Path:
        """Folder for what is computed once."""
        return self.output / "cache"

    def protocol(self, protocol: P, **fields: Any) -> P:
        """A protocol as the options of this run change it, those that it knows.

        None, of an option or a field, leaves what the protocol says.
        """
        options = {k: v for k, v in self._options.items() if hasattr(protocol, k)}
        changes = {**options, **fields}
        return protocol.replace(**{k: v for k, v in changes.items() if v is not None})

    def announce(self, model: FrozenModel, protocol: Protocol) -> None:
        """Prints the card of a protocol, before the work."""
        lines = [f"  {k}: {shown_value(v)}" for k, v in protocol.card().items()]
        self.devices.say("\n".join([f"Protocol, {model.origin.name}:", *lines]))

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
