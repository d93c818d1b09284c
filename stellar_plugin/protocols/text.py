"""Protocol of alignment with text."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import TrainedProtocol


@dataclass(frozen=True, kw_only=True)
class AlignTextProtocol(TrainedProtocol):
    """A probe learns to find texts; each set that it is scored on has its own rule."""

    features: str
    temperature: float
    backbone: str
    loss: str
    rule: str = ""
    networks: tuple[str, ...] = ()


# Share of the steps in which the learning rate of the probe rises.
ALIGN_TEXT_WARMUP = 0.05
# Largest inverse temperature, as in CLIP.
ALIGN_TEXT_MOST_SCALE = 100.0
ALIGN_TEXT = AlignTextProtocol(
    name="align-text",
    source="STELLAR appendix B.3; training data, text tower, tokens, optimiser and "
    "schedule are our choice",
    split="90 % train the probe, 10 % (5000 at most) are watched",
    features="auto",
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
