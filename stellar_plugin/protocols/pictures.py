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
class ConceptsProtocol(CropProtocol):
    """Nearest tokens are shown; which, how many and how is the user's choice."""

    split: str = ""
    features: str
    neighbours: int | None = None
    rule: str = ""


VISUALIZE = VisualizeProtocol(
    name="visualize",
    source="STELLAR figure 1; sizes and scaling are our choice",
    split="images spread evenly over the sorted names",
    rule="PCA over the patches of all shown images, 1st to 99th percentile",
)
CONCEPTS = ConceptsProtocol(
    name="concepts",
    source="STELLAR figure 3; threshold and choice of tokens are our choice",
    features="sparse",
)
