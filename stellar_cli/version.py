"""`stellar --version`: what to say first in a report of a mistake."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

# What decides on what happens; of mmsegmentation the fork or the stock package.
DISTRIBUTIONS = (
    *("torch", "torchvision", "timm", "lightly", "pytorch-lightning"),
    *("onedl-mmsegmentation", "mmsegmentation"),
)


def version_text() -> str:
    """The version of this package and, as installed, of what it stands on.

    Read from metadata, so that nothing is imported.
    """
    lines = [f"stellar-plugin {version('stellar-plugin')}"]
    lines.append(f"python {platform.python_version()} on {platform.platform()}")
    for name in DISTRIBUTIONS:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join(lines)
