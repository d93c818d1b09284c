"""STELLAR's encoder as a backbone of mmsegmentation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmseg.registry import MODELS
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from stellar_plugin.checkpoints import (
    LoadReport,
    encoder_config,
    load_encoder_weights,
    read_checkpoint,
)
from stellar_plugin.checkpoints.fit import QUERY_KEY, encoder_settings
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.mmseg.weights import WholeModule
from stellar_plugin.state_dict import shown

FEATURES = ("dense", "lowrank", "localization")


@MODELS.register_module()
class StellarViT(WholeModule):
    """Feature maps of a STELLAR encoder, frozen unless told otherwise.

    Images may have any size: what is missing to a multiple of the patch size is padded
    at the bottom and right, and the maps are brought back to the extent of the image.

    Args:
        model_name:
            Name of a timm ViT, see `StellarEncoder`. None takes all that makes the
            encoder (sizes, heads, queries, epsilon) from the checkpoint of `init_cfg`,
            but for what is given here; STELLAR's ViT-B without one.
        num_queries:
            Number of latent queries, 0 for a plain ViT. None as the checkpoint has, or
            16 where `model_name` is given.
        feature:
            "dense" (patch features) or "lowrank" (localization times tokens), both with
            embed_dim channels, or "localization" with num_queries channels.
        out_indices:
            Blocks whose outputs are returned, each through the final norm, in ascending
            order. -1 is the last.
        frozen:
            Whether the encoder stays as it is: no gradients, and eval mode always.
        norm_eps:
            Epsilon of the LayerNorms, see `StellarEncoder`. None as the checkpoint
            says, or as the named model has.
        pos_antialias:
            How the position embedding is resampled, see `StellarEncoder`. None as the
            checkpoint says or, where `model_name` is given, False, and an error for
            weights that need, or may need, True.
        init_cfg:
            `dict(type="Pretrained", checkpoint=PATH)` with a checkpoint of any layout
            (`stellar_plugin.checkpoints`), read by `init_weights()`; None for random
            weights.
        vit_kwargs:
            Sizes, passed on to timm: img_size, patch_size, embed_dim, depth, ...

    Raises:
        ValueError: If an argument does not exist or does not fit the others.
    """

    _is_init: bool

    def __init__(
        self,
        model_name: str | None = None,
        num_queries: int | None = None,
        feature: str = "dense",
        out_indices: int | Sequence[int] = (-1,),
        frozen: bool = True,
        norm_eps: float | None = None,
        pos_antialias: bool | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        **vit_kwargs: Any,
    ) -> None:
        _check_weights(init_cfg, vit_kwargs)
        super().__init__(init_cfg)
        given = {
            "model_name": model_name,
            "num_queries": num_queries,
            "norm_eps": norm_eps,
            "pos_antialias": pos_antialias,
            **vit_kwargs,
        }
        self._given = {k: value for k, value in given.items() if value is not None}
        self._unread: Exception | None = None  # why the checkpoint told nothing
        self.feature = feature
        self.frozen = frozen
        self._out_indices = out_indices
        self._build({} if model_name or init_cfg is None else self._told(init_cfg))
        # What init_weights() read, and how.
        self.weights_path: Path | None = None
        self.weights_facts: dict[str, str] = {}

    def _build(self, told: Mapping[str, Any]) -> None:
        """Builds the encoder of what the config gives and a checkpoint tells."""
        self._is_told = bool(told)
        self._arguments = {**told, **self._given}
        self.encoder = StellarEncoder(**self._arguments)
        _check_feature(self.feature, self.encoder)
        self.out_indices = _blocks(self._out_indices, len(self.encoder.vit.blocks))
        self._stop_gradients()

    def init_weights(self) -> None:
        """Loads the checkpoint of `init_cfg`.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If it does not fit the encoder.
        """
        if self._is_init:
            return
        if self.init_cfg is None:
            print_log(
                "StellarViT has init_cfg=None: its weights are random.",
                logger="current",
                level=logging.WARNING,
            )
        else:
            self._load(self.init_cfg["checkpoint"])
        self._is_init = True

    def settings(self) -> dict[str, Any]:
        """What changes the maps and the shape of no tensor; and sizes, for people."""
        encoder = self.encoder
        return {
            "feature": self.feature,
            "out_indices": self.out_indices,
            "embed_dim": encoder.embed_dim,
            "depth": len(encoder.vit.blocks),
            **encoder_settings(encoder),
        }

    def arguments(self) -> dict[str, Any]:
        """What the encoder was built of."""
        return self._arguments

    def adopt(self, arguments: Mapping[str, Any]) -> None:
        """Builds the encoder of a checkpoint, where nothing told of it before."""
        if arguments and not self._is_told and "model_name" not in self._given:
            device = next(self.encoder.parameters()).device
            self._build(arguments)
            self.train(self.training).to(device)

    def train(self, mode: bool = True) -> StellarViT:
        """Sets the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes feature maps.

        Args:
            images:
                Normalised images of any size, with shape (batch_size, 3, height,
                width).

        Returns:
            One map per entry of `out_indices`, with shape (batch_size, channels,
            ceil(height / patch_size), ceil(width / patch_size)), that spans exactly the
            image.
        """
        height, width = images.shape[-2:]
        p = self.encoder.patch_size
        padded = F.pad(images, (0, -width % p, 0, -height % p))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            results = self.encoder.forward_intermediates(padded, self.out_indices)
            maps = [self._map(result) for result in results]
        if padded.shape == images.shape:
            return tuple(maps)
        return tuple(
            _cut(m, height / padded.shape[2], width / padded.shape[3]) for m in maps
        )

    def _map(self, result: Factorization) -> Tensor:
        features: Tensor = getattr(result, self.feature)
        return features.mT.unflatten(2, result.grid_size).contiguous()

    def _stop_gradients(self) -> None:
        """Leaves requires_grad to what the output depends on.

        Distributed training waits for the gradient of every other parameter.
        """
        if self.frozen:
            self.encoder.requires_grad_(False)
        self.encoder.vit.blocks[self.out_indices[-1] + 1 :].requires_grad_(False)
        if self.feature == "dense" and self.encoder.has_localization:
            self.encoder.dense_proj.requires_grad_(False)
            self.encoder.sparse_proj.requires_grad_(False)

    def _told(self, init_cfg: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the encoder that the checkpoint tells.

        None where it cannot be read, as in a test without the weights that the run
        began with; training does not go on without them.
        """
        try:
            checkpoint = read_checkpoint(init_cfg["checkpoint"])
            given = (self._given.get(name) for name in ("num_heads", "img_size"))
            return encoder_config(checkpoint, *given)
        except (OSError, ValueError) as error:
            self._unread = error
            return {}

    def _load(self, path: str) -> None:
        try:
            if self._unread is not None:
                raise self._unread
            report = load_encoder_weights(self.encoder, path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} Name yours by --cfg-options "
                "model.backbone.init_cfg.checkpoint=PATH."
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{error} Its arguments are model.backbone.* of the config; without "
                "model_name they are the checkpoint's."
            ) from error
        self._check(report)
        self.weights_path = report.path
        self.weights_facts = report.facts
        print_log(f"StellarViT weights: {report}", logger="current")
        _warn_of_normalisation(report.config)

    def _check(self, report: LoadReport) -> None:
        """Refuses frozen random values, and positions that a test would resample."""
        lost = [n for n in report.missing if n == QUERY_KEY or self.feature != "dense"]
        if lost and self.frozen:
            raise ValueError(
                f"'{report.path}' has no {shown(lost)}, and frozen features would be "
                "made of random values: set model.backbone.feature='dense', for a "
                "plain ViT num_queries=0 too, or train with frozen=False."
            )
        if self.encoder.any_antialias and self.encoder.pos_antialias:
            # Written down in the config: a test builds the model from that alone.
            raise ValueError(
                f"'{report.path}' ({report.read_as}) resamples positions with "
                "antialiasing, or does not tell: set pos_antialias=True, as timm "
                "does, or False for weights of DINO or iBOT."
            )


def _warn_of_normalisation(config: Mapping[str, Any]) -> None:
    """Says where images of a checkpoint are not normalised as ImageNet's."""
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    for name, usual in imagenet.items():
        value = config.get(name, usual)
        if tuple(value) != usual:
            print_log(
                f"The checkpoint's {name} is not ImageNet's: set model."
                f"data_preprocessor.{name} to {[255 * v for v in value]}.",
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


def _blocks(out_indices: int | Sequence[int], depth: int) -> tuple[int, ...]:
    wanted = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    blocks = tuple(i + depth if i < 0 else i for i in wanted)
    in_range = all(0 <= block < depth for block in blocks)
    if not blocks or not in_range or list(blocks) != sorted(set(blocks)):
        raise ValueError(
            f"out_indices must be ascending block numbers in [-{depth}, {depth - 1}], "
            f"got {wanted}."
        )
    return blocks


def _check_feature(feature: str, encoder: StellarEncoder) -> None:
    if feature not in FEATURES:
        raise ValueError(f"feature must be one of {FEATURES}, got '{feature}'.")
    if feature != "dense" and not encoder.has_localization:
        raise ValueError(
            f"feature='{feature}' needs num_queries >= 1 and a model that was trained "
            "with reconstruction; use 'dense'."
        )


def _check_weights(
    init_cfg: Mapping[str, Any] | None, vit_kwargs: Mapping[str, Any]
) -> None:
    wanted = "init_cfg must be None or dict(type='Pretrained', checkpoint=PATH)"
    if "pretrained" in vit_kwargs:
        raise ValueError(f"StellarViT takes no 'pretrained': {wanted}.")
    if init_cfg is None:
        return
    if not isinstance(init_cfg, Mapping) or (
        set(init_cfg) != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained"
    ):
        raise ValueError(f"{wanted}, got {init_cfg}.")
    if not init_cfg["checkpoint"]:
        raise ValueError(f"init_cfg names no checkpoint: {wanted}.")
