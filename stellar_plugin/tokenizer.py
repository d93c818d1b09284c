"""The frozen MaskGIT-VQGAN tokenizer: image -> codes -> image."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_plugin.arguments import check_arguments
from stellar_plugin.state_dict import misfits, shown
from stellar_plugin.vqgan import NUM_GROUPS, Codebook, VQGANDecoder, VQGANEncoder
from stellar_plugin.weight_files import read_tensors, usable

TOKENIZER_FILE = "maskgit-vqgan-imagenet-f16-256.bin"
WHERE_TO_GET_IT = (
    f"It is published as {TOKENIZER_FILE} at https://huggingface.co/fun-research/TiTok"
)
# Images encoded at a time: at full resolution each has 128 values per pixel.
CHUNK_SIZE = 32
_FIRST = "encoder.conv_in.weight"


class MaskGITVQGAN(nn.Module):
    """Image tokenizer of MaskGIT [0]: a convolutional VQGAN [1], always frozen.

    Module names are those of the published file, so that it loads strictly. Works in
    any floating type; the search for the nearest code is done in float32. Parameters
    have no gradient, `train()` leaves it in evaluation mode.

    - [0]: MaskGIT, 2022, https://arxiv.org/abs/2202.04200
    - [1]: VQGAN, 2021, https://arxiv.org/abs/2012.09841

    Attributes:
        channels:
            Width at full resolution, a multiple of 32.
        channel_multipliers:
            Width of each level over `channels`. Every level but the last halves the
            image.
        num_blocks:
            Residual blocks per level.
        latent_dim:
            Width of a code's vector.
        num_codes:
            Size of the codebook.

    Raises:
        ValueError: If `channels` is no multiple of 32, or a size is out of range.

    Examples:
        >>> tokenizer = MaskGITVQGAN.from_pretrained(
        >>>     "maskgit-vqgan-imagenet-f16-256.bin"
        >>> )
        >>> codes = tokenizer.encode(images)  # [0, 1], (B, 3, 256, 256) -> (B, 16, 16)
        >>> decoded = tokenizer.decode(codes)
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        latent_dim: int = 256,
        num_codes: int = 1024,
    ) -> None:
        super().__init__()
        sizes = {
            "channels": channels,
            "channel_multipliers": list(channel_multipliers),
            "num_blocks": num_blocks,
            "latent_dim": latent_dim,
            "num_codes": num_codes,
        }
        check_arguments(sizes, MaskGITVQGAN)
        if channels % NUM_GROUPS:
            raise ValueError(
                f"channels must be a multiple of {NUM_GROUPS}, the groups of the "
                f"normalisation, got {channels}."
            )
        self.config: dict[str, Any] = sizes
        self.num_codes = num_codes
        self.downsample_factor = 2 ** (len(channel_multipliers) - 1)
        widths = [channels * multiplier for multiplier in channel_multipliers]
        self.encoder = VQGANEncoder(channels, widths, num_blocks, latent_dim)
        self.decoder = VQGANDecoder(widths, num_blocks, latent_dim)
        self.quantize = Codebook(num_codes, latent_dim)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> MaskGITVQGAN:
        """Does nothing: the tokenizer is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Finds the code of every patch.

        Args:
            images:
                Images in raw [0, 1] intensities, not normalised, with shape
                (batch_size, 3, height, width). Rows and columns beyond a multiple of
                `downsample_factor` are dropped.

        Returns:
            Codes, int64 with shape (batch_size, height // downsample_factor,
            width // downsample_factor).

        Raises:
            ValueError: If the images have another shape, are no floats, or are smaller
                than `downsample_factor`.
        """
        self._check_images(images)
        images = images.to(self.quantize.embedding.weight.dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        hidden = (self.encoder(part) for part in images.split(CHUNK_SIZE))
        return torch.cat([self.quantize.nearest(part) for part in hidden])

    def encode_to_grid(self, images: Tensor, grid_size: Sequence[int]) -> Tensor:
        """Finds codes of images that are first resized to give just this grid.

        Bicubic, with antialiasing where images get smaller.

        Args:
            images:
                As for `encode`.
            grid_size:
                Height and width of the grid of codes.

        Returns:
            Codes, int64 with shape (batch_size, height, width).

        Raises:
            ValueError: As for `encode`.
        """
        size = [side * self.downsample_factor for side in grid_size]
        if size != list(images.shape[-2:]):
            smaller = size[0] < images.shape[-2]
            images = F.interpolate(images, size, mode="bicubic", antialias=smaller)
        return self.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes to images, clamped to [0, 1]; see `decode_unclamped`."""
        return self.decode_unclamped(codes).clamp(0, 1)

    @torch.no_grad()
    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """Decodes codes to images.

        Args:
            codes:
                Codes, int64 with shape (batch_size, height, width).

        Returns:
            Images, float32 with shape (batch_size, 3, height * downsample_factor,
            width * downsample_factor), roughly in [0, 1].

        Raises:
            ValueError: If the codes are no grid or out of range.
        """
        if codes.ndim != 3:
            raise ValueError(
                "codes must be grids with shape (batch_size, height, width), got "
                f"{tuple(codes.shape)}; unflatten lists of codes."
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.num_codes:
            raise ValueError(
                f"codes must be in 0 to {self.num_codes - 1}, got {codes.min()} to "
                f"{codes.max()}."
            )
        latent = self.quantize.embedding(codes).permute(0, 3, 1, 2)
        return self.decoder(latent).float()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> MaskGITVQGAN:
        """Loads the published file; sizes are read from its tensors.

        Args:
            path:
                The .bin file, read weights-only, or the same tensors as .safetensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, or a tensor is missing, left over or
                of another shape.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no tokenizer file '{path}'. {WHERE_TO_GET_IT}."
            )
        try:
            state = _only_tensors(read_tensors(path)[0], path)
            with torch.device("meta"):
                tokenizer = cls(**tokenizer_sizes(state, str(path)))
            _check_tensors(tokenizer.state_dict(), state, str(path))
        except ValueError as error:
            raise ValueError(
                f"There is no tokenizer in '{path}': {error} {WHERE_TO_GET_IT}."
            ) from error
        dtype = state["quantize.embedding.weight"].dtype
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        tokenizer.load_state_dict(state, strict=True, assign=True)
        return tokenizer

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                "images must be floats in [0, 1] with shape (batch_size, 3, height, "
                f"width), got {images.dtype} with shape {tuple(images.shape)}."
            )
        if min(images.shape[-2:]) < self.downsample_factor:
            raise ValueError(
                f"images must be at least {self.downsample_factor} px high and wide, "
                f"got {images.shape[-2]} x {images.shape[-1]}."
            )


def is_tokenizer(names: Collection[str]) -> bool:
    """Whether names of tensors are those of a MaskGIT-VQGAN."""
    return _FIRST in names and "quantize.embedding.weight" in names


def tokenizer_sizes(state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Reads the arguments of `MaskGITVQGAN` from its tensors.

    Args:
        state:
            Tensors by their names in `MaskGITVQGAN`.
        source:
            Where they come from, for the error.

    Raises:
        ValueError: If the tensors are not those of a MaskGIT-VQGAN.
    """
    if "encoder.latent_token_positional_embedding" in state:
        raise ValueError(
            f"'{source}' holds a TiTok, which tokenizes into one dimension and has its "
            "own decoder: name it by --model."
        )
    try:
        channels = state[_FIRST].shape[0]
        num_levels = _count(state, r"encoder\.down\.(\d+)\.")
        widths = [
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0]
            for level in range(num_levels)
        ]
        num_codes, latent_dim = state["quantize.embedding.weight"].shape
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"'{source}' holds no MaskGIT-VQGAN tokenizer ({error}). Its keys: "
            f"{shown(list(state))}."
        ) from error
    return {
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "num_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_dim": latent_dim,
        "num_codes": num_codes,
    }


def _only_tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    of_tensors = all(isinstance(value, Tensor) for value in content.values())
    if not of_tensors or not all(isinstance(name, str) for name in content):
        raise ValueError(f"'{path}' is no dictionary of tensors.")
    return usable(content, path)


def _check_tensors(
    expected: dict[str, Tensor], state: dict[str, Tensor], source: str
) -> None:
    found = misfits(expected, state)
    if found:
        raise ValueError(f"'{source}' is no complete MaskGIT-VQGAN tokenizer; {found}.")


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern finds in the names."""
    return 1 + max(int(m[1]) for name in state if (m := re.match(pattern, name)))
