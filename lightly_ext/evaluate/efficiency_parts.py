"""The parts of STELLAR that `stellar evaluate efficiency` times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lightly_ext.evaluate.devices import Devices
from lightly_ext.loss import match_tokens, sinkhorn_knopp
from lightly_ext.modules import random_focal_mask
from stellar_plugin import Stellar

VIEWS = 8
MASK_RATIO = 0.8
PROTOTYPES = 16384
TARGET_TEMPERATURE = 0.06
Part = Callable[[], object]


def model_parts(
    devices: Devices,
    model: Stellar,
    images: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, Part]:
    """The parts of Table 10 as functions without arguments, on random tensors.

    Args:
        devices:
            Where it runs.
        model:
            The model, with its decoder.
        images:
            Normalised images with shape (batch_size, 3, height, width).
        memory_format:
            How the masked views lie in memory.
    """
    encode, decoder = model.encoder, model.decoder
    assert decoder is not None
    with torch.no_grad(), devices.fabric.autocast():
        result = encode(images)
        latent = result.lowrank
    views = images.repeat_interleave(VIEWS, dim=0).contiguous(
        memory_format=memory_format
    )

    def masked_views() -> Tensor:
        keep = random_focal_mask(
            len(views), result.grid_size, MASK_RATIO, device=views.device
        )
        return encode(views, keep).sparse

    return {
        "encoder": _quiet(devices, lambda: encode(images).lowrank),
        "decoder": _quiet(devices, lambda: decoder(latent, result.grid_size)),
        "masked_views": _quiet(devices, masked_views),
        **_token_parts(result.sparse),
    }


def encoder_part(
    devices: Devices, encoder: nn.Module, images: Tensor
) -> dict[str, Part]:
    """The one part of any other model, as a function without arguments.

    Args:
        devices:
            Where it runs.
        encoder:
            Maps normalised images to a `Factorization`.
        images:
            Normalised images with shape (batch_size, 3, height, width).
    """
    return {"encoder": _quiet(devices, lambda: encoder(images).dense)}


def _token_parts(sparse: Tensor) -> dict[str, Part]:
    """What happens to tokens, on random ones of the shape (batch_size, r, dim)."""
    batch_size, num_tokens, dim = sparse.shape
    device = sparse.device
    tokens = torch.randn(batch_size, VIEWS, num_tokens, dim, device=device)
    targets = torch.randn_like(tokens[:, :1])
    logits = torch.randn(batch_size * num_tokens, PROTOTYPES, device=device)
    logits /= TARGET_TEMPERATURE
    return {
        "sinkhorn_clustering": lambda: sinkhorn_knopp(logits),
        "sinkhorn_matching": lambda: match_tokens(tokens, targets).indices,
        "hungarian_matching": lambda: hungarian_match(tokens, targets),
    }


@torch.no_grad()
def hungarian_match(predictions: Tensor, targets: Tensor) -> Tensor:
    """Matches unordered tokens exactly, one set after the other on the host.

    What `match_tokens` is compared with: the permutation of the least total Euclidean
    distance.

    Args:
        predictions:
            Tensor with shape (..., num_tokens, embed_dim).
        targets:
            Tensor with shape (..., num_tokens, embed_dim); leading dimensions broadcast
            against those of the predictions.

    Returns:
        Matched target of each prediction, int64 with shape (..., num_tokens), on the
        device of the predictions.
    """
    cost = torch.cdist(
        predictions.float(),
        targets.float(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    sets = cost.reshape(-1, *cost.shape[-2:]).cpu().numpy()
    matched = [torch.from_numpy(linear_sum_assignment(c)[1]) for c in sets]
    return torch.stack(matched).view(cost.shape[:-1]).to(cost.device)


def _quiet(devices: Devices, part: Callable[[], Tensor]) -> Part:
    """The part without gradients, in the precision of the devices."""

    def run() -> Tensor:
        with torch.no_grad(), devices.fabric.autocast():
            return part()

    return run
