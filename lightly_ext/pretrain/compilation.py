"""Compilation of transformer blocks for training."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles every transformer block in place; names and weights stay as they are.

    Blocks of the same kind share their code: there is one graph for each number of
    images and tokens, not for each block. Training has four, for the encoder's three
    passes and the decoder, and a fifth for a teacher: within the eight that torch keeps
    (`recompile_limit`), so that the limit stays as it is.
    """
    for block in module.modules():
        if isinstance(block, Block):
            # Sizes do not change, and kernels for one size are faster.
            block.compile(dynamic=False, backend=backend)


def compiler_error(device: torch.device) -> str | None:
    """What keeps torch from compiling for a device, None if nothing does."""

    def trial(x: Tensor) -> Tensor:
        return x.exp() + 1

    try:
        torch.compile(trial, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton or a C++ compiler
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
