"""STELLAR as a whole: encoder and pixel decoder, saved and loaded together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from stellar_plugin.checkpoints.files import (
    CONFIG_NAME,
    SCHEMA_VERSION,
    WEIGHTS_NAME,
)
from stellar_plugin.checkpoints.layouts import STELLAR, read_checkpoint
from stellar_plugin.checkpoints.load import load_model_weights
from stellar_plugin.checkpoints.sizes import model_config
from stellar_plugin.decoder import PixelDecoder
from stellar_plugin.encoder import Factorization, StellarEncoder


class Stellar(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="stellar-plugin",
    paper_url="https://arxiv.org/abs/2602.01905",
    license="mit",
    pipeline_tag="image-feature-extraction",
):
    """STELLAR: sparse tokens, where they are, and the image back from them [0].

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905

    Attributes:
        model_name:
            Name of a timm VisionTransformer, see `StellarEncoder`.
        num_queries:
            Number r of sparse tokens, at least 1.
        target:
            What the decoder predicts. None builds neither decoder nor localization (the
            ablation without reconstruction).
        decoder_dim:
            Width of the decoder.
        decoder_depth:
            Number of decoder blocks.
        decoder_num_heads:
            Number of attention heads of the decoder.
        decoder_mlp_ratio:
            MLP width over width of the decoder.
        mean:
            Per-channel mean that images are normalised with, of [0, 1] intensities.
        std:
            Per-channel standard deviation that images are normalised with.
        norm_eps:
            Epsilon of the encoder's LayerNorms, see `StellarEncoder`.
        pos_antialias:
            How the position embedding is resampled, see `StellarEncoder`.
        vit_kwargs:
            Passed on to timm, for example img_size, patch_size, embed_dim, depth.

    Raises:
        ValueError: If `num_queries` is less than 1, `target` unknown, or a size does
            not fit.

    Examples:
        >>> model = Stellar("stellar_vit_base_patch16_224")
        >>> result = model(images)  # normalised, (batch_size, 3, height, width)
        >>> result.sparse, result.localization  # what, where
        >>> model.reconstruct(images)  # in [0, 1]
    """

    def __init__(
        self,
        model_name: str = "stellar_vit_base_patch16_224",
        *,
        num_queries: int = 16,
        target: Literal["pixels"] | None = "pixels",
        decoder_dim: int = 512,
        decoder_depth: int = 6,
        decoder_num_heads: int = 8,
        decoder_mlp_ratio: float = 4.0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        norm_eps: float | None = None,
        pos_antialias: bool = False,
        **vit_kwargs: Any,
    ) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(
                f"Stellar needs num_queries >= 1, got {num_queries}; for a plain ViT "
                "use StellarEncoder(num_queries=0)."
            )
        if target not in ("pixels", None):
            raise ValueError(f"target must be 'pixels' or None, got '{target}'.")
        self.config: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model_name": model_name,
            "num_queries": num_queries,
            "target": target,
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "decoder_mlp_ratio": decoder_mlp_ratio,
            "mean": list(mean),
            "std": list(std),
            "norm_eps": norm_eps,
            "pos_antialias": pos_antialias,
            **vit_kwargs,
        }
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.encoder = StellarEncoder(
            model_name,
            num_queries=num_queries,
            norm_eps=norm_eps,
            pos_antialias=pos_antialias,
            localization=target is not None,
            **vit_kwargs,
        )
        self.decoder: PixelDecoder | None = None
        if target is not None:
            self.decoder = PixelDecoder(
                self.encoder.embed_dim,
                self.encoder.patch_size,
                decoder_dim=decoder_dim,
                depth=decoder_depth,
                num_heads=decoder_num_heads,
                mlp_ratio=decoder_mlp_ratio,
            )

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Factorization:
        """Factorizes normalised images, see `StellarEncoder.forward`."""
        return self.encoder(images, keep)

    def decode(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Decodes a low-rank latent to raw intensities, unclamped.

        Args:
            lowrank:
                Latent Z with shape (batch_size, num_patches, embed_dim).
            grid_size:
                Height and width of the patch grid.

        Returns:
            Images with shape (batch_size, 3, height, width), [0, 1] where the
            reconstruction is good.

        Raises:
            ValueError: If the model has no decoder.
        """
        if self.decoder is None:
            raise ValueError(
                "The model has no decoder: it was built with target=None, without "
                "reconstruction."
            )
        return self.decoder(lowrank, grid_size)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructs images from their sparse tokens and localization.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width).

        Returns:
            Images in [0, 1] with the same shape, not normalised.
        """
        result = self(images)
        return self.decode(result.lowrank, result.grid_size).clamp(0, 1)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        variant: str | None = None,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        **hub_kwargs: Any,
    ) -> Stellar:
        """Loads a model that `save_pretrained` wrote or a released one, for evaluation.

        Released models come with clustering heads, which are not part of the model; see
        `stellar_plugin.checkpoints.read_checkpoint`. What a file lacks (the decoder) or
        has beyond the model is logged.

        Args:
            source:
                Folder or weight file; or "stellar-b16" (b8, b24, l16, h16), or the name
                of a repository on the Hugging Face hub. An existing path wins.
            variant:
                Which file of a hub repository, "b16" of "microsoft/STELLAR".
            num_heads:
                Attention heads of a released encoder of unusual width.
            decoder_num_heads:
                The same for its decoder, if its heads are not 64 wide.
            hub_kwargs:
                revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: If the weights or the config are missing.
            ValueError: If config or weights do not fit this version or each other, the
                layout is not known, or the number of heads is not.
        """
        checkpoint = read_checkpoint(source, variant=variant, **hub_kwargs)
        if checkpoint.layout == STELLAR and not checkpoint.config:
            raise FileNotFoundError(
                f"No {CONFIG_NAME} in '{checkpoint.path.parent}'; from_pretrained "
                f"reads a {WEIGHTS_NAME} with its {CONFIG_NAME} beside it, as "
                "save_pretrained writes them."
            )
        config = model_config(checkpoint, num_heads, decoder_num_heads)
        # Sizes first, on meta: no time is spent on weights that are replaced.
        with torch.device("meta"):
            model = cls(**config)
        if not model.state_dict().keys() <= checkpoint.state.keys():
            model = cls(**config)
        load_model_weights(model, checkpoint, num_heads=num_heads)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {k: v.contiguous() for k, v in self.state_dict().items()}
        safetensors.torch.save_file(
            state, save_directory / WEIGHTS_NAME, metadata={"format": "pt"}
        )
        config = json.dumps(self.config, indent=2) + "\n"
        (save_directory / CONFIG_NAME).write_text(config)


def create_model(model_name: str, **kwargs: Any) -> Stellar:
    """Creates a STELLAR model with fresh weights by name, in timm's manner.

    Args:
        model_name:
            "stellar_vit_tiny_patch16_224", "..._small_...", "..._base_...",
            "..._large_...", "stellar_vit_huge_patch14_224", or another timm
            VisionTransformer.
        kwargs:
            Arguments of `Stellar`, for example img_size, num_queries, patch_size,
            embed_dim, depth.

    Examples:
        >>> create_model("stellar_vit_base_patch16_224", img_size=256, num_queries=8)
    """
    return Stellar(model_name, **kwargs)
