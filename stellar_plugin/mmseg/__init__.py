"""STELLAR in mmsegmentation: importing this package registers everything.

In a config: `custom_imports = dict(imports=["stellar_plugin.mmseg"])`.
"""

from __future__ import annotations

from importlib.util import find_spec

for _name in ("mmengine", "mmcv", "mmseg"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"stellar_plugin.mmseg needs mmsegmentation, and {_name} is missing: "
            "pip install 'stellar-plugin[mmseg]'.",
            name=_name,
        )

from stellar_plugin.mmseg import compat  # noqa: E402

# mmseg.models cannot be imported before this where mmcv has no ops.
compat.apply()

from stellar_plugin.mmseg.annotations import LoadConvertedAnnotations  # noqa: E402
from stellar_plugin.mmseg.backbone import StellarViT  # noqa: E402
from stellar_plugin.mmseg.head import LinearProbeHead  # noqa: E402
from stellar_plugin.mmseg.loss import LabelledDiceLoss  # noqa: E402
from stellar_plugin.mmseg.metric import BatchJaccard, CountedIoUMetric  # noqa: E402
from stellar_plugin.mmseg.network import PretrainedNetwork  # noqa: E402
from stellar_plugin.mmseg.result import SegmentationResultHook  # noqa: E402
from stellar_plugin.mmseg.resume import ResumeByConfigHook  # noqa: E402
from stellar_plugin.mmseg.schedule import WarmUpLR  # noqa: E402
from stellar_plugin.mmseg.segmentor import PatchGridSegmentor  # noqa: E402
from stellar_plugin.mmseg.views import TorchvisionTransform  # noqa: E402

__all__ = [
    "BatchJaccard",
    "CountedIoUMetric",
    "LabelledDiceLoss",
    "LinearProbeHead",
    "LoadConvertedAnnotations",
    "PatchGridSegmentor",
    "PretrainedNetwork",
    "ResumeByConfigHook",
    "SegmentationResultHook",
    "StellarViT",
    "TorchvisionTransform",
    "WarmUpLR",
]
