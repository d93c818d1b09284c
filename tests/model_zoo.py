"""Makes mmengine read mmseg's model zoo once, not for each `mmseg::` of a config."""

from __future__ import annotations

from functools import lru_cache

from mmengine.config import utils

# Before any test imports mmseg, which the stock packages need.
import stellar_plugin.mmseg  # noqa: F401

utils.load = lru_cache(utils.load)
