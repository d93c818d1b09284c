"""Compilation of transformer blocks for training, and what it is worth."""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import Callback
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightly_ext.modules import num_kept_patches
from lightly_ext.pretrain.story import tell

# Kinds of timm that the encoder and the decoders are made of.
BLOCKS = (Block, EvaBlock)
# Of a block, to say what compilation wins; the best counts.
ROUNDS = 3


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Compiles every transformer block in place; names and weights stay as they are.

    Blocks of the same kind share their code: there is one graph for each number of
    images and tokens, not for each block. Training has four, for the encoder's three
    passes and the decoder, and a fifth for a teacher: within the eight that torch keeps
    (`recompile_limit`), so that the limit stays as it is.
    """
    for block in module.modules():
        if isinstance(block, BLOCKS):
            # Sizes do not change, and kernels for one size are faster.
            if isinstance(block, FSDPModule):
                # Behind the hooks that gather the weights.
                inside = torch.compile(block.forward, dynamic=False, backend=backend)
                block.forward = inside  # type: ignore[method-assign]
            else:
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


class CompilationReport(Callback):
    """Says behind the first step what compilation took and what it wins.

    Steps that are not compiled, to compare with, would differ from the others by
    rounding, and a step beside the training may lack memory. So one block runs on
    random tokens of the masked views, forward and backward, compiled and plain. No
    gradient, weight or draw of the training changes by it.

    Attributes:
        wanted:
            Whether anything is compiled.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._start: float | None = None
        self._said = False

    def on_train_batch_start(self, *_: Any) -> None:
        """Notes when the first step begins."""
        if self.wanted and self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Says it, once."""
        if self._said or self._start is None:
            return
        self._said = True
        seconds = time.perf_counter() - self._start
        text = f"The first step took {seconds:.1f} s, with compilation."
        block = pl_module.model.encoder.vit.blocks[0]
        # Others need the rotations of patches, or all processes for their weights.
        if isinstance(block, Block) and not isinstance(block, FSDPModule):
            device = pl_module.device
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                trainer.precision_plugin.forward_context(),
            ):
                compiled, plain = _block_ms(block, _masked_tokens(pl_module, batch[0]))
            text += (
                f" A block of the encoder takes {compiled:.3g} ms instead of "
                f"{plain:.3g} (masked views, forward and backward): "
                f"{plain / compiled:.2f} times as fast."
            )
            if compiled > plain:
                text += " Set --model.compile=false: small blocks gain nothing by it."
        pl_module.print(text)
        tell(trainer, "compiled", text)


def _masked_tokens(module: Any, views: Tensor) -> Tensor:
    """Random numbers in the shape of what masked views (B, V, 3, H, W) become."""
    encoder = module.model.encoder
    height, width = (side // encoder.patch_size for side in views.shape[-2:])
    kept = num_kept_patches((height, width), module.hparams["mask_ratio"])
    return torch.randn(
        views.shape[0] * views.shape[1],
        encoder.vit.num_prefix_tokens + kept,
        encoder.embed_dim,
        device=module.device,
        dtype=module.dtype,
        requires_grad=True,
    )


def _block_ms(block: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """Milliseconds of a block, forward and backward, compiled and plain."""
    compiled = min(_forward_backward(block, tokens) for _ in range(ROUNDS))
    with torch.compiler.set_stance("force_eager"):
        plain = min(_forward_backward(block, tokens) for _ in range(ROUNDS))
    return compiled, plain


def _forward_backward(block: nn.Module, tokens: Tensor) -> float:
    leaves = [tokens, *block.parameters()]
    _wait(tokens)
    start = time.perf_counter()
    result = block(tokens)
    torch.autograd.grad(result, leaves, torch.ones_like(result))
    _wait(tokens)
    return 1000 * (time.perf_counter() - start)


def _wait(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
