from __future__ import annotations

import pytest
import torch

import tests.model_zoo  # noqa: F401


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
