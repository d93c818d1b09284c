"""Protocols of classification: kNN, linear probes and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import (
    CropProtocol,
    RandomCropProtocol,
    TrainedProtocol,
)

# 10 % of the training set, drawn once by this seed, whatever the seed of the run.
HELD_OUT = 0.1
HELD_OUT_SEED = 0


@dataclass(frozen=True, kw_only=True)
class KNNProtocol(CropProtocol):
    """Training images vote."""

    split: str
    features: str
    pooling: str
    neighbours: int
    temperature: float
    averaging: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class ClassifierProtocol(TrainedProtocol):
    """A classifier is trained on pooled features."""

    features: str
    pooling: str
    loss: str


@dataclass(frozen=True, kw_only=True)
class AugmentedClassifierProtocol(ClassifierProtocol, RandomCropProtocol):
    """It is trained on augmented views."""


KNN = KNNProtocol(
    name="knn",
    source="STELLAR table 1; k, temperature and similarity are our choice",
    split="bank: training set; queries: test set",
    features="auto",
    pooling="mean over tokens",
    neighbours=20,
    temperature=0.07,
    rule="cosine similarity, neighbours vote with exp(similarity / temperature)",
    averaging="over test images",
)
LINEAR = ClassifierProtocol(
    name="linear",
    source="STELLAR appendix A.2, on cached features of centre crops",
    split="90 % of the training set trains, 10 % chooses lr and batch size, test set",
    features="auto",
    pooling="mean over tokens",
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
LINEAR_PAPER = AugmentedClassifierProtocol(
    **vars(LINEAR),
    train_scale=(0.5, 1.0),  # ImageNet: IMAGENET_TRAIN_SCALE
).replace(
    name="linear-paper",
    source="STELLAR appendix A.2",
    train_views="random resized crop to the same size, flip, anew in every epoch",
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
