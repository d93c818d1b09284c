"""Protocol of efficiency."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import Protocol


@dataclass(frozen=True, kw_only=True)
class EfficiencyProtocol(Protocol):
    """Parts of the model are timed."""

    crop: int
    inference: str
    batch_sizes: tuple[int, ...]
    averaging: str
    rule: str


EFFICIENCY = EfficiencyProtocol(
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
EFFICIENCY_ENCODER = EFFICIENCY.replace(
    source="our choice: what STELLAR table 10 is to STELLAR",
    rule="random images; encoder: image to its features",
)
