from lightly_ext.modules.heads import STELLARProjectionHead
from lightly_ext.modules.masking import focal_bump, random_focal_mask

__all__ = ["STELLARProjectionHead", "focal_bump", "random_focal_mask"]
