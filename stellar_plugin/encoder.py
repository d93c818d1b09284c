"""The encoder: a timm ViT with latent queries, image -> `Factorization`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, RmsNorm
from timm.models import checkpoint_seq
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stellar_plugin import vit as stellar_vits
from stellar_plugin.arguments import check_arguments
from stellar_plugin.vit import RotaryViT, ViT

# Letters in shape comments:
# B images, n patches of a grid h x w, k kept patches, r queries, d width, p patch size

LOCALIZATION_TEMPERATURE = 0.06
L2_NORM_EPS = 1e-7  # of every division by a length, not of LayerNorm
NORMS = (nn.LayerNorm, RmsNorm)
# Classes of timm that the encoder takes, and ours of the same tensors.
KINDS: dict[type[nn.Module], type[ViT | RotaryViT]] = {
    VisionTransformer: ViT,
    Eva: RotaryViT,
}
NEEDED_KIND = (
    "a timm VisionTransformer or Eva with a norm of all tokens, such as "
    "'vit_base_patch16_224' or 'vit_base_patch16_dinov3'"
)


@dataclass(frozen=True)
class Factorization:
    """What an image is made of, and where.

    Attributes:
        cls:
            CLS token with shape (batch_size, embed_dim), None for a ViT without one.
        sparse:
            Semantic tokens S, "what", with shape (batch_size, num_queries, embed_dim).
        dense:
            Patch features U with shape (batch_size, num_patches, embed_dim), row-major
            over the grid, or in the order of `keep` where only some were encoded.
        grid_size:
            Height and width of the patch grid of the whole image, in patches.
    """

    cls: Tensor | None
    sparse: Tensor
    dense: Tensor
    grid_size: tuple[int, int]
    _localize: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

    @cached_property
    def localization(self) -> Tensor:
        """Localization matrix L with shape (batch_size, num_patches, num_queries).

        Where: every row is a distribution over the tokens. Computed when first read,
        so that views of which only tokens are used do not pay for it.
        """
        return self._localize(self.dense, self.sparse)

    @property
    def lowrank(self) -> Tensor:
        """Low-rank latent Z = L S with shape (batch_size, num_patches, embed_dim).

        Raises:
            ValueError: If the encoder has no queries.
        """
        if self.sparse.shape[1] == 0:
            raise ValueError(
                "lowrank needs at least one latent query, the encoder has num_queries=0"
                "; use `dense` instead."
            )
        return self.localization @ self.sparse


class StellarEncoder(nn.Module):
    """ViT with latent queries that factorizes an image into "what" and "where" [0].

    Any timm `VisionTransformer` or `Eva` (rotary positions, as DINOv3 has them) gets
    `num_queries` learnable tokens, registered as timm register tokens after the ViT's
    own registers. They carry no position and attend jointly with all other tokens.
    Positions are those of the size of the image, which may be any multiple of the patch
    size, square or not: a table is resampled, rotary ones and sines are computed.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (section 3)

    Attributes:
        model_name:
            Name of a timm VisionTransformer or Eva, for example
            "stellar_vit_base_patch16_224", "vit_small_patch16_224" or
            "vit_small_patch16_dinov3".
        num_queries:
            Number r of latent queries. 0 gives the plain ViT (for baselines).
        norm_eps:
            Epsilon of every norm. None keeps the value of the named model (1e-12 for
            the STELLAR sizes, 1e-6 for most of timm's, 1e-5 for DINOv3).
        pos_antialias:
            Whether the position embedding is resampled with antialiasing. False for
            STELLAR, MAE and DINO weights, True for timm's own habit. None does what
            weights that are loaded say, or False.
        localization:
            Whether there are the two projections that localization is made of. False
            for an encoder that learns without reconstruction, which alone trains them.
        reg_tokens:
            Number of the ViT's own registers. None keeps that of the named model.
        pos_embed:
            "learn" for a table of positions, "sincos" for `vit.sincos_position` of the
            grid of each image (AIM), "none". None keeps that of the named model.
        vit_kwargs:
            Passed on to timm, for example img_size, patch_size, embed_dim, depth.

    Raises:
        ValueError: If `model_name` is unknown to timm or no plain ViT, or an argument
            is unknown, of another type, out of range or does not fit the others.

    Examples:
        >>> encoder = StellarEncoder("stellar_vit_base_patch16_224")
        >>> result = encoder(images)  # normalised, (batch_size, 3, height, width)
        >>> what, where = result.sparse, result.localization
    """

    def __init__(
        self,
        model_name: str = "stellar_vit_base_patch16_224",
        *,
        num_queries: int = 16,
        norm_eps: float | None = None,
        pos_antialias: bool | None = None,
        localization: bool = True,
        reg_tokens: int | None = None,
        pos_embed: Literal["learn", "sincos", "none"] | None = None,
        **vit_kwargs: Any,
    ) -> None:
        super().__init__()
        arguments = {
            "model_name": model_name,
            "num_queries": num_queries,
            "norm_eps": norm_eps,
            "pos_antialias": pos_antialias,
            "localization": localization,
            "reg_tokens": reg_tokens,
            "pos_embed": pos_embed,
            **vit_kwargs,
        }
        timms = ("num_reg_tokens",)  # Eva's name of reg_tokens
        check_arguments(arguments, StellarEncoder, VisionTransformer, Eva, taken=timms)
        if pos_embed is not None:
            vit_kwargs["pos_embed"] = pos_embed
        self.vit = _create_vit(model_name, num_queries, reg_tokens, vit_kwargs)
        if norm_eps is not None:
            for part in self.vit.modules():
                if isinstance(part, NORMS):
                    part.eps = norm_eps
        self.num_queries = num_queries
        self.vit.pos_antialias = bool(pos_antialias)
        self._any_antialias = pos_antialias is None
        self.embed_dim: int = self.vit.embed_dim
        self.grid_size: tuple[int, int] = self.vit.patch_embed.grid_size
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.has_localization = localization and num_queries > 0
        if self.has_localization:
            self.dense_proj = nn.Linear(self.embed_dim, self.embed_dim)
            self.sparse_proj = nn.Linear(self.embed_dim, self.embed_dim)
        if num_queries:
            queries = self.vit.reg_token[:, -num_queries:].detach()
            nn.init.normal_(queries, std=self.embed_dim**-0.5)

    @property
    def any_antialias(self) -> bool:
        """Whether weights that are loaded decide on `pos_antialias`."""
        return self._any_antialias  # hidden: no part of the architecture

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in px of the images that it was made for."""
        return self.vit.patch_embed.img_size

    @property
    def pos_antialias(self) -> bool:
        """Whether the position embedding is resampled with antialiasing."""
        return self.vit.pos_antialias

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Factorization:
        """Factorizes a batch of images.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width); height and
                width are multiples of the patch size.
            keep:
                Indices of the patches to encode, int64 with shape (batch_size, k),
                row-major over the grid. Hidden patches cost nothing. None encodes all.

        Returns:
            The factorization.

        Raises:
            ValueError: If the image is no multiple of the patch size, or has other than
                three channels.
        """
        tokens = self.forward_features(images, keep)
        return self.split(tokens, self._image_grid(images))

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns all normalised tokens in timm's order [CLS, registers, patches].

        Args:
            images:
                As for `forward`.
            keep:
                As for `forward`.

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_patches, embed_dim).
            The queries are the last `num_queries` prefix tokens.
        """
        x = self._embed(images, keep)
        blocks = self._blocks(self._image_grid(images), keep)
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint_seq(blocks, x)
        else:
            for block in blocks:
                x = block(x)
        return self.vit.norm(x)

    def forward_intermediates(
        self, images: Tensor, indices: Sequence[int]
    ) -> list[Factorization]:
        """Factorizations after several blocks, each through the final norm.

        Args:
            images:
                As for `forward`.
            indices:
                Blocks to read, in ascending order; negative ones count from the end.

        Returns:
            One factorization per index.

        Raises:
            ValueError: If an index does not exist.
        """
        depth = len(self.vit.blocks)
        if any(not -depth <= index < depth for index in indices):
            raise ValueError(
                f"indices must be in [-{depth}, {depth - 1}] for a ViT with {depth} "
                f"blocks, got {list(indices)}."
            )
        wanted = {index % depth for index in indices}
        grid_size = self._image_grid(images)
        x = self._embed(images, keep=None)
        results = []
        blocks = self._blocks(grid_size, keep=None)
        for index, block in enumerate(blocks[: max(wanted) + 1]):
            x = block(x)
            if index in wanted:
                results.append(self.split(self.vit.norm(x), grid_size))
        return results

    def localize(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Localization matrix L of patch features and tokens (eq. 14 of the paper).

        Args:
            dense:
                Patch features with shape (batch_size, num_patches, embed_dim).
            sparse:
                Tokens with shape (batch_size, num_queries, embed_dim).

        Returns:
            Tensor with shape (batch_size, num_patches, num_queries); rows sum to one.

        Raises:
            ValueError: If the encoder was built without localization.
        """
        if self.num_queries == 0:
            return dense.new_zeros(dense.shape[0], dense.shape[1], 0)
        if not self.has_localization:
            raise ValueError(
                "The encoder has no localization: it was built, or trained without "
                "reconstruction, with localization=False. Use `sparse` and `dense`."
            )
        # Unit vectors in float32: half precision is too coarse for a cosine that is
        # divided by 0.06.
        u = F.normalize(self.dense_proj(dense).float(), dim=-1, eps=L2_NORM_EPS)
        s = F.normalize(self.sparse_proj(sparse).float(), dim=-1, eps=L2_NORM_EPS)
        with torch.autocast(u.device.type, enabled=False):
            cosine = u @ s.mT  # (B, n, d), (B, r, d) -> (B, n, r)
        return (cosine / LOCALIZATION_TEMPERATURE).softmax(dim=-1).to(dense.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory: block activations are recomputed."""
        self.vit.set_grad_checkpointing(enable)

    def split(self, tokens: Tensor, grid_size: tuple[int, int]) -> Factorization:
        """The factorization that tokens are.

        Args:
            tokens:
                What `forward_features` returned.
            grid_size:
                Height and width of the patch grid of the whole image.
        """
        num_prefix = self.vit.num_prefix_tokens
        return Factorization(
            cls=tokens[:, 0] if self.vit.has_class_token else None,
            sparse=tokens[:, num_prefix - self.num_queries : num_prefix],
            dense=tokens[:, num_prefix:],
            grid_size=grid_size,
            _localize=self.localize,
        )

    def _blocks(
        self, grid_size: tuple[int, int], keep: Tensor | None
    ) -> list[Callable[[Tensor], Tensor]]:
        """The transformer blocks, with the rotary positions of the patches."""
        if isinstance(self.vit, ViT):
            return list(self.vit.blocks)
        rotations = self.vit.rotations(grid_size, keep)
        return [
            partial(block, rope=rotation)
            for block, rotation in zip(self.vit.blocks, rotations, strict=True)
        ]

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Prefix tokens and patches with positions -> (B, prefix + n or k, d)."""
        grid_size = self._image_grid(images)
        position = self.vit.position(grid_size)
        if keep is None:
            x = self.vit.patch_embed(images).flatten(1, 2)  # (B, h, w, d) -> (B, n, d)
        else:
            x = self._embed_kept(images, keep, grid_size)
            position = None if position is None else position[0][keep]  # (B, k, d)
        if position is not None:
            x = x + position
        prefix = [t for t in (self.vit.cls_token, self.vit.reg_token) if t is not None]
        size = x.shape[0]  # not len(x), which a traced export would take for a constant
        x = torch.cat([t.expand(size, -1, -1).to(x.dtype) for t in prefix] + [x], 1)
        return self.vit.norm_pre(self.vit.pos_drop(x))

    def _embed_kept(
        self, images: Tensor, keep: Tensor, grid_size: tuple[int, int]
    ) -> Tensor:
        """Embeds the patches that are kept, and only those -> (B, k, d).

        On a GPU the convolution over all patches takes several times as long, see
        benchmarks/patches.py.
        """
        p, (height, width) = self.patch_size, grid_size
        grid = images.unflatten(3, (width, p)).unflatten(2, (height, p))
        grid = grid.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, p, p), a view
        batch = torch.arange(len(images), device=images.device)[:, None]
        patches = grid[batch, keep // width, keep % width].flatten(2)  # (B, k, 3 p p)
        proj = self.vit.patch_embed.proj
        x = F.linear(patches, proj.weight.flatten(1), proj.bias)
        return self.vit.patch_embed.norm(x)

    def _image_grid(self, images: Tensor) -> tuple[int, int]:
        p = self.patch_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "images must have shape (batch_size, 3, height, width), got "
                f"{tuple(images.shape)}."
            )
        height, width = images.shape[-2:]
        if height % p or width % p or not height or not width:
            raise ValueError(
                f"Image size {height} x {width} is no multiple of the patch size {p}; "
                f"resize or pad to {math.ceil(height / p) * p} x "
                f"{math.ceil(width / p) * p}."
            )
        return height // p, width // p


def _create_vit(
    model_name: str,
    num_queries: int,
    reg_tokens: int | None,
    vit_kwargs: dict[str, Any],
) -> Any:  # one of KINDS, whose attributes timm types loosely
    if not timm.is_model(model_name):
        raise ValueError(
            f"timm knows no model '{model_name}'; the STELLAR sizes are "
            f"{', '.join(stellar_vits.default_cfgs)}."
        )
    if vit_kwargs.get("patch_drop_rate"):
        raise ValueError(
            "The encoder drops no patches by itself: pass those to encode by `keep`, "
            "instead of patch_drop_rate."
        )
    kind, own_registers = _kind(model_name)
    registers = own_registers if reg_tokens is None else reg_tokens
    kwargs: dict[str, Any] = {"num_classes": 0, "global_pool": "", **vit_kwargs}
    # With a dynamic size timm's patch_embed takes any image and returns a map.
    kwargs |= {"no_embed_class": True, "dynamic_img_size": True}
    kwargs[kind.registers] = registers + num_queries
    sincos = vit_kwargs.get("pos_embed") == "sincos"
    if sincos:
        kwargs["pos_embed"] = "none"  # no table
    try:
        vit: Any = timm.create_model(model_name, **kwargs)
    except (AssertionError, RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"timm cannot build '{model_name}' with {kwargs}: {error}."
        ) from error
    if not is_plain(vit):
        raise ValueError(
            f"'{model_name}' is no plain ViT: square patches cut by one convolution, "
            "class token and registers alone before them, a norm of all tokens; use "
            "one, such as 'vit_base_patch16_224'."
        )
    patch_embed: Any = vit.patch_embed
    if 0 in patch_embed.grid_size:
        raise ValueError(
            f"An image of img_size {kwargs.get('img_size')} has not one patch of "
            f"{patch_embed.patch_size[0]} px; use larger images or smaller patches."
        )
    _check_width(vit, model_name, sincos)
    vit.__class__ = kind
    if sincos:  # else not set: it would change the hash of every architecture
        vit.sincos = True
    return vit


def _check_width(vit: Any, model_name: str, sincos: bool) -> None:
    # Rotations turn pairs of numbers, of rows and of columns; Eva does not look.
    heads, rotary = vit.blocks[0].attn.num_heads, getattr(vit, "rope", None) is not None
    if vit.embed_dim % (heads * (4 if rotary else 1)):
        raise ValueError(
            f"embed_dim {vit.embed_dim} of '{model_name}' must be a multiple of "
            f"{'4 x ' if rotary else ''}num_heads {heads}."
        )
    if sincos and vit.embed_dim % 4:
        raise ValueError(
            f"embed_dim {vit.embed_dim} of '{model_name}' must be a multiple of 4 for "
            "pos_embed='sincos'."
        )


def is_plain(model: nn.Module) -> bool:
    """Whether a model is a ViT whose tokens the encoder computes as timm does."""
    if type(model) not in KINDS and not isinstance(model, tuple(KINDS.values())):
        return False
    vit: Any = model
    patch_size = getattr(vit.patch_embed, "patch_size", (0, 1))
    return (
        type(vit.patch_embed) is PatchEmbed
        and len(set(patch_size)) == 1
        and isinstance(vit.fc_norm, nn.Identity)
    )


@cache  # timm builds the whole model
def _kind(model_name: str) -> tuple[type[ViT | RotaryViT], int]:
    """Class of a timm model here, and how many registers it has by itself."""
    if model_name in stellar_vits.default_cfgs:
        return ViT, 0  # its registers are queries
    with torch.device("meta"):
        vit: Any = timm.create_model(model_name)
    kind = next((k for theirs, k in KINDS.items() if isinstance(vit, theirs)), None)
    if kind is None:
        raise ValueError(
            f"'{model_name}' is a {type(vit).__name__}; the encoder needs {NEEDED_KIND}"
            "."
        )
    return kind, vit.num_prefix_tokens - (vit.cls_token is not None)
