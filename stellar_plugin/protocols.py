"""Protocols: how images are cut, labels read, heads trained and scores averaged.

Every rule of evaluation has its one place here. Commands, mmseg configs, the cards
stored with scores and the documentation take their values from this module.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

FEATURES = ("sparse", "dense", "cls", "cls+dense", "lowrank")

# Where the objective of a method acts, so what "auto" means for its weights.
FEATURE_OF_METHOD = {
    "STELLAR": "sparse",
    "DINO or iBOT": "cls",
    "MoCo v3": "cls",
    "MAE": "dense",
    "I-JEPA": "dense",
    "BEiT": "dense",
    "DINOv2": "cls+dense",
    "pooled by the network": "cls",
    "raw patches": "cls",
}

# 10 % of the training set, drawn once by this seed, whatever the seed of the run.
HELD_OUT = 0.1
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Protocol:
    """What must be the same for two scores to stand in one column.

    Fields that a protocol has no use for are None and missing from its card.

    Attributes:
        name: Name of the protocol.
        source: Who defined it.
        data: Data set.
        split: Which images train, choose and test.
        limit: Number of images of each part that is used, None for all.
        features: One of `FEATURES`, or "auto", where the objective of the method acts.
        pooling: How the features of an image become one vector.
        resize: Length of the shorter side after resizing, px.
        crop: Side of the crop at test time, px.
        longest: Largest length of the longer side after resizing, px.
        stride: Step of the sliding window, px.
        train_views: How training images are cut.
        train_scale: Range of the area of random crops, as fractions of the image.
        train_ratio: Range of the factor on the resized size in training.
        inference: How a prediction for a whole image is made.
        label_resolution: Resolution at which labels are compared.
        classes: The classes, or how label values become classes.
        num_classes: Number of classes.
        neighbours: Number of voting neighbours.
        temperature: Temperature of the votes, or of the loss at the start.
        head: The trained part.
        target: What a decoder predicts.
        backbone: "frozen" or "trained", where that is a choice.
        loss: Its loss.
        optimizer: Its optimiser.
        lrs: Learning rates to choose from.
        batch_sizes: Batch sizes to choose from, or to time.
        weight_decay: Weight decay.
        clip: Largest norm of a gradient.
        epochs: Passes over the training images.
        iterations: Optimiser steps.
        warmup: Steps of linear warm-up.
        schedule: Learning rate over time.
        averaging: What a score is a mean of.
        evaluation_batch: Images of a batch, where a score depends on it.
        rule: What else decides on a score, for experiments without a trained head.
        networks: The networks that metrics look through, by hash.
    """

    name: str
    source: str
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    features: str | None = None
    pooling: str | None = None
    resize: int | None = None
    crop: int | None = None
    longest: int | None = None
    stride: int | None = None
    train_views: str | None = None
    train_scale: tuple[float, float] | None = None
    train_ratio: tuple[float, float] | None = None
    inference: str | None = None
    label_resolution: str | None = None
    classes: str | None = None
    num_classes: int | None = None
    neighbours: int | None = None
    temperature: float | None = None
    head: str | None = None
    target: str | None = None
    backbone: str | None = None
    loss: str | None = None
    optimizer: str | None = None
    lrs: tuple[float, ...] | None = None
    batch_sizes: tuple[int, ...] | None = None
    weight_decay: float | None = None
    clip: float | None = None
    epochs: int | None = None
    iterations: int | None = None
    warmup: int | None = None
    schedule: str | None = None
    averaging: str | None = None
    evaluation_batch: int | None = None
    rule: str | None = None
    networks: tuple[str, ...] | None = None

    def card(self) -> dict[str, Any]:
        """Returns the fields that are in use, with values that JSON knows."""
        fields = dataclasses.asdict(self).items()
        return json.loads(json.dumps({k: v for k, v in fields if v is not None}))

    def replace(self, **fields: Any) -> Protocol:
        """Returns the protocol with other values."""
        return dataclasses.replace(self, **fields)


def card_digest(card: dict[str, Any]) -> str:
    """Short name of a card: the same for equal cards, and only for those."""
    text = json.dumps(card, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


NEIGHBOURS = 20
VOTE_TEMPERATURE = 0.07
KNN = Protocol(
    name="knn",
    source="STELLAR table 1; k, temperature and similarity are our choice",
    split="bank: training set; queries: test set",
    features="auto",
    pooling="mean over tokens",
    resize=256,
    crop=224,
    neighbours=NEIGHBOURS,
    temperature=VOTE_TEMPERATURE,
    rule="cosine similarity, neighbours vote with exp(similarity / temperature)",
    averaging="over test images",
)
LINEAR = Protocol(
    name="linear",
    source="STELLAR appendix A.2, on cached features of centre crops",
    split="90 % of the training set trains, 10 % chooses lr and batch size, test set",
    features="auto",
    pooling="mean over tokens",
    resize=256,
    crop=224,
    train_views="the same crops as at test time",
    head="LayerNorm, linear",
    loss="cross-entropy",
    optimizer="AdamW, decay on all parameters",
    lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    batch_sizes=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
    weight_decay=1e-4,
    clip=5.0,
    epochs=30,
    schedule="constant",
    averaging="over test images",
)
LINEAR_PAPER = LINEAR.replace(
    name="linear-paper",
    source="STELLAR appendix A.2",
    train_views="random resized crop to the same size, flip, anew in every epoch",
    train_scale=(0.5, 1.0),  # ImageNet: IMAGENET_TRAIN_SCALE
)
IMAGENET_TRAIN_SCALE = (0.2, 1.0)
# Share of the steps of fine-tuning in which the learning rate rises: 5 of 75 epochs.
FINETUNE_WARMUP = 1 / 15
FINETUNE = LINEAR_PAPER.replace(
    name="finetune",
    source="STELLAR appendix B.4; lr, batch size and schedule are our choice",
    split="90 % of the training set trains, 10 % watches, test set",
    lrs=(1e-4,),
    batch_sizes=(1024,),
    epochs=75,
    schedule="linear warm-up in the first 1/15 of the steps, cosine to 0",
)
EFFICIENCY = Protocol(
    name="efficiency",
    source="STELLAR appendix B.5, table 10",
    crop=224,
    batch_sizes=(4, 8, 16, 32, 64),
    inference="without gradients, 32-true, contiguous",
    averaging="median of repeated runs",
    rule="random images; encoder: image to S, U and Z = L S; decoder: Z to its "
    "output, without the tokenizer; masked views: 8 views at 80 % masking; clustering: "
    "Sinkhorn of the sparse tokens over 16384 prototypes; matching: 8 views with the "
    "target, from distances to indices on the device",
)
RANK = Protocol(
    name="rank",
    source="STELLAR figure 2 (c)",
    features="sparse",
    rule="one model per number of tokens; accuracy of the linear probe, FID of the "
    "pretrained decoder",
)
SEGMENTATION = Protocol(
    name="segmentation",
    source="DINOv2 section 7.4, as mmsegmentation reads the sets",
    features="dense",
    resize=512,
    longest=2048,
    crop=512,
    stride=341,
    train_views="resize by train_ratio, random crop (one class fills 75 % of it at "
    "most), flip, photometric distortion",
    train_ratio=(0.5, 2.0),
    inference="sliding window",
    label_resolution="of the original image",
    head="BatchNorm, 1 x 1 convolution",
    backbone="frozen",
    loss="cross-entropy",
    optimizer="AdamW",
    lrs=(1e-3,),
    batch_sizes=(16,),
    weight_decay=1e-4,
    iterations=40_000,
    warmup=1_500,
    schedule="linear to 0, after linear warm-up",
    averaging="IoU of each class over all pixels of the set, mean over classes",
)
SEGMENTATION_ADE20K = SEGMENTATION.replace(
    data="ADE20K",
    split="training / validation",
    classes="150, label 0 is ignored",
    num_classes=150,
)
SEGMENTATION_CITYSCAPES = SEGMENTATION.replace(
    data="Cityscapes",
    split="train / val, fine annotations",
    resize=1024,
    classes="19 train ids, all other labels are ignored",
    num_classes=19,
)
SEGMENTATION_VOC = SEGMENTATION.replace(
    data="Pascal VOC 2012",
    split="train (1464 images) / val",
    classes="20 and background",
    num_classes=21,
)
SEGMENTATION_PAPER = Protocol(
    name="segmentation-paper",
    source="STELLAR appendix A.2 and its public recipe; not exactly reproducible: the "
    "score depends on the evaluation batch and the order of images; weight decay, "
    "training batch and training on the whole training set are our choice",
    features="dense",
    resize=256,
    crop=224,
    train_views="random resized crop, flip",
    train_scale=(0.5, 1.0),
    inference="centre crop",
    label_resolution="patch grid, nearest",
    classes="label 0 is ignored, the others are shifted down by one",
    head="BatchNorm, 1 x 1 convolution",
    backbone="frozen",
    loss="cross-entropy + Dice, weights 1 and 1",
    optimizer="AdamW",
    lrs=(1e-4,),
    batch_sizes=(2048,),
    weight_decay=1e-4,
    epochs=80,
    schedule="constant",
    averaging="Jaccard of each batch, mean over the classes in its labels or "
    "predictions; mean over images",
    evaluation_batch=2048,
)
SEGMENTATION_PAPER_ADE20K = SEGMENTATION_PAPER.replace(
    data="ADE20K",
    split=SEGMENTATION_ADE20K.split,
    train_scale=(0.25, 1.0),
    num_classes=150,
)
SEGMENTATION_PAPER_CITYSCAPES = SEGMENTATION_PAPER.replace(
    data="Cityscapes",
    split=SEGMENTATION_CITYSCAPES.split,
    classes="raw label ids, 0 is ignored, 1 to 33 are shifted down by one",
    num_classes=33,
)
SEGMENTATION_PAPER_VOC = SEGMENTATION_PAPER.replace(
    data="Pascal VOC 2012",
    split=SEGMENTATION_VOC.split,
    classes="20; background and void are ignored, the others shifted down by one",
    num_classes=20,
)
_TRAINED = {"name": "segmentation-finetune", "backbone": "trained", "epochs": 75}
SEGMENTATION_FINETUNE_ADE20K = SEGMENTATION_PAPER_ADE20K.replace(**_TRAINED)
SEGMENTATION_FINETUNE_CITYSCAPES = SEGMENTATION_PAPER_CITYSCAPES.replace(**_TRAINED)
SEGMENTATION_FINETUNE_VOC = SEGMENTATION_PAPER_VOC.replace(**_TRAINED)
VISUALIZE = Protocol(
    name="visualize",
    source="STELLAR figure 1; sizes and scaling are our choice",
    split="images spread evenly over the sorted names",
    resize=256,
    crop=224,
    rule="PCA over the patches of all shown images, 1st to 99th percentile",
)
CONCEPTS = Protocol(
    name="concepts",
    source="STELLAR figure 3; threshold and choice of tokens are our choice",
    features="sparse",
    resize=256,
    crop=224,
)

# An image in 8 bits is itself off by this much: the error of rounding, 1/12 grey level
# squared. Without the bound one perfect image makes the mean infinite.
MOST_PSNR_DB = 10 * math.log10(12 * 255**2)
# Below, the covariance of the 2048 features of FID is singular.
FID_IMAGES = 2048
RECONSTRUCTION = Protocol(
    name="reconstruction-pretrained",
    source="STELLAR tables 3 and 4; crops, metrics and rounding are our choice: the "
    "public code scores random crops and flips, so its numbers are no match",
    split="all images are scored",
    resize=256,
    crop=224,
    head="decoder as pretrained",
    inference="bicubic resize and centre crop in, decoded image of another size "
    "resized to the crop (bicubic, antialias), clamped to [0, 1], rounded to 8 bits",
    rule="FID: 2048 features of torch-fidelity's InceptionV3, resized as in TensorFlow "
    "1, float64; LPIPS 0.1: AlexNet; PSNR: RGB, at most 58.9 dB; SSIM: RGB, Gaussian "
    "windows of 11 px inside the image, sigma 1.5",
    averaging="LPIPS, PSNR in dB and SSIM of each image, mean over images",
)
RECONSTRUCTION_SCRATCH = RECONSTRUCTION.replace(
    name="reconstruction-scratch",
    source="STELLAR table 1 and its public recipe; crops, training views, weight "
    "decay, metrics and rounding are our choice: the public code scores random crops "
    "and flips, so its numbers are no match",
    head="decoder from scratch (6 blocks, 512 wide) on the frozen latent",
    train_views="random resized crop, flip, anew in every epoch",
    train_scale=(0.36, 1.0),  # of the view that pretraining reconstructs
    optimizer="AdamW",
    lrs=(1e-4,),
    batch_sizes=(128,),
    weight_decay=1e-4,
    clip=5.0,
    epochs=20,
    schedule="constant",
)
RECONSTRUCTION_FINETUNED = RECONSTRUCTION_SCRATCH.replace(
    name="reconstruction-finetuned",
    head="decoder as pretrained, fine-tuned on the frozen latent",
)
EQUIVARIANCE_SHIFTS = (5, 10, 15, 20, 25, 30)  # px
EQUIVARIANCE = Protocol(
    name="equivariance",
    source="STELLAR section 5.1, experiment 1; the place of the crops, the references "
    "and the relative change are our choice",
    resize=256,
    crop=224,
    inference="window of crop + 30 px in the centre of the resized image; reference: "
    "its upper left corner; shifted crop: 0, 5, ..., 30 px further right or down",
    rule="tokens matched by optimal transport (eq. 8); ||S'[match] - S||_F / ||S||_F, "
    "||L'[:, match] - L||_F / ||L||_F; other image: half the list away; moved back: "
    "shift by one patch, the patches that both crops have",
    averaging="over images, and over both directions",
)
STABILITY_SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STABILITY = Protocol(
    name="stability",
    source="STELLAR section 5.1, experiment 2; scales and aspect ratios are our choice",
    features="auto",
    pooling="mean over tokens",
    resize=256,
    crop=224,
    inference="untransformed image: its centre square, crop / resize of the shorter "
    "side, resized to crop; transformed: one random crop of that square per scale, "
    "aspect ratio 3/4 to 4/3 as far as it fits, resized to crop",
    rule="cosine distance of the features; scale: area of the random crop, 1 is the "
    "whole square; crops drawn by seed and file name; other image: half the list away; "
    "auto, and every model compared against: sparse where a model has latent queries, "
    "else dense",
    averaging="over images",
)
WHERE = Protocol(
    name="where",
    source="our choice",
    split="roles of tokens: decided on every other image, scored on the others, and "
    "the reverse",
    resize=256,
    crop=224,
    label_resolution="px of the crop; labels and the strongest token of each patch "
    "resized nearest",
    rule="foreground_iou: a token is foreground if most of the px it wins in the other "
    "half of the images are; foreground_iou_oracle: the best set of tokens of each "
    "image, an upper bound; token_overlap: IoU of each label that is no background "
    "with its best token, one_to_one: with the tokens assigned at most once, best sum; "
    "grid: as many equal rectangles as tokens; ignored px count nowhere",
    averaging="over the labels of an image, then over images",
)
# Share of the steps in which the learning rate of the probe rises.
ALIGN_TEXT_WARMUP = 0.05
# Largest inverse temperature, as in CLIP.
ALIGN_TEXT_MOST_SCALE = 100.0
ALIGN_TEXT = Protocol(
    name="align-text",
    source="STELLAR appendix B.3; training data, text tower, tokens, optimiser and "
    "schedule are our choice",
    split="90 % train the probe, 10 % (5000 at most) are watched",
    features="auto",
    resize=256,
    crop=224,
    train_views="the same crops as at test time; one caption of an image per epoch",
    head="LayerNorm, attention pooling (1 learned query, MLP), linear to the texts",
    backbone="frozen",
    temperature=0.07,
    loss="symmetric InfoNCE over the batch; temperature is learned from this start, "
    "1 / temperature at most 100",
    optimizer="AdamW, decay on matrices only",
    lrs=(1e-3,),
    batch_sizes=(1024,),
    weight_decay=0.1,
    clip=1.0,
    epochs=10,
    schedule="linear warm-up in the first 5 % of the steps, cosine to 0",
    averaging="over images, texts, examples or visual patterns",
)
