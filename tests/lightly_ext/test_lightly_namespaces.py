from __future__ import annotations

from importlib import import_module

import lightly.loss
import pytest

import lightly_ext
from lightly_ext.loss import STELLARLoss


@pytest.mark.parametrize("host", lightly_ext.ALIASES)
def test_alias__is_the_class_itself(host: str) -> None:
    source, names = lightly_ext.ALIASES[host]
    for name in names:
        ours = getattr(import_module(source), name)
        assert getattr(import_module(host), name) is ours


def test_alias__from_import() -> None:
    from lightly.loss import STELLARLoss as Alias

    assert Alias is STELLARLoss


def test_alias__never_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = object()
    monkeypatch.setattr(lightly.loss, "STELLARLoss", upstream)
    lightly_ext._extend_lightly()
    assert lightly.loss.STELLARLoss is upstream
