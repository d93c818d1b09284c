"""What is computed must be finite; if not, the error names a way out."""

from __future__ import annotations

import torch

FULL = "32-true"
_OF_DTYPE = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}


def not_finite(what: str, precision: str) -> RuntimeError:
    """The error about values that are not finite.

    Args:
        what:
            The values, in the plural.
        precision:
            The precision that they were computed in, as `Devices` has it.
    """
    way_out = "the weights are broken or too large, name others."
    if precision != FULL:
        way_out = f"use --precision {FULL}, or other weights."
    return RuntimeError(f"{what} are not finite at precision {precision}: {way_out}")


def running_precision(device: torch.device) -> str:
    """The precision that a device computes in now, as `Devices` has it."""
    if not torch.is_autocast_enabled(device.type):
        return FULL
    return _OF_DTYPE[torch.get_autocast_dtype(device.type)]
