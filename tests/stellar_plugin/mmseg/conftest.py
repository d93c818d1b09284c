from __future__ import annotations

import pytest
import torch

# Before any test imports mmseg, which the stock packages need.
import stellar_plugin.mmseg  # noqa: F401


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
