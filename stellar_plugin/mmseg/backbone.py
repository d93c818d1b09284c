"""STELLAR's encoder as a backbone of mmsegmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmseg.registry import MODELS
from torch import Tensor

from stellar_plugin.checkpoints import (
    Checkpoint,
    LoadReport,
    encoder_config,
    load_encoder_weights,
)
from stellar_plugin.checkpoints.fit import QUERY_KEY, encoder_settings
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.mmseg.pretrained import PretrainedBackbone
from stellar_plugin.state_dict import shown

FEATURES = ("dense", "lowrank", "localization")


@MODELS.register_module()
class StellarViT(PretrainedBackbone):
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
        given = {
            "model_name": model_name,
            "num_queries": num_queries,
            "norm_eps": norm_eps,
            "pos_antialias": pos_antialias,
            **vit_kwargs,
        }
        super().__init__(feature, frozen, init_cfg, given)
        self._out_indices = out_indices
        self._build({} if model_name else self._told())

    @property
    def stride(self) -> int:
        """Side of a patch in px."""
        return self.encoder.patch_size

    @property
    def channels(self) -> int:
        """The width, or the number of queries."""
        encoder = self.encoder
        places = self.feature == "localization"
        return encoder.num_queries if places else encoder.embed_dim

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in px of the images that its position table is for."""
        if self.encoder.vit.pos_embed is None:
            return None
        height, width = self.encoder.grid_size
        return height * self.stride, width * self.stride

    @property
    def has_last_map_alone(self) -> bool:
        """Whether the last block alone is read."""
        return self.out_indices == (len(self.encoder.vit.blocks) - 1,)

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
        known = self._is_told or "model_name" in self._given
        if arguments and not known and "network" not in arguments:
            self._rebuild(arguments)

    def _tell(self, checkpoint: Checkpoint) -> dict[str, Any]:
        given = (self._given.get(name) for name in ("num_heads", "img_size"))
        return encoder_config(checkpoint, *given)

    def _build(self, told: Mapping[str, Any]) -> None:
        self._is_told = bool(told)
        self._arguments = {**told, **self._given}
        self.encoder = StellarEncoder(**self._arguments)
        _check_feature(self.feature, self.encoder)
        self.out_indices = _blocks(self._out_indices, len(self.encoder.vit.blocks))
        self._stop_gradients()

    def _take(self, path: str) -> LoadReport:
        return load_encoder_weights(self.encoder, path)

    def _maps(self, images: Tensor) -> list[Tensor]:
        results = self.encoder.forward_intermediates(images, self.out_indices)
        return [self._map(result) for result in results]

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
