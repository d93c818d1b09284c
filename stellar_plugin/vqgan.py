"""The convolutional networks of MaskGIT-VQGAN, under the published file's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS = 32


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        if self.nin_shortcut is None:
            return y + x
        # The published weights were trained so: the input itself is not carried over.
        return y + self.nin_shortcut(y)


class _Level(nn.Module):
    """Residual blocks of one resolution; in the decoder then twice the resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, upsample: bool
    ) -> None:
        super().__init__()
        self.block = _blocks(in_channels, out_channels, num_blocks)
        self.upsample_conv = None
        if upsample:
            self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VQGANEncoder(nn.Module):
    """Images to vectors that stand near codes.

    Attributes:
        channels:
            Width behind the first convolution.
        widths:
            Width of each level. Every level but the last halves the image.
        num_blocks:
            Residual blocks per level.
        latent_dim:
            Width of the vectors.
    """

    def __init__(
        self, channels: int, widths: list[int], num_blocks: int, latent_dim: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        inputs = [channels, *widths[:-1]]
        self.down = nn.ModuleList(
            _Level(i, o, num_blocks, upsample=False)
            for i, o in zip(inputs, widths, strict=True)
        )
        self.mid = _blocks(widths[-1], widths[-1], num_blocks)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, latent_dim, h, w)."""
        x = self.down[0](self.conv_in(images))
        for level in self.down[1:]:
            x = level(F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    """Vectors of codes to images; attributes as for `VQGANEncoder`."""

    def __init__(self, widths: list[int], num_blocks: int, latent_dim: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        self.mid = _blocks(widths[-1], widths[-1], num_blocks)
        # Numbered like the encoder's levels, run from the last to the first.
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            _Level(i, o, num_blocks, upsample=level > 0)
            for level, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, latent_dim, h, w) -> (B, 3, height, width), unclamped."""
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """Vectors of the codes.

    Attributes:
        num_codes:
            Number of codes.
        latent_dim:
            Width of a vector.
    """

    def __init__(self, num_codes: int, latent_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, latent_dim)

    def nearest(self, hidden: Tensor) -> Tensor:
        """Nearest codes, the first of equals: (B, latent_dim, h, w) -> (B, h, w)."""
        return nearest_rows(hidden.permute(0, 2, 3, 1), self.embedding.weight)


def nearest_rows(vectors: Tensor, rows: Tensor) -> Tensor:
    """Number of the row that is nearest to each vector, the first of equals.

    Computed in float32, also under autocast: half precision would confuse near codes.

    Args:
        vectors:
            Vectors with shape (..., dim).
        rows:
            Rows with shape (num_rows, dim).

    Returns:
        Numbers, int64 with shape (...).
    """
    rows = rows.float()
    with torch.autocast(vectors.device.type, enabled=False):
        # |h - e|^2 without |h|^2, which is the same for every code.
        distances = torch.addmm(
            rows.square().sum(dim=1),
            vectors.reshape(-1, vectors.shape[-1]).float(),
            rows.T,
            alpha=-2,
        )
    return distances.argmin(dim=1).view(vectors.shape[:-1])


def _blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nn.Sequential(*[_ResidualBlock(i, out_channels) for i in inputs])


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
