from __future__ import annotations

import pytest

from stellar_plugin.mmseg.train import find_tool


class TestFindTool:
    def test_train__is_mmsegs_own(self) -> None:
        text = find_tool("train.py").read_text()
        assert all(f"--{name}" in text for name in ("work-dir", "resume", "amp"))

    def test_unknown(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"has no tools/nothing\.py"):
            find_tool("nothing.py")
