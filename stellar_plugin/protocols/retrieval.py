"""Protocol of retrieval: images that find images, and where in them."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import CropProtocol
from stellar_plugin.protocols.probing import CLUSTERS


@dataclass(frozen=True, kw_only=True)
class RetrievalProtocol(CropProtocol):
    """Every image finds the others; parts and number of answers are of the run."""

    split: str
    features: str
    pooling: str
    parts: str
    inference: str
    neighbours: int
    averaging: str
    rule: str


THUMBNAIL = 16  # side in px
COLOURS = 8  # levels of each of red, green and blue
# What may stand for an image.
RETRIEVAL_FORMS = (
    *("tokens", "cls", "mean_token", "mean_patch", "patches", "clusters", "pixels"),
    "colours",
)
RETRIEVAL = RetrievalProtocol(
    name="retrieval",
    source="our choice; late interaction: ColBERT, weighted as in stellar search",
    split="every image is a query once, and ranks all other images",
    features=", ".join(RETRIEVAL_FORMS),
    pooling="mean_token, mean_patch: mean over tokens, over patches; pixels: crop "
    f"averaged to {THUMBNAIL} x {THUMBNAIL} px, less its mean; colours: root of the "
    f"histogram of {COLOURS} x {COLOURS} x {COLOURS} colours of the crop",
    parts=f"{CLUSTERS} k-means clusters of patches",
    resize=224,
    crop=224,
    inference="query of a location: what lies in the largest box of the image, m_i of "
    "the patches of that box; cls, mean_token, mean_patch, pixels and colours cannot "
    "be asked so: the whole image is the query, the whole crop the region. Region of "
    "an answer: box around all patches with at least half the maximum of the map of "
    "the part that is most like the query's heaviest; patches: of their cosines, above "
    "0, with the mean of the patches in the query's box",
    neighbours=10,
    rule="score: sum over parts i of the query of m_i max_j cos(s_i, t_j), m_i its "
    "share of the patches; vectors of unit length, patches in half precision; of equal "
    "scores the order is drawn by the seed; relevant: same class; map: mean precision "
    "at the ranks of the relevant ones; location: of the first answers with a box, "
    "share whose region has an IoU of 0.5 or more with one of their boxes, px of the "
    "file; location_of_class: the same of answers of the query's class; "
    "location_oracle: any part of the answer counts",
    averaging="map: over the queries of a class, then over classes; query_map and "
    "location: over queries; location_of_class: over answers",
)
