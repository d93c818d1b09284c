"""Floating-point operations of a training step, counted on paper.

Model FLOPs utilisation (MFU) is `step_flops / seconds / peak`: the operations that the
method asks for, over what the chip could do in that time.

- A multiplication with its addition counts as 2; only matrix products are counted.
- A forward product of 2 m n k costs the same again for each operand that needs a
  gradient.
- What is computed twice to save memory (checkpointed blocks, logits in the backward
  pass, scores of attention) is counted once.
- The prototype loss counts as in its plain form, `-sum(q log_softmax(W x / t))`; the
  contraction of targets that our form adds (`W^T q`, below 0.1 % of a step) does not.
"""

from __future__ import annotations

from benchmarks.step import Sizes

# Dense bf16 with float32 accumulation, H100 and H200 SXM, by their datasheets.
PEAK_BF16 = 989e12
# Forward, gradient of the input, gradient of the weight.
TRAINED = 3


def block_flops(tokens: int, width: int, mlp_ratio: float = 4) -> float:
    """Forward pass of a transformer block over one sequence."""
    products = 2 * tokens * width**2 * (4 + 2 * mlp_ratio)  # qkv, projection, MLP
    attention = 2 * 2 * tokens**2 * width  # scores, weighted values
    return products + attention


def encoder_flops(sizes: Sizes, patches: int) -> float:
    """Forward pass of the encoder over one image, of which so many patches are seen."""
    tokens = 1 + sizes.queries + patches
    return sizes.depth * block_flops(tokens, sizes.width)


def step_flops(sizes: Sizes, batch_size: int) -> dict[str, float]:
    """Useful operations of a step, forward and backward, by part.

    Args:
        sizes: Sizes of the model and its views.
        batch_size: Number of images.
    """
    width, queries, views = sizes.width, sizes.queries, sizes.views
    patches, embedded = sizes.grid**2, sizes.patch**2 * 3
    flops: dict[str, float] = {}
    for name, (images, seen) in sizes.passes.items():
        # The gradient of the images is not needed.
        patch_embedding = 2 * (2 * seen * embedded * width)
        blocks = TRAINED * encoder_flops(sizes, seen)
        flops[f"encode_{name}"] = images * (blocks + patch_embedding)
    projections = 2 * (patches + queries) * width**2
    cosines_and_latent = 2 * 2 * patches * queries * width
    flops["localization"] = TRAINED * (projections + cosines_and_latent)
    blocks = sizes.decoder_depth * block_flops(patches, sizes.decoder_width)
    latent_and_pixels = 2 * patches * sizes.decoder_width * (width + embedded)
    flops["decoder"] = TRAINED * (blocks + latent_and_pixels)
    # Of the sparse head: target and views; of the CLS head: local crops, too.
    sparse_rows, cls_rows = queries * (1 + views), 1 + 2 * views
    rows = sparse_rows + cls_rows
    head = 2 * sizes.hidden * (width + sizes.embedding)
    flops["heads"] = TRAINED * rows * head
    logits = 2 * sizes.embedding * sizes.prototypes
    flops["prototypes"] = TRAINED * rows * logits + (queries + 1) * logits
    flops["koleo"] = (1 + views) * 2 * queries**2 * width  # without gradient
    return {name: batch_size * value for name, value in flops.items()}


def total_flops(sizes: Sizes, batch_size: int) -> float:
    """Useful operations of a step."""
    return sum(step_flops(sizes, batch_size).values())


def block_flops_of_step(sizes: Sizes, batch_size: int) -> float:
    """Operations of the transformer blocks alone, what `BareBlocks` does."""
    encoder = sum(
        images * encoder_flops(sizes, seen) for images, seen in sizes.passes.values()
    )
    decoder = sizes.decoder_depth * block_flops(sizes.grid**2, sizes.decoder_width)
    return TRAINED * batch_size * (encoder + decoder)


def mfu(flops: float, ms: float) -> float:
    """Model FLOPs utilisation in percent of one chip's dense bf16 peak."""
    return 100 * flops / (ms / 1000) / PEAK_BF16
