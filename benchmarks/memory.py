"""How much memory does a training step need, on one GPU and in shards?

Parameters are counted on the model itself; activations by a formula, which a test
compares with what autograd keeps of a block:

- weights, gradients and the two moments of AdamW, float32: 16 bytes a parameter
- DDP's buckets: the gradients once more, 4 bytes
- fsdp2: 16 bytes / processes; whole for a step, with gradients, what is outside of
  blocks (8 bytes), and for a moment two blocks with the gradients of one (12 bytes)
- a momentum teacher of encoder and heads: 4 bytes a parameter, / processes
- copies of the weights in bf16 that autocast makes for a step: 2 bytes a parameter
- a block keeps of a token of width d, in bf16-mixed: the inputs of two norms in float32
  (8 d bytes) and in bf16 their outputs (4 d), queries, keys and values (6 d), what
  attention gives (2 d), the hidden layer before and behind GELU (16 d): 36 d, with 4
  bytes a head and 16 for the norms
- a checkpointed block keeps its input alone (4 d); the backward pass has one block as a
  whole, of the largest pass
- behind the blocks: input and output of the last norm (8 d)
- views: float32

    python benchmarks/memory.py --batch_size 128
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.gpu.sizes import LARGE
from benchmarks.step import BASE, Sizes
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.compilation import BLOCKS

HUGE = replace(
    LARGE,
    model_name="stellar_vit_huge_patch14_224",
    width=1280,
    depth=32,
    local_image=98,
    patch=14,
)
GIB = 2**30


class Parameters(NamedTuple):
    """Numbers of trainable parameters.

    Attributes:
        total: Of all parts.
        outside: Of what is outside of transformer blocks.
        block: Of the largest block.
        taught: Of what a momentum teacher copies.
    """

    total: int
    outside: int
    block: int
    taught: int


def count_parameters(sizes: Sizes) -> Parameters:
    """Counts those of a pretraining, without making its weights."""
    with torch.device("meta"):
        module = StellarPretraining(**sizes.recipe)

    def size(part: torch.nn.Module | None) -> int:
        parameters = [] if part is None else part.parameters()
        return sum(p.numel() for p in parameters if p.requires_grad)

    blocks = [size(part) for part in module.modules() if isinstance(part, BLOCKS)]
    taught = (module.model.encoder, module.sparse_head, module.cls_head)
    total = size(module)
    return Parameters(total, total - sum(blocks), max(blocks), sum(map(size, taught)))


def state_bytes(
    parameters: Parameters, processes: int = 1, sharded: bool = False
) -> float:
    """Bytes of weights, gradients and moments in each process, during a step."""
    if not sharded:
        buckets = 4 if processes > 1 else 0
        return (16 + buckets) * parameters.total
    whole = 8 * parameters.outside + 12 * parameters.block
    return 16 * parameters.total / processes + whole


def block_bytes(width: int, heads: int, checkpointed: bool = False) -> int:
    """Bytes that a block keeps of a token, in bf16-mixed."""
    return 4 * width if checkpointed else 36 * width + 4 * heads + 16


def activation_bytes(
    sizes: Sizes, batch_size: int, checkpointed: bool = False
) -> float:
    """Bytes that the forward pass of a step keeps, with its views, in bf16-mixed."""
    prefix = 1 + sizes.queries
    tokens = [batch_size * n * (prefix + k) for n, k in sizes.passes.values()]
    patches = batch_size * sizes.grid**2
    encoder = sizes.width, sizes.heads
    decoder = sizes.decoder_width, sizes.decoder_heads
    kept = sum(tokens) * (
        sizes.depth * block_bytes(*encoder, checkpointed) + 8 * sizes.width
    ) + patches * (
        sizes.decoder_depth * block_bytes(*decoder, checkpointed)
        + 8 * sizes.decoder_width
    )
    if checkpointed:
        kept += max(tokens) * block_bytes(*encoder)
    pixels = (1 + sizes.views) * sizes.image**2 + sizes.views * sizes.local_image**2
    return kept + batch_size * pixels * 3 * 4


def column(sizes: Sizes, batch_size: int) -> dict[str, float]:
    """GiB of each process by part, behind the millions of parameters."""
    parameters = count_parameters(sizes)
    plain, less = (activation_bytes(sizes, batch_size, on) for on in (False, True))
    held = {
        "one GPU": state_bytes(parameters),
        "ddp, 8 GPUs": state_bytes(parameters, 8),
        "fsdp2, 8 GPUs": state_bytes(parameters, 8, sharded=True),
        "fsdp2, 64 GPUs": state_bytes(parameters, 64, sharded=True),
    }
    copies = 2 * parameters.total
    parts = {f"weights, gradients, moments: {k}": v for k, v in held.items()}
    parts |= {
        "copies of the weights in bf16": copies,
        "activations and views": plain,
        "activations and views, checkpointed": less,
        "**all**: one GPU": held["one GPU"] + copies + plain,
    }
    for name, value in held.items():
        parts[f"**all**, checkpointed: {name}"] = value + copies + less
    parts["a momentum teacher: one GPU or ddp"] = 4 * parameters.taught
    gib = {name: value / GIB for name, value in parts.items()}
    return {"million parameters": parameters.total / 1e6, **gib}


def table(batch_size: int) -> list[str]:
    """Rows of a Markdown table."""
    models = {"B": BASE, "L": LARGE, "H": HUGE}
    columns = [column(sizes, batch_size) for sizes in models.values()]
    rows = [[f"GiB a GPU, batch {batch_size}", *models], ["---"] * 4]
    rows[2:] = [[part, *(f"{c[part]:.1f}" for c in columns)] for part in columns[0]]
    return [f"| {' | '.join(row)} |" for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=128, help="of a process")
    print("\n".join(table(parser.parse_args(argv).batch_size)))


if __name__ == "__main__":
    main()
