"""The encoder as an ONNX file."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.model import Stellar

# A protobuf file ends at 2 GiB; weights of that size go into a file beside it.
MAX_BYTES = 2**31 - 2**24
# Patches of a side of the largest image of a file for any size.
MAX_GRID = 1024


def export_onnx(
    model: Stellar | StellarEncoder,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    half: bool = False,
) -> Path:
    """Writes the encoder for batches of any size, and images of one size or of any.

    The input `images` is normalised, float32 with shape (batch, 3, height, width). The
    outputs are `sparse`, `dense`, `localization` and `cls` as in `Factorization`,
    float32; those that the encoder does not have are left out.

    Args:
        model:
            Model or encoder; its weights are not changed.
        path:
            File to write. Weights of more than 2 GiB go into `path` + ".data".
        image_size:
            Height and width of the images, those the model was trained with by default.
        dynamic_size:
            Whether images may have any height and width of up to 1024 patches;
            positions are resampled, or computed, in the graph as the model does it.
            Sizes are multiples of the patch size: of others the graph leaves out what
            is right of and below the last whole patch, where the model raises.
        half:
            Whether weights and computation are float16, half the size; localization is
            computed in float32, as the model does.

    Returns:
        The path.

    Raises:
        ImportError: If the packages of the extra `export` are missing.
        ValueError: If `image_size` is no multiple of the patch size, or is given beside
            `dynamic_size`.

    Examples:
        >>> export_onnx(Stellar.from_pretrained("runs/pretrain/model"), "stellar.onnx")
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {' and '.join(missing)}: "
            "pip install 'stellar-plugin[export]'"
        )
    encoder = model.encoder if isinstance(model, Stellar) else model
    if dynamic_size and image_size is not None:
        raise ValueError("Give image_size, or dynamic_size for any size, not both.")
    patch = encoder.patch_size
    height, width = image_size or [side * patch for side in encoder.grid_size]
    sides: dict[int, Any] = {}
    if dynamic_size:
        # Two sides, unlike each other and those of the table: else one of these would
        # be taken for a constant.
        height, width = ((side + i) * patch for i, side in enumerate(_grid(encoder)))
        for axis, name in ((2, "rows"), (3, "columns")):
            sides[axis] = patch * torch.export.Dim(name, min=1, max=MAX_GRID)
    parameter = next(encoder.parameters())
    # A batch of one would be taken for a constant.
    images = torch.zeros(2, 3, height, width, device=parameter.device)
    training = encoder.training
    outputs = _Outputs(copy.deepcopy(encoder).half() if half else encoder).eval()
    try:
        with torch.no_grad():
            names = list(outputs(images))
        torch.onnx.export(
            outputs,
            (images,),
            str(path),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch"), **sides}},
            dynamo=True,
            external_data=sum(p.nbytes for p in outputs.parameters()) > MAX_BYTES,
            verbose=False,
        )
    finally:
        encoder.train(training)
    return Path(path)


def _grid(encoder: StellarEncoder) -> tuple[int, int]:
    """A patch grid other than that of the position table, in both sides."""
    height, width = encoder.grid_size
    return (height + 1, width + 1) if height != width + 1 else (height + 2, width + 1)


def outputs_of(encoder: StellarEncoder, images: Tensor) -> dict[str, Tensor]:
    """The outputs of a file by their names, in float32.

    Args:
        encoder:
            The encoder.
        images:
            Normalised images with shape (batch_size, 3, height, width).
    """
    result = encoder(images.to(encoder.vit.patch_embed.proj.weight.dtype))
    outputs = {"sparse": result.sparse, "dense": result.dense}
    if encoder.num_queries == 0:
        del outputs["sparse"]
    if encoder.has_localization:
        outputs["localization"] = result.localization
    if result.cls is not None:
        outputs["cls"] = result.cls
    return {name: output.float() for name, output in outputs.items()}


class _Outputs(nn.Module):
    """Tensors by name instead of a `Factorization`, for the tracer."""

    def __init__(self, encoder: StellarEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return outputs_of(self.encoder, images)
