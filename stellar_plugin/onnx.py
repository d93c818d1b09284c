"""The encoder as an ONNX file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.model import Stellar

# A protobuf file ends at 2 GiB; weights of that size go into a file beside it.
MAX_BYTES = 2**31 - 2**24


def export_onnx(
    model: Stellar | StellarEncoder,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
) -> Path:
    """Writes the encoder for images of one size and batches of any size.

    The input `images` is normalised, float32 with shape (batch, 3, height, width). The
    outputs are `sparse`, `dense`, `localization` and `cls` as in `Factorization`;
    those that the encoder does not have are left out.

    Args:
        model:
            Model or encoder; its weights are not changed.
        path:
            File to write. Weights of more than 2 GiB go into `path` + ".data".
        image_size:
            Height and width of the images, those the model was trained with by default.

    Returns:
        The path.

    Raises:
        ImportError: If the packages of the extra `export` are missing.
        ValueError: If `image_size` is no multiple of the patch size.

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
    parameter = next(encoder.parameters())
    patch = encoder.patch_size
    height, width = image_size or [side * patch for side in encoder.grid_size]
    # A batch of one would be taken for a constant.
    images = torch.zeros(2, 3, height, width, device=parameter.device)
    training = encoder.training
    outputs = _Outputs(encoder).eval()
    try:
        with torch.no_grad():
            names = list(outputs(images))
        torch.onnx.export(
            outputs,
            (images,),
            str(path),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=sum(p.nbytes for p in encoder.parameters()) > MAX_BYTES,
            verbose=False,
        )
    finally:
        encoder.train(training)
    return Path(path)


class _Outputs(nn.Module):
    """Tensors by name instead of a `Factorization`, for the tracer."""

    def __init__(self, encoder: StellarEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        result = self.encoder(images)
        outputs = {"sparse": result.sparse, "dense": result.dense}
        if self.encoder.num_queries == 0:
            del outputs["sparse"]
        if self.encoder.has_localization:
            outputs["localization"] = result.localization
        if result.cls is not None:
            outputs["cls"] = result.cls
        return outputs
