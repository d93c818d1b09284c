"""How STELLAR is learned, in lightly's style: losses, transforms, pretraining.

With lightly installed, importing this package also makes the method's classes
importable from lightly's own namespaces, for example `lightly.loss.STELLARLoss`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

ALIASES = {
    "lightly.loss": ("lightly_ext.loss", ("STELLARLoss", "SetKoLeoLoss")),
    "lightly.transforms": (
        "lightly_ext.transforms",
        ("STELLARColorAugment", "STELLARTransform"),
    ),
    "lightly.models.modules": ("lightly_ext.modules", ("STELLARProjectionHead",)),
}


def _extend_lightly() -> None:
    for host_name, (source, names) in ALIASES.items():
        host = import_module(host_name)
        for name in names:
            # What lightly has under that name stays.
            if not hasattr(host, name):
                setattr(host, name, getattr(import_module(source), name))


if find_spec("lightly") is not None:
    _extend_lightly()
