"""Protocols of pictures."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import CropProtocol


@dataclass(frozen=True, kw_only=True)
class VisualizeProtocol(CropProtocol):
    """Features are shown in colour."""

    split: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class AtlasProtocol(CropProtocol):
    """Parts of images that go together are shown; how many is the user's choice."""

    split: str
    parts: str = ""
    rule: str


VISUALIZE = VisualizeProtocol(
    name="visualize",
    source="STELLAR figure 1; sizes and scaling are our choice",
    split="images spread evenly over the sorted names",
    rule="PCA over the patches of all shown images, 1st to 99th percentile",
)
ATLAS = AtlasProtocol(
    name="atlas",
    source="STELLAR figure 3 for a whole folder; numbers and clusters are our choice",
    split="all images",
    rule="those that cover most first; a part with less than half a patch in all is "
    "absent",
)
