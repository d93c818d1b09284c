"""A frozen encoder and the decoder that makes images of its latent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel, select_tokens
from lightly_ext.evaluate.loading import load_stellar
from lightly_ext.evaluate.reconstruction.native import (
    LATENT,
    NativeAutoencoder,
    is_native,
)
from stellar_plugin.decoder import PixelDecoder, TokenDecoder
from stellar_plugin.encoder import Factorization
from stellar_plugin.tokenizer import TOKENIZER_FILE, WHERE_TO_GET_IT, MaskGITVQGAN

Decoder = PixelDecoder | TokenDecoder
Latent = Literal["lowrank", "dense"]
Target = Literal["pixels", "tokens"]


class FrozenAutoencoder(nn.Module):
    """An encoder that stays as it is, one of its latents, and a decoder.

    Attributes:
        model:
            The encoder.
        latent:
            "lowrank" or "dense".
        decoder:
            Reads the latent.
        tokenizer:
            Makes the codes that a `TokenDecoder` predicts, and images of them.
    """

    def __init__(
        self,
        model: FrozenModel,
        latent: str,
        decoder: Decoder,
        tokenizer: MaskGITVQGAN | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.latent = latent
        self.decoder = decoder
        self.tokenizer = tokenizer

    @property
    def target(self) -> Target:
        """What the decoder predicts."""
        return "pixels" if isinstance(self.decoder, PixelDecoder) else "tokens"

    def encode(self, images: Tensor) -> tuple[Factorization, Tensor]:
        """Factorizes uint8 images; the second is the latent (batch_size, n, dim)."""
        result = self.model(images)
        return result, select_tokens(result, self.latent)

    def predict(self, images: Tensor) -> tuple[Factorization, Tensor]:
        """Factorizes uint8 images; the second is what the decoder returns."""
        result, latent = self.encode(images)
        return result, self.decoder(latent, result.grid_size)

    def losses(self, images: Tensor) -> Tensor:
        """Loss of each image: mean squared error, or cross-entropy in nats.

        Args:
            images:
                uint8 images with shape (batch_size, 3, height, width).

        Returns:
            Tensor with shape (batch_size,), with gradient for the decoder alone.
        """
        result = self.model.unchecked(images)
        latent = select_tokens(result, self.latent)
        prediction = self.decoder(latent, result.grid_size).float()
        if self.tokenizer is None:
            return (prediction - images / 255).square().flatten(1).mean(dim=1)
        codes = self.tokenizer.encode_to_grid(images / 255, result.grid_size).flatten(1)
        loss = F.cross_entropy(prediction.mT, codes, reduction="none")
        return loss.mean(dim=1)

    def grid_size(self, crop: int) -> tuple[int, int]:
        """Grid of the latent of images of a size; raises where something does not fit.

        Args:
            crop:
                Side of the images in px.

        Raises:
            ValueError: If encoder, decoder or tokenizer do not take such images.
        """
        device = self.model.mean.device
        black = torch.zeros(1, 3, crop, crop, dtype=torch.uint8, device=device)
        with torch.no_grad():
            result, _ = self.encode(black)
            self.losses(black)
        return result.grid_size

    def to_images(self, prediction: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Makes images, unclamped, of what the decoder returned."""
        if self.tokenizer is None:
            return prediction.float()
        codes = prediction.argmax(dim=-1).unflatten(1, grid_size)
        return self.tokenizer.decode_unclamped(codes)


Autoencoder = FrozenAutoencoder | NativeAutoencoder


def own_latent(model: FrozenModel, pretrained: bool) -> str:
    """The latent that a model is made for: low-rank if it has a localization.

    Args:
        model:
            The model.
        pretrained:
            Whether the decoder is the model's own.

    Raises:
        ValueError: If it has none that a new decoder can read.
    """
    if not is_native(model):
        return "lowrank" if model.has_localization else "dense"
    if pretrained:
        return LATENT
    raise ValueError(
        f"The latent of '{model.origin.label}' is {model.num_queries} tokens in no grid"
        ", which STELLAR's decoder needs: leave --form out to score the model's own "
        "decoder, or name its patches by --form scratch --latent dense."
    )


def build_autoencoder(
    model: FrozenModel,
    devices: Devices,
    pretrained: bool,
    latent: str,
    target: Target | None,
    tokenizer: str | None,
    crop: int,
) -> Autoencoder:
    """Builds encoder and decoder on the device.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        pretrained:
            Whether the decoder is the model's own, otherwise it is a new one.
        latent:
            What the decoder reads; `own_latent` says what is usual.
        target:
            What it predicts. None: what the model's own predicts, "tokens" for a new
            one.
        tokenizer:
            File of the tokenizer; None takes the one inside the model.
        crop:
            Side of the images in px.

    Raises:
        FileNotFoundError: If there is no tokenizer file.
        ValueError: If the model has no such latent or decoder, or does not fit.
    """
    autoencoder: Autoencoder
    if pretrained and is_native(model):
        _check_native(model, latent, target, tokenizer)
        autoencoder = NativeAutoencoder(model)
    elif pretrained:
        build = _own_decoder(model, latent, target, tokenizer)
        autoencoder = FrozenAutoencoder(model, latent, *build)
    else:
        build = _new_decoder(
            model, devices, latent, target or "tokens", tokenizer, crop
        )
        autoencoder = FrozenAutoencoder(model, latent, *build)
    autoencoder.to(devices.device)
    autoencoder.grid_size(crop)  # finds out early whether everything fits
    return autoencoder


def _check_native(
    model: FrozenModel, latent: str, target: Target | None, tokenizer: str | None
) -> None:
    given = {
        "--latent": latent != LATENT,
        "--target": target is not None,
        "--tokenizer": tokenizer is not None,
    }
    wrong = [option for option, is_given in given.items() if is_given]
    if wrong:
        raise ValueError(
            f"'{model.origin.label}' decodes its own codes to pixels by itself: leave "
            f"{' and '.join(wrong)} out."
        )


def _own_decoder(
    model: FrozenModel, latent: str, target: Target | None, tokenizer: str | None
) -> tuple[Decoder, MaskGITVQGAN | None]:
    stellar = load_stellar(model)
    there = model.has_decoder or model.origin.untrained
    if stellar.decoder is None or not there:
        raise ValueError(
            f"'{model.origin.source}' holds no decoder: use --form scratch --train "
            "FOLDER."
        )
    if latent != "lowrank":
        raise ValueError(
            "The pretrained decoder reads the latent 'lowrank': use --form scratch to "
            f"decode '{latent}'."
        )
    if target not in (None, stellar.target):
        raise ValueError(
            f"The decoder of '{model.origin.source}' was pretrained with target "
            f"'{stellar.target}', not '{target}': use --form scratch."
        )
    if tokenizer is not None:
        stellar.load_tokenizer(tokenizer)  # checks the target too
    if stellar.target == "tokens" and stellar.tokenizer is None:
        raise ValueError(_no_tokenizer(f"The decoder of '{model.origin.source}'"))
    # A copy: training changes it.
    return copy.deepcopy(stellar.decoder), stellar.tokenizer


def _new_decoder(
    model: FrozenModel,
    devices: Devices,
    latent: str,
    target: Target,
    tokenizer: str | None,
    crop: int,
) -> tuple[Decoder, MaskGITVQGAN | None]:
    if latent == "lowrank" and not model.has_localization:
        raise ValueError(
            f"'{model.origin.source}' has no localization of tokens, so no low-rank "
            "latent: use --latent dense."
        )
    if target == "tokens" and tokenizer is None:
        raise ValueError(f"{_no_tokenizer('A decoder')} Or use --target pixels.")
    if target == "pixels" and tokenizer is not None:
        raise ValueError("--tokenizer is for --target tokens, not for pixels.")
    black = torch.zeros(1, 3, crop, crop, dtype=torch.uint8)
    result = model(black.to(devices.device))
    dim = select_tokens(result, latent).shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(devices.seed)
        if tokenizer is None:
            return PixelDecoder(dim, _patch_size(crop, result.grid_size)), None
        codes = MaskGITVQGAN.from_pretrained(Path(tokenizer))
        return TokenDecoder(dim, codes.num_codes), codes


def _patch_size(crop: int, grid_size: tuple[int, int]) -> int:
    patch = crop // grid_size[0]
    if any(side * patch != crop for side in grid_size):
        raise ValueError(
            f"A grid of {grid_size[0]} x {grid_size[1]} does not cut {crop} px into "
            "whole square patches: choose another --crop, or --target tokens."
        )
    return patch


def _no_tokenizer(what: str) -> str:
    return (
        f"{what} predicts codes and needs the tokenizer: add --tokenizer "
        f"{TOKENIZER_FILE}. {WHERE_TO_GET_IT}."
    )


def decoder_arguments(decoder: Decoder) -> dict[str, Any]:
    """Arguments that build a decoder of the same sizes."""
    width = decoder.proj.out_features
    block: Any = decoder.blocks[0]
    head: Any = decoder.head
    own = (
        {"patch_size": head.kernel_size[0]}
        if isinstance(decoder, PixelDecoder)
        else {"num_codes": head.out_features}
    )
    return {
        "embed_dim": decoder.proj.in_features,
        **own,
        "decoder_dim": width,
        "depth": len(decoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / width,
    }
