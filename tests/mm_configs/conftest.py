# Before any test imports mmseg, which the stock packages need.
import stellar_plugin.mmseg  # noqa: F401
