"""How are the kept patches of masked views embedded fastest?

Forward and backward of the patch embedding of ViT-B/16 over masked views of 224 px, of
which 39 of 196 patches are kept, in turn in one process:

- convolution: timm's `patch_embed` over all patches, then a gather of the kept ones
- cut, convolution: kept patches are cut out, each an image of its own for `patch_embed`
- cut, linear: kept patches are cut out, one matrix product, as `StellarEncoder` does

A masked pass is the encoder's whole pass over these views, forward and backward.

    python benchmarks/patches.py --images 32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightly_ext.modules import random_focal_mask
from stellar_plugin import StellarEncoder

PATCH, GRID, IMAGE = 16, 14, 224


def convolution(encoder: StellarEncoder, images: Tensor, keep: Tensor) -> Tensor:
    x = encoder.vit.patch_embed(images).flatten(1, 2)
    return x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))


def cut_convolution(encoder: StellarEncoder, images: Tensor, keep: Tensor) -> Tensor:
    grid = images.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))
    batch = torch.arange(len(images), device=images.device)[:, None]
    patches = grid.permute(0, 2, 4, 1, 3, 5)[batch, keep // GRID, keep % GRID]
    return encoder.vit.patch_embed(patches.flatten(0, 1)).view(*keep.shape, -1)


def cut_linear(encoder: StellarEncoder, images: Tensor, keep: Tensor) -> Tensor:
    return encoder._embed_kept(images, keep, (GRID, GRID))


def masked_pass(encoder: StellarEncoder, images: Tensor, keep: Tensor) -> Tensor:
    return encoder(images, keep).dense


def milliseconds(function: Callable[[], Tensor], device: str, bf16: bool) -> float:
    """Time of one forward and backward pass."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = function().float().square().mean()
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32, help="views at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    encoder = StellarEncoder().to(device)
    images = torch.randn(arguments.images, 3, IMAGE, IMAGE, device=device)
    keep = random_focal_mask(arguments.images, (GRID, GRID), device=device)
    ways = (convolution, cut_convolution, cut_linear, masked_pass)
    times: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for number in range(arguments.rounds + 1):
        for way in ways:
            ms = milliseconds(
                lambda way=way: way(encoder, images, keep),  # type: ignore[misc]
                device,
                arguments.bf16,
            )
            if number:  # the first one warms up
                times[way.__name__].append(ms)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| way | ms | % of a masked pass |\n|---|---|---|")
    for name, ms in medians.items():
        share = 100 * ms / medians["masked_pass"]
        print(f"| {name.replace('_', ', ', 1)} | {ms:.2f} | {share:.1f} |")


if __name__ == "__main__":
    main()
