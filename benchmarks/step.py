"""What does one training step cost beyond the transformer passes in it?

Times a whole step of STELLAR (colours, masks, encoder passes, decoder, heads, loss,
backward, AdamW) beside the bare timm transformer blocks of the same token counts,
forward and backward, in turn in one process and in the same precision. On a CPU, times
are those of the processor, all cores together, so that other programs count less. Peak
memory is that of a process of its own for each batch size.

    python benchmarks/step.py --batch-sizes 4 8 16 --precision fp32 bf16
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightly_ext.modules import random_focal_mask
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.optimization import parameter_groups

MASK_RATIO = 0.8
CLIP = 3.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of what it is trained on, those of STELLAR-B by default.

    Attributes:
        model_name: Name that timm knows.
        width: Width of the encoder.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        queries: Sparse tokens.
        views: Masked views of an image, and as many local crops.
        image: Side of a view in pixels.
        local_image: Side of a local crop in pixels.
        patch: Side of a patch in pixels.
        decoder_width: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        hidden: Hidden width of the projection heads.
        embedding: Width of the embeddings.
        prototypes: Prototypes of each head.
    """

    model_name: str = "stellar_vit_base_patch16_224"
    width: int = 768
    depth: int = 12
    heads: int = 12
    queries: int = 16
    views: int = 8
    image: int = 224
    local_image: int = 96
    patch: int = 16
    decoder_width: int = 512
    decoder_depth: int = 6
    decoder_heads: int = 8
    hidden: int = 2048
    embedding: int = 256
    prototypes: int = 16384

    @property
    def grid(self) -> int:
        """Patches along the side of a view."""
        return self.image // self.patch

    @property
    def passes(self) -> dict[str, tuple[int, int]]:
        """Images per image of the batch, and patches of each, by encoder pass."""
        return {
            "target": (1, self.grid**2),
            "masked": (self.views, int(self.grid**2 * (1 - MASK_RATIO) + 1e-9)),
            "local": (self.views, (self.local_image // self.patch) ** 2),
        }

    @property
    def recipe(self) -> dict[str, Any]:
        """Arguments of `StellarPretraining`."""
        model = {
            "model_name": self.model_name,
            "num_queries": self.queries,
            "img_size": self.image,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "decoder_dim": self.decoder_width,
            "decoder_depth": self.decoder_depth,
            "decoder_num_heads": self.decoder_heads,
        }
        head = {
            "hidden_dim": self.hidden,
            "output_dim": self.embedding,
            "num_prototypes": self.prototypes,
        }
        return {"model": model, "head": head, "mask_ratio": MASK_RATIO}


BASE = Sizes()


class BareBlocks(nn.Module):
    """The transformer blocks of a step, fed with random tokens."""

    def __init__(self, sizes: Sizes, device: str, bf16: bool = False) -> None:
        super().__init__()
        self.encoder = _blocks(sizes.width, sizes.depth, sizes.heads).to(device)
        self.decoder = _blocks(
            sizes.decoder_width, sizes.decoder_depth, sizes.decoder_heads
        ).to(device)
        self.sizes, self.device, self.bf16 = sizes, device, bf16

    def step(self, batch_size: int) -> None:
        """Forward and backward of every pass."""
        sizes = self.sizes
        prefix = 1 + sizes.queries
        for images, patches in sizes.passes.values():
            self._pass(self.encoder, batch_size * images, prefix + patches, sizes.width)
        self._pass(self.decoder, batch_size, sizes.grid**2, sizes.decoder_width)

    def _pass(self, blocks: nn.Module, images: int, tokens: int, width: int) -> None:
        x = torch.randn(images, tokens, width, device=self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = blocks(x).float().square().mean()
        loss.backward()


class Step:
    """A training step on random views, as `stellar pretrain` takes it."""

    def __init__(
        self,
        sizes: Sizes,
        batch_size: int,
        device: str,
        bf16: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.sizes, self.batch_size, self.device = sizes, batch_size, device
        self.bf16 = bf16
        self.module = StellarPretraining(
            **sizes.recipe, grad_checkpointing=checkpointing
        ).to(device)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        groups = parameter_groups(self.module, 0.04)
        self.optimizer = torch.optim.AdamW(groups, 1e-4, fused=True)
        self.views = tuple(
            torch.randint(
                256,
                (batch_size, sizes.views, 3, side, side),
                dtype=torch.uint8,
                device=device,
            )
            for side in (sizes.image, sizes.local_image)
        )

    def __call__(self) -> Tensor:
        """Runs the step and returns the loss."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss

    def loss(self) -> Tensor:
        """The forward pass."""
        grid = (self.sizes.grid, self.sizes.grid)
        num_masks = self.batch_size * self.sizes.views
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            views = self.module.augment(*self.views)
            keep = random_focal_mask(num_masks, grid, MASK_RATIO, device=self.device)
            keep = keep.unflatten(0, (self.batch_size, self.sizes.views))
            terms, *_ = self.module.loss_terms(views, keep)
        return terms.total

    def update(self) -> None:
        """Clips the gradients and changes the weights."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()


def _blocks(width: int, depth: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(
        *[Block(width, num_heads, qkv_bias=True) for _ in range(depth)]
    )


def _seconds(function: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(batch_size: int, device: str, precision: str, rounds: int) -> list[str]:
    """One row of the table: times, ratio and peak memory."""
    torch.manual_seed(0)
    step = Step(BASE, batch_size, device, precision == "bf16")
    step()
    # Peak of the step alone: the bare blocks come later.
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bare = BareBlocks(BASE, device, precision == "bf16")
    bare.step(batch_size)
    pairs = [
        (_seconds(step, device), _seconds(lambda: bare.step(batch_size), device))
        for _ in range(rounds)
    ]
    ours, blocks = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return [
        precision,
        str(batch_size),
        f"{ours:.2f}",
        f"{ours / batch_size:.2f}",
        f"{blocks:.2f}",
        f"{ratio:.2f}",
        f"{peak:.1f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    precisions = ["fp32", "bf16"]
    parser.add_argument("--precision", nargs="+", choices=precisions, default=["fp32"])
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = ["precision", "batch", "step, s", "s per image", "blocks, s"]
    head += ["step / blocks", "peak, GiB"]
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    for precision in arguments.precision:
        for batch_size in arguments.batch_sizes:
            settings = (batch_size, device, precision, arguments.rounds)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(measure, *settings).result()
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
