"""What backbones have in common whose weights are those of published files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from stellar_plugin.checkpoints import Checkpoint, LoadReport, read_checkpoint
from stellar_plugin.mmseg.weights import WholeModule


class PretrainedBackbone(WholeModule):
    """A backbone made of a checkpoint of any layout, frozen unless told otherwise.

    Images may have any size: what is missing to a multiple of the stride is padded at
    the bottom and right, and the maps are brought back to the extent of the image.

    Args:
        feature:
            Which features the maps are of.
        frozen:
            Whether the weights stay as they are: no gradients, and eval mode always.
        init_cfg:
            `dict(type="Pretrained", checkpoint=PATH)`, read by `init_weights()`; None
            for weights that come from elsewhere.
        given:
            Arguments of the network by the config; those that are None are left to the
            checkpoint.

    Raises:
        ValueError: If `init_cfg` is anything else, or an argument does not fit.
    """

    _is_init: bool

    def __init__(
        self,
        feature: str,
        frozen: bool,
        init_cfg: Mapping[str, Any] | None,
        given: Mapping[str, Any],
    ) -> None:
        _check_weights(type(self).__name__, init_cfg, given)
        super().__init__(init_cfg)
        self.feature = feature
        self.frozen = frozen
        # What init_weights() read, and how.
        self.weights_path: Path | None = None
        self.weights_facts: dict[str, str] = {}
        self._given = {k: value for k, value in given.items() if value is not None}
        self._unread: Exception | None = None  # why the checkpoint told nothing
        # Moves with the module, so that a network that is built later is where it is.
        self.register_buffer("_place", torch.zeros(1), persistent=False)

    @property
    def stride(self) -> int:
        """Side of a cell of the maps, in px of the image."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Number of channels of the maps."""
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in px of the images that it was made for, None if any."""
        raise NotImplementedError

    @property
    def has_last_map_alone(self) -> bool:
        """Whether there is one map, of the end of the network."""
        raise NotImplementedError

    def _tell(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Arguments of the network that a checkpoint tells."""
        raise NotImplementedError

    def _build(self, told: Mapping[str, Any]) -> None:
        """Builds the network of what the config gives and a checkpoint tells."""
        raise NotImplementedError

    def _take(self, path: str) -> LoadReport:
        """Loads a checkpoint into the network."""
        raise NotImplementedError

    def _check(self, report: LoadReport) -> None:
        """Refuses what was loaded where it must not be used."""

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Maps of images whose sides are multiples of the stride."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Loads the checkpoint of `init_cfg`.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If it does not fit the network.
        """
        if self._is_init:
            return
        if self.init_cfg is None:
            self._start_random()
        else:
            self._load(self.init_cfg["checkpoint"])
        self._is_init = True

    def train(self, mode: bool = True) -> PretrainedBackbone:
        """Sets the mode; a frozen network stays in eval mode."""
        super().train(mode)
        if self.frozen:
            for network in self.children():
                network.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes feature maps.

        Args:
            images:
                Normalised images of any size, with shape (batch_size, 3, height,
                width).

        Returns:
            Maps with shape (batch_size, channels, ceil(height / stride), ceil(width /
            stride)), each of which spans exactly the image.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self._maps(padded)
        if padded.shape == images.shape:
            return tuple(maps)
        return tuple(
            _cut(m, height / padded.shape[2], width / padded.shape[3]) for m in maps
        )

    def _told(self) -> dict[str, Any]:
        """What the checkpoint of `init_cfg` tells.

        Nothing where it cannot be read, as in a test without the weights that the run
        began with; training does not go on without them.
        """
        if self.init_cfg is None:
            return {}
        try:
            return self._tell(read_checkpoint(self.init_cfg["checkpoint"]))
        except (OSError, ValueError) as error:
            self._unread = error
            return {}

    def _rebuild(self, told: Mapping[str, Any]) -> None:
        """Builds the network anew, in the mode and at the place of the old one."""
        self._build(told)
        self.train(self.training).to(self._place.device)

    def _start_random(self) -> None:
        print_log(
            f"{type(self).__name__} has init_cfg=None: its weights are random.",
            logger="current",
            level=logging.WARNING,
        )

    def _load(self, path: str) -> None:
        name = type(self).__name__
        try:
            if self._unread is not None:
                raise self._unread
            report = self._take(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} Name yours by --cfg-options "
                "model.backbone.init_cfg.checkpoint=PATH."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{error} Its arguments are model.backbone.* of the config, and those "
                "of the checkpoint where it leaves them open."
            ) from error
        self._check(report)
        self.weights_path = report.path
        facts = {"maps": f"{self.channels} channels, cells of {self.stride} px"}
        if self.image_size is not None:
            height, width = self.image_size
            facts["made for"] = f"images of {height} x {width} px"
        self.weights_facts = {**report.facts, **facts}
        said = "; ".join(f"{name}: {text}" for name, text in facts.items())
        print_log(f"{name} weights: {report} It gives {said}.", logger="current")
        _warn_of_normalisation(report.config)


def _warn_of_normalisation(config: Mapping[str, Any]) -> None:
    """Says where images of a checkpoint are not normalised as ImageNet's."""
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    for name, usual in imagenet.items():
        value = config.get(name, usual)
        if tuple(value) != usual:
            print_log(
                f"The checkpoint's {name} is not ImageNet's: model."
                f"data_preprocessor.{name} must be {[255 * v for v in value]}.",
                logger="current",
                level=logging.WARNING,
            )


def _cut(features: Tensor, height: float, width: float) -> Tensor:
    """Resamples the upper left part of maps, given as fractions, to their size."""
    # Half precision, also that of autocast, would move the cells.
    dtype = torch.promote_types(features.dtype, torch.float32)
    theta = torch.tensor(
        [[width, 0, width - 1], [0, height, height - 1]],
        dtype=dtype,
        device=features.device,
    )
    with torch.autocast(features.device.type, enabled=False):
        grid = F.affine_grid(
            theta.expand(len(features), -1, -1),
            list(features.shape),
            align_corners=False,
        )
        cut = F.grid_sample(
            features.to(dtype), grid, padding_mode="border", align_corners=False
        )
    return cut.to(features.dtype)


def _check_weights(
    name: str, init_cfg: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> None:
    wanted = "init_cfg must be None or dict(type='Pretrained', checkpoint=PATH)"
    if "pretrained" in given:
        raise ValueError(f"{name} takes no 'pretrained': {wanted}.")
    if init_cfg is None:
        return
    if not isinstance(init_cfg, Mapping) or (
        set(init_cfg) != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained"
    ):
        raise ValueError(f"{wanted}, got {init_cfg}.")
    if not init_cfg["checkpoint"]:
        raise ValueError(f"init_cfg names no checkpoint: {wanted}.")
