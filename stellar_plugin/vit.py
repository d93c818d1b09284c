"""The sizes of STELLAR, registered with timm.

A STELLAR encoder is a timm `VisionTransformer` whose register tokens are the latent
queries (method: https://arxiv.org/abs/2602.01905, section 3). Importing this module
makes `timm.create_model("stellar_vit_base_patch16_224")` work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    apply_keep_indices_nlc,
    build_sincos2d_pos_embed,
    resample_abs_pos_embed,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import LayerNorm, Parameter

from stellar_plugin.state_dict import misfits, unwrapped
from stellar_plugin.weight_files import told_settings

# LayerNorm epsilon of the released weights.
STELLAR_NORM_EPS = 1e-12
FIRST_CONV = "patch_embed.proj.weight"
# What timm's models have beside the ViT.
TIMM_HEADS = ("head.", "fc_norm.", "attn_pool.")


class _Positioned:
    """A ViT that says what the positions are in images of any size.

    Attributes:
        pos_antialias:
            Whether its table is resampled with antialiasing, as timm's own always is.
        sincos:
            Whether there is no table: positions are `sincos_position`.
        registers:
            timm's name of the argument for register tokens.
    """

    pos_antialias = False
    sincos = False
    registers: str

    def position(self, grid_size: tuple[int, int]) -> Tensor | None:
        """What is added to the patches of a grid, None if nothing is.

        Args:
            grid_size:
                Height and width of the patch grid.

        Returns:
            Tensor with shape (1, num_patches, embed_dim), row-major.
        """
        vit: Any = self
        if self.sincos:
            return sincos_position(grid_size, vit.patch_embed.proj.weight)
        if vit.pos_embed is None:
            return None
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        return resample_position(
            vit.pos_embed[:, prefix:],
            vit.patch_embed.grid_size,
            grid_size,
            self.pos_antialias,
        )

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Brings the model to images, or patches, of another size."""
        vit: Any = self
        table, old_grid = vit.pos_embed, vit.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)  # type: ignore[misc]
        if table is None or vit.patch_embed.grid_size == old_grid:
            return
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = resample_position(
            table[:, prefix:], old_grid, vit.patch_embed.grid_size, vit.pos_antialias
        )
        resized = torch.cat([table[:, :prefix], position], 1).detach()
        vit.pos_embed = Parameter(resized, requires_grad=table.requires_grad)


# Of timm's rotary positions, what training alone depends on.
TRAINING_ROTATION = (
    *("training", "aug_active", "shift_coords", "jitter_coords", "rescale_coords"),
)


class ViT(_Positioned, VisionTransformer):
    """timm's `VisionTransformer`."""

    registers = "reg_tokens"

    def _pos_embed(self, x: Tensor) -> Tensor:
        table = self.pos_embed
        own = table is not None and self.dynamic_img_size and not self.pos_antialias
        position = None
        if self.sincos or own:
            position = self.position((x.shape[1], x.shape[2]))
        if position is None:
            return super()._pos_embed(x)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        tokens = [t for t in (self.cls_token, self.reg_token) if t is not None]
        size = x.shape[0]  # not len(x), which a traced export would take for a constant
        first = [token.expand(size, -1, -1) for token in tokens]
        if prefix and table is not None:
            first = [torch.cat(first, 1) + table[:, :prefix]]
        return self.pos_drop(torch.cat([*first, x.flatten(1, 2) + position], 1))


class RotaryViT(_Positioned, Eva):
    """timm's `Eva`, DINOv3 among them, with the attributes of `VisionTransformer`."""

    registers = "num_reg_tokens"

    @property
    def has_class_token(self) -> bool:
        """Whether there is a CLS token."""
        return self.cls_token is not None

    @property
    def num_reg_tokens(self) -> int:
        """Number of register tokens."""
        return self.num_prefix_tokens - self.has_class_token

    @property
    def rotation(self) -> str:
        """What decides on rotary positions in evaluation, and no tensor shows."""
        settings = vars(self.rope) if self.rope is not None else {}
        told = [
            f"{name}={value}"
            for name, value in sorted(settings.items())
            if isinstance(value, (int, float, str, tuple))
            and name not in TRAINING_ROTATION
        ]
        return f"{type(self.rope).__name__}({', '.join(told)})"

    def rotations(
        self, grid_size: tuple[int, int], keep: Tensor | None
    ) -> list[Tensor | None]:
        """What each block rotates queries and keys of the patches by.

        Args:
            grid_size:
                Height and width of the patch grid.
            keep:
                Indices of the patches that are there, int64 with shape (batch_size, k).
                None is all.

        Returns:
            Sines and cosines per block; they broadcast to (batch_size, num_heads,
            num_patches or k, 2 * head_dim).
        """
        if self.rope is None:
            return [None] * len(self.blocks)
        rotation = self._rotation(grid_size)
        if keep is not None:  # the shapes of timm's patch dropout
            rotation = apply_keep_indices_nlc(keep, rotation, keep)
            mixed = self.rope_mixed
            rotation = rotation.transpose(0, 1) if mixed else rotation.unsqueeze(1)
        return list(rotation) if self.rope_mixed else [rotation] * len(self.blocks)

    def _rotation(self, grid_size: tuple[int, int]) -> Tensor:
        rope: Any = self.rope
        augmented = rope.training and getattr(rope, "aug_active", False)
        if augmented or self.rope_mixed or torch.compiler.is_compiling():
            return rope.get_embed(shape=list(grid_size))
        if grid_size not in self._rotations:
            # timm makes DINOv3's on the CPU; a GPU would wait for it in every step.
            with torch.inference_mode(False), torch.no_grad():
                self._rotations[grid_size] = rope.get_embed(shape=list(grid_size))
        return self._rotations[grid_size]

    @cached_property
    def _rotations(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._rotations.clear()  # of another device or precision
        return super()._apply(*args, **kwargs)


class StellarVisionTransformer(ViT):
    """What timm creates for the sizes of STELLAR."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads weights of any image size, as `checkpoint_path` of timm needs it."""
        state = _timm_state(state_dict, self)
        return super().load_state_dict(state, strict=strict, assign=assign)


def resample_position(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    antialias: bool,
) -> Tensor:
    """Position embedding of another grid, bicubic.

    Args:
        table:
            Positions with shape (1, num_patches, embed_dim), row-major over `old_grid`.
        old_grid:
            Height and width of its grid, in patches.
        new_grid:
            Height and width of the wanted grid.
        antialias:
            Whether to smooth where the grid gets smaller.
    """
    if old_grid == new_grid:  # timm's own check is off in a traced export
        return table
    return resample_abs_pos_embed(
        table, list(new_grid), list(old_grid), num_prefix_tokens=0, antialias=antialias
    )


def sincos_position(grid_size: tuple[int, int], like: Tensor) -> Tensor:
    """Sines and cosines of column and row, as MAE and AIM have them.

    The first half of the channels is of the column, each half sines before cosines.

    Args:
        grid_size:
            Height and width of the patch grid.
        like:
            Tensor with shape (embed_dim, ...), of the wanted type and device.

    Returns:
        Tensor with shape (1, num_patches, embed_dim), row-major.
    """
    waves = build_sincos2d_pos_embed(list(grid_size), len(like), device=like.device)
    # timm: sines of row and column, then cosines -> (n, column and row, 2, d / 4)
    waves = waves.unflatten(1, (2, 2, -1)).transpose(1, 2).flip(1)
    return waves.flatten(1)[None].to(like.dtype)


def _pretrained_state(content: Mapping[str, Any], vit: ViT) -> dict[str, Tensor]:
    """What `timm.create_model(..., pretrained=True)` loads of a file.

    `input_size` of the model's pretrained_cfg tells the image size of the weights,
    where as many positions are there.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape, which timm
            only logs for models with a classifier.
    """
    size = getattr(vit, "pretrained_cfg", {}).get("input_size") or (3, 0, 0)
    patch_size = vit.patch_embed.patch_size
    told = size[1] // patch_size[0], size[2] // patch_size[1]
    state = _timm_state(content, vit, told)
    found = misfits(
        {k: v for k, v in vit.state_dict().items() if not k.startswith(TIMM_HEADS)},
        {
            # timm adapts it to other numbers of channels.
            name: vit.patch_embed.proj.weight if name == FIRST_CONV else tensor
            for name, tensor in state.items()
            if not name.startswith(TIMM_HEADS)
        },
    )
    if found:
        raise ValueError(
            f"The weights do not fit this timm model; {found}. Create it in their "
            "size, with as many reg_tokens as they have queries; weights by other "
            "names than ours and timm's become timm's by `stellar convert`."
        )
    return state


def _timm_state(
    content: Mapping[str, Any], vit: ViT, told: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Tensors by timm's names, their positions brought to the grid of a model.

    Args:
        content:
            Tensors by names of timm or of this package, with or without a prefix.
        vit:
            The model.
        told:
            Patch grid of the weights, taken if there are as many positions.

    Raises:
        ValueError: If nothing tells the grid, or patches are of another size.
    """
    state = unwrapped(content)
    ends = [n.removesuffix(FIRST_CONV) for n in state if n.endswith(FIRST_CONV)]
    if len(ends) == 1:
        prefix = ends[0]
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
    kernel, patch_size = state.get(FIRST_CONV), vit.patch_embed.patch_size
    if kernel is not None and kernel.ndim == 4 and kernel.shape[2:] != patch_size:
        raise ValueError(
            f"The weights are for patches of {_sides(kernel.shape[2:])} px, and those "
            f"of this model have {_sides(patch_size)}: create it with their patch_size."
        )
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or not vit.no_embed_class:
        return state
    rows, wanted = table.shape[1], vit.patch_embed.grid_size
    square = (isqrt(rows), isqrt(rows))
    grids = [g for g in (told, wanted, square) if g and g[0] * g[1] == rows]
    if not grids:
        raise ValueError(
            f"Nothing tells the patch grid of a position table of {rows} rows: name "
            "the size of the images that the weights were trained with by "
            "pretrained_cfg_overlay=dict(input_size=(3, HEIGHT, WIDTH))."
        )
    state["pos_embed"] = resample_position(table, grids[0], wanted, vit.pos_antialias)
    return state


def _sides(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _check_source(path: Path, num_heads: int) -> None:
    """Says what is wrong with a file, and with a number that fits all shapes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of weights, or it or the config.json beside it
            tells another number of heads.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"The weights '{path}' do not exist: name a file by "
            "pretrained_cfg_overlay=dict(file=PATH)."
        )
    told = told_settings(path).get("num_heads", num_heads)
    if told != num_heads:
        raise ValueError(
            f"'{path}' was trained with num_heads={told}, and {num_heads} heads would "
            f"give other features: create the model with num_heads={told}."
        )


class Size(NamedTuple):
    """A size of ViT.

    Attributes:
        name: timm's name of the plain ViT.
        patch_size: Side of a patch in px.
        embed_dim: Width.
        depth: Number of blocks.
        num_heads: Number of attention heads.
    """

    name: str
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int


_BASE = Size("vit_base_patch16_224", 16, 768, 12, 12)
SIZES = (
    Size("vit_tiny_patch16_224", 16, 192, 12, 3),
    Size("vit_small_patch16_224", 16, 384, 12, 6),
    _BASE,
    Size("vit_large_patch16_224", 16, 1024, 24, 16),
    Size("vit_huge_patch14_224", 14, 1280, 32, 16),
)
# A wrong number of heads fits all shapes and gives wrong features.
HEADS_OF_WIDTH = {size.embed_dim: size.num_heads for size in SIZES}


def size_of_width(width: int) -> Size:
    """The size of a width, ViT-B for widths that are none of theirs."""
    return next((size for size in SIZES if size.embed_dim == width), _BASE)


def _cfg() -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 0,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({f"stellar_{size.name}": _cfg() for size in SIZES})


def _stellar_vit(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    size = next(size for size in SIZES if f"stellar_{size.name}" == name)
    arguments: dict[str, Any] = {
        "patch_size": size.patch_size,
        "embed_dim": size.embed_dim,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "reg_tokens": 16,
        "no_embed_class": True,
        "num_classes": 0,
        # The norm is of all tokens, also where they are averaged.
        "fc_norm": False,
        "norm_layer": partial(LayerNorm, eps=STELLAR_NORM_EPS),
        **kwargs,
    }
    for source in ("pretrained_cfg", "pretrained_cfg_overlay"):
        told = kwargs.get(source)
        if pretrained and isinstance(told, Mapping) and told.get("file"):
            _check_source(Path(told["file"]), arguments["num_heads"])
    return build_model_with_cfg(
        StellarVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=_pretrained_state,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **arguments,
    )


@register_model
def stellar_vit_tiny_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-Ti/16 with 16 latent queries."""
    return _stellar_vit("stellar_vit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_small_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-S/16 with 16 latent queries."""
    return _stellar_vit("stellar_vit_small_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_base_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-B/16 with 16 latent queries, STELLAR-B of the paper."""
    return _stellar_vit("stellar_vit_base_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_large_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-L/16 with 16 latent queries, STELLAR-L of the paper."""
    return _stellar_vit("stellar_vit_large_patch16_224", pretrained, **kwargs)


@register_model
def stellar_vit_huge_patch14_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformer:
    """ViT-H/14 with 16 latent queries, STELLAR-H of the paper."""
    return _stellar_vit("stellar_vit_huge_patch14_224", pretrained, **kwargs)
