"""STELLAR as a whole: encoder and pixel decoder, saved and loaded together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from stellar_plugin.decoder import PixelDecoder
from stellar_plugin.encoder import Factorization, StellarEncoder

# Version of config.json. Raise it when a key changes its meaning, and migrate older
# files in `read_config`.
SCHEMA_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


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
        ValueError: If `num_queries` is less than 1, or a size does not fit.

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
        self.config: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model_name": model_name,
            "num_queries": num_queries,
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
            **vit_kwargs,
        )
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
        """
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
        cls, source: str | Path, **hub_kwargs: Any
    ) -> Stellar:
        """Loads a model that `save_pretrained` wrote, in evaluation mode.

        Args:
            source:
                Folder, weight file with its config.json beside it, or the name of a
                repository on the Hugging Face hub. An existing path wins.
            hub_kwargs:
                revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: If the weights or the config are missing.
            ValueError: If config or weights do not fit this version or each other.
        """
        path = Path(source)
        if path.is_file():
            return cls._load(path, path.parent / CONFIG_NAME)
        if path.is_dir():
            return cls._load(path / WEIGHTS_NAME, path / CONFIG_NAME)
        if path.is_absolute() or path.suffix or str(source).count("/") != 1:
            raise FileNotFoundError(
                f"'{source}' is neither a folder or weight file here nor the name of a "
                "hub repository ('owner/name')."
            )
        weights, config = (
            Path(hf_hub_download(str(source), name, **hub_kwargs))
            for name in (WEIGHTS_NAME, CONFIG_NAME)
        )
        return cls._load(weights, config)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {k: v.contiguous() for k, v in self.state_dict().items()}
        safetensors.torch.save_file(
            state, save_directory / WEIGHTS_NAME, metadata={"format": "pt"}
        )
        config = json.dumps(self.config, indent=2) + "\n"
        (save_directory / CONFIG_NAME).write_text(config)

    @classmethod
    def _load(cls, weights: Path, config: Path) -> Stellar:
        for path in (weights, config):
            if not path.is_file():
                raise FileNotFoundError(
                    f"No {path.name} in '{path.parent}'; from_pretrained reads a "
                    f"{WEIGHTS_NAME} with its {CONFIG_NAME} beside it, as "
                    "save_pretrained writes them."
                )
        # Sizes first, on meta: no time is spent on weights that are replaced.
        with torch.device("meta"):
            model = cls(**read_config(config))
        try:
            state = safetensors.torch.load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"'{weights}' cannot be read: {error}.") from error
        try:
            model.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"'{weights}' does not fit '{config}': {error}") from error
        return model.eval()


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


def read_config(path: Path) -> dict[str, Any]:
    """Reads the arguments of `Stellar` from a config.json.

    Args:
        path:
            The file.

    Raises:
        ValueError: If it is no JSON or of a schema version that is not known.
    """
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}.") from error
    version = config.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"'{path}' has schema version {version}, this package reads "
            f"{SCHEMA_VERSION}; install the version of stellar-plugin that wrote it."
        )
    return config
