"""Protocols that ask what tokens are: equivariance, stability, place and number."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import CropProtocol, Protocol


@dataclass(frozen=True, kw_only=True)
class EquivarianceProtocol(CropProtocol):
    """Tokens of shifted crops are compared."""

    inference: str
    averaging: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class StabilityProtocol(CropProtocol):
    """Features of parts of an image are compared with those of the whole."""

    features: str
    pooling: str
    inference: str
    averaging: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class WhereProtocol(CropProtocol):
    """The px of each part are compared with labels; classes are of the run."""

    split: str
    parts: str = ""
    label_resolution: str
    classes: str = ""
    averaging: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class DiscoverProtocol(CropProtocol):
    """Parts of images are compared with objects; parts and labels are of the run."""

    parts: str = ""
    label_resolution: str
    classes: str = ""
    averaging: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class RankProtocol(Protocol):
    """Models with different numbers of tokens are compared."""

    features: str
    rule: str


EQUIVARIANCE_SHIFTS = (5, 10, 15, 20, 25, 30)  # px
EQUIVARIANCE = EquivarianceProtocol(
    name="equivariance",
    source="STELLAR section 5.1, experiment 1; the place of the crops, the references "
    "and the relative change are our choice",
    inference="window of crop + 30 px in the centre of the resized image; reference: "
    "its upper left corner; shifted crop: 0, 5, ..., 30 px further right or down",
    rule="tokens matched by optimal transport (eq. 8); ||S'[match] - S||_F / ||S||_F, "
    "||L'[:, match] - L||_F / ||L||_F; other image: half the list away; moved back: "
    "shift by one patch, the patches that both crops have",
    averaging="over images, and over both directions",
)
STABILITY_SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STABILITY = StabilityProtocol(
    name="stability",
    source="STELLAR section 5.1, experiment 2; scales and aspect ratios are our choice",
    features="auto",
    pooling="mean over tokens",
    inference="untransformed image: its centre square, crop / resize of the shorter "
    "side, resized to crop; transformed: one random crop of that square per scale, "
    "aspect ratio 3/4 to 4/3 as far as it fits, resized to crop",
    rule="cosine distance of the features; scale: area of the random crop, 1 is the "
    "whole square; crops drawn by seed and file name; other image: half the list away; "
    "auto, and every model compared against: sparse where a model has latent queries, "
    "else dense",
    averaging="over images",
)
WHERE = WhereProtocol(
    name="where",
    source="our choice",
    split="roles of tokens: decided on every other image, scored on the others, and "
    "the reverse",
    label_resolution="px of the crop; labels and the strongest token of each patch "
    "resized nearest",
    rule="foreground_iou: a token is foreground if most of the px it wins in the other "
    "half of the images are; foreground_iou_oracle: the best set of tokens of each "
    "image, an upper bound; token_overlap: IoU of each label that is no background "
    "with its best token, one_to_one: with the tokens assigned at most once, best sum; "
    "grid: as many equal rectangles as tokens; ignored px count nowhere",
    averaging="over the labels of an image, then over images",
)
# As many as STELLAR has tokens in the paper.
CLUSTERS = 16
CLUSTER_ITERATIONS = 25
WHERE_CLUSTERS = WHERE.replace(
    split="",
    parts=f"{CLUSTERS} k-means clusters of patches",
    label_resolution="px of the crop; labels and the cluster of each patch resized "
    "nearest",
    rule="k-means of the patches of each image alone, features of unit length, "
    f"k-means++ start by the seed, {CLUSTER_ITERATIONS} iterations; "
    "foreground_iou_oracle: the best set of clusters of each image, an upper bound; "
    "cluster_overlap: IoU of each label that is no background with its best cluster, "
    "one_to_one: with the clusters assigned at most once, best sum; grid: as many "
    "equal rectangles as clusters; ignored px count nowhere",
)
# Of TokenCut: cosine similarity of an edge of weight 1, and the weight of all others.
NCUT_SIMILARITY = 0.2
NCUT_WEAK_EDGE = 1e-5
DISCOVER = DiscoverProtocol(
    name="discover",
    source="mBO, FG-ARI: DINOSAUR (arXiv 2209.14860), public code of SPOT (arXiv "
    "2312.00648); CorLoc: LOST (arXiv 2109.14279), TokenCut (arXiv 2202.11539); the "
    "object without labels, the crop, crowds and images without objects are our choice",
    label_resolution="px of the crop; labels and the part of each patch resized "
    "nearest",
    rule="mbo_i, mbo_c: best IoU of each instance, of all px of each class, with a "
    "part; fg_ari: adjusted Rand index of the px of instances, 1 where one instance "
    "lies in one part; ignored px, those of crowds and those of two instances count "
    "nowhere; images without an instance in the crop are left out; corloc: box of the "
    "object overlaps one box of the image, as far as the crop shows it, with IoU 0.5 "
    "or more; corloc_oracle: the box of any part does, an upper bound; object of "
    "tokens, clusters and grid: of all parts with less than their share of the px at "
    "the border, the largest connected area; ncut: binary graph of the final features "
    f"of patches (TokenCut: keys), cosine similarity above {NCUT_SIMILARITY}, other "
    f"edges {NCUT_WEAK_EDGE}, second eigenvector cut at its mean, the object is what "
    "hangs together with its largest absolute value, the whole image where all edges "
    "are equal, and the rest; grid: as many equal rectangles as parts; centre: box of "
    "half the area, and the rest",
    averaging="over the instances or classes of an image, then over images",
)
RANK = RankProtocol(
    name="rank",
    source="STELLAR figure 2 (c)",
    features="sparse",
    rule="one model per number of tokens; accuracy of the linear probe, FID of the "
    "pretrained decoder",
)
