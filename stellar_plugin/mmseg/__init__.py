"""STELLAR in mmsegmentation: importing this package registers everything.

In a config: `custom_imports = dict(imports=["stellar_plugin.mmseg"])`.
"""

from __future__ import annotations

try:
    from stellar_plugin.mmseg import compat
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("mmcv", "mmengine"):
        raise
    raise ModuleNotFoundError(
        f"stellar_plugin.mmseg needs mmsegmentation ({error.name} is missing): "
        "pip install 'stellar-plugin[mmseg]'.",
        name=error.name,
    ) from error

# mmseg.models cannot be imported before this where mmcv has no ops.
compat.apply()

from stellar_plugin.mmseg.backbone import StellarViT  # noqa: E402
from stellar_plugin.mmseg.head import LinearProbeHead  # noqa: E402

__all__ = ["LinearProbeHead", "StellarViT"]
