"""Protocol of segmentation without labels: clusters that are matched to classes."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import CropProtocol


@dataclass(frozen=True, kw_only=True)
class UnsupervisedSegmentationProtocol(CropProtocol):
    """Clusters of patches are matched to classes; data and classes are of the run."""

    split: str
    features: str
    parts: str = ""
    label_resolution: str
    classes: str = ""
    num_classes: int | None = None
    averaging: str
    rule: str


# Images of a training part, and patches of all of them, that clusters are made of.
CLUSTERED_IMAGES = 4096
CLUSTERED_PATCHES = 2**18
CLUSTER_RESTARTS = 3
CLUSTER_ROUNDS = 100
_SCORES = (
    "mIoU and accuracy: clusters matched to classes one to one so that most px have "
    "their class (Hungarian, over all px scored); px of a cluster without a class are "
    "misses; many_to_one: each cluster is the class that most of its px have; px "
    "without a class count nowhere; no CRF"
)
UNSUPERVISED_SEGMENTATION = UnsupervisedSegmentationProtocol(
    name="unsupervised-segmentation",
    source="PiCIE and STEGO for classes, matching and scores; clusters of frozen "
    "features and the size of images are our choice",
    features="dense",
    split="clusters: images of the training part; match and scores: test part",
    resize=224,
    label_resolution="px of the crop; labels resized nearest, scores of clusters "
    "bilinearly",
    rule=f"k-means of at most {CLUSTERED_PATCHES} patches (half precision, unit "
    f"length) drawn evenly from the images, of a training part from {CLUSTERED_IMAGES} "
    f"at most; k-means++ start by the seed, the best of {CLUSTER_RESTARTS} runs of "
    f"{CLUSTER_ROUNDS} iterations at most; {_SCORES}",
    averaging="IoU of each class over all px of the set, mean over classes; classes "
    "that neither labels nor clusters have are left out",
)
UNSUPERVISED_SEGMENTATION_PROTOTYPES = UNSUPERVISED_SEGMENTATION.replace(
    features="sparse",
    split="match and scores: test part",
    label_resolution="px of the crop; labels resized nearest, the localization of "
    "tokens bilinearly",
    rule=f"a px has the prototype of its strongest token; {_SCORES}",
)
