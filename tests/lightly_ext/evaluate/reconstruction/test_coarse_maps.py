"""Decoders of maps of stride 32: 7 x 7 cells of 224 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.images import folder_images
from lightly_ext.evaluate.reconstruction.autoencoder import (
    FrozenAutoencoder,
    build_autoencoder,
    own_latent,
)
from lightly_ext.evaluate.reconstruction.image_metrics import to_uint8
from lightly_ext.evaluate.reconstruction.scores import score_images
from stellar_plugin.decoder import PixelDecoder
from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.network import unlocalized
from stellar_plugin.protocols import RECONSTRUCTION_SCRATCH
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import Given, make_given, write_images
from tests.tokenizer_weights import reference_tokenizer

SIDE, STRIDE, CELLS = 224, 32, 7
SMALL: dict[str, Any] = {"decoder_dim": 16, "depth": 1, "num_heads": 2}


class MeanColours(nn.Module):
    """A map of the mean colours of cells."""

    def forward(self, images: Tensor) -> Factorization:
        cells = F.avg_pool2d(images, STRIDE)
        dense = cells.flatten(2).mT
        return unlocalized(dense.mean(dim=1), dense, (CELLS, CELLS))


@pytest.fixture
def given(tmp_path: Path) -> Given:
    origin = Origin("colours", "BYOL", "0" * 64, (0, 0, 0), (1, 1, 1), name="colours")
    return make_given(tmp_path, FrozenModel(MeanColours(), origin))


def _build(given: Given, target: Any, tokenizer: str | None) -> FrozenAutoencoder:
    latent = own_latent(given.model, pretrained=False)
    assert latent == "dense"
    found = build_autoencoder(*given[:2], False, latent, target, tokenizer, SIDE)
    assert isinstance(found, FrozenAutoencoder)
    return found


def test_a_colour_is_learned(given: Given) -> None:
    autoencoder = _build(given, "pixels", None)
    head: Any = autoencoder.decoder.head
    assert head.kernel_size == (STRIDE, STRIDE)
    torch.manual_seed(0)
    autoencoder.decoder = PixelDecoder(3, STRIDE, **SMALL)
    optimizer = torch.optim.Adam(autoencoder.decoder.parameters(), lr=2e-2)
    colour = torch.tensor([20, 130, 240], dtype=torch.uint8).view(1, 3, 1, 1)
    losses = []
    for _ in range(25):
        (loss,) = autoencoder.losses(colour.expand(1, 3, SIDE, SIDE))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.1 and losses[-1] < 5e-3


def test_codes_are_of_the_smaller_image_and_scores_of_the_crop(
    given: Given, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.bin"
    torch.save(reference_tokenizer().state_dict(), path)
    autoencoder = _build(given, "tokens", str(path))
    own = reference_tokenizer()
    files = folder_images(write_images(tmp_path / "images", 2, size=(SIDE, SIDE)))
    protocol = RECONSTRUCTION_SCRATCH.replace(resize=SIDE, crop=SIDE)
    networks = tiny_networks(given.devices)
    scores, _, _ = score_images(given.devices, autoencoder, files, protocol, networks)
    opened = [Image.open(files.root / name) for name in files.names]
    crops = torch.stack([pil_to_tensor(image) for image in opened])
    small = F.interpolate(crops / 255, [112, 112], mode="bicubic", antialias=True)
    codes = own.encode(small)
    assert codes.shape == (2, CELLS, CELLS)
    logits = autoencoder.decoder(given.model(crops).dense, (CELLS, CELLS))
    expected = F.cross_entropy(logits.mT, codes.flatten(1), reduction="none")
    torch.testing.assert_close(autoencoder.losses(crops), expected.mean(dim=1))
    decoded = own.decode_unclamped(codes)
    assert decoded.shape[-2:] == (112, 112)
    shown = F.interpolate(decoded, [SIDE, SIDE], mode="bicubic", antialias=True)
    errors = (to_uint8(shown, "32-true") / 255 - crops / 255).abs().mean()
    assert scores["tokenizer_lpips"] == pytest.approx(float(errors), rel=1e-3)
