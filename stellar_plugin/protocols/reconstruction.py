"""Protocols of reconstruction: images decoded from a frozen latent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stellar_plugin.protocols.base import CropProtocol, RandomCropProtocol


@dataclass(frozen=True, kw_only=True)
class ReconstructionProtocol(CropProtocol):
    """Decoded images are scored; target and networks are of the run."""

    split: str
    inference: str
    head: str
    target: str = ""
    averaging: str
    rule: str
    networks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecoderProtocol(ReconstructionProtocol, RandomCropProtocol):
    """The decoder is trained before."""


# An image in 8 bits is itself off by this much: the error of rounding, 1/12 grey level
# squared. Without the bound one perfect image makes the mean infinite.
MOST_PSNR_DB = 10 * math.log10(12 * 255**2)
# Below, the covariance of the 2048 features of FID is singular.
FID_IMAGES = 2048
RECONSTRUCTION = ReconstructionProtocol(
    name="reconstruction-pretrained",
    source="STELLAR tables 3 and 4; crops, metrics and rounding are our choice: the "
    "public code scores random crops and flips, so its numbers are no match",
    split="all images are scored",
    head="decoder as pretrained",
    inference="bicubic resize and centre crop in, decoded image of another size "
    "resized to the crop (bicubic, antialias), clamped to [0, 1], rounded to 8 bits",
    rule="FID: 2048 features of torch-fidelity's InceptionV3, resized as in TensorFlow "
    "1, float64; LPIPS 0.1: AlexNet; PSNR: RGB, at most 58.9 dB; SSIM: RGB, Gaussian "
    "windows of 11 px inside the image, sigma 1.5",
    averaging="LPIPS, PSNR in dB and SSIM of each image, mean over images",
)
RECONSTRUCTION_SCRATCH = DecoderProtocol(
    **vars(RECONSTRUCTION),
    train_views="random resized crop, flip, anew in every epoch",
    train_scale=(0.36, 1.0),  # of the view that pretraining reconstructs
    optimizer="AdamW",
    lrs=(1e-4,),
    batch_sizes=(128,),
    weight_decay=1e-4,
    clip=5.0,
    epochs=20,
    schedule="constant",
).replace(
    name="reconstruction-scratch",
    source="STELLAR table 1 and its public recipe; crops, training views, weight "
    "decay, metrics and rounding are our choice: the public code scores random crops "
    "and flips, so its numbers are no match",
    head="decoder from scratch (6 blocks, 512 wide) on the frozen latent",
)
RECONSTRUCTION_FINETUNED = RECONSTRUCTION_SCRATCH.replace(
    name="reconstruction-finetuned",
    head="decoder as pretrained, fine-tuned on the frozen latent",
)
RECONSTRUCTION_NATIVE = RECONSTRUCTION.replace(
    name="reconstruction-native",
    source="STELLAR table 1, where TiTok has its own decoder; crops, metrics and "
    "rounding are our choice, the paper does not tell what it scored",
    head="the model's native decoder, a full ViT, on the codes of its tokens",
    crop=256,
)
