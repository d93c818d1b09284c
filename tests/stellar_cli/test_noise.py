from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities._pytree import _tree_flatten

from stellar_cli import noise


@pytest.fixture(autouse=True)
def filters() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in noise.ADVERTISEMENTS]
    before = [list(logger.filters) for logger in loggers]
    for logger in loggers:
        logger.filters.clear()
    with warnings.catch_warnings():
        yield
    for logger, its in zip(loggers, before, strict=True):
        logger.filters[:] = its


def said_by_a_trainer(caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return caplog.messages


def test_leave_out__an_advertisement_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = said_by_a_trainer(caplog)
    noise.leave_out()
    after = said_by_a_trainer(caplog)
    # Else this version of Lightning says something else.
    assert [line for line in before if line not in after] == [
        line for line in before if "litlogger" in line
    ]
    assert len(before) == len(after) + 1
    assert any("GPU available" in line for line in after)


def test_leave_out__a_deprecation_alone() -> None:
    def said() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            noise.leave_out()
            _tree_flatten([torch.zeros(1)])
            warnings.warn("`isinstance(treespec, Spec)` is deprecated", stacklevel=1)
        return [str(warning.message) for warning in caught]

    assert said() == ["`isinstance(treespec, Spec)` is deprecated"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "DEPRECATIONS", ())
        assert len(said()) == 2  # else there is nothing to leave out


def test_leave_out__lines_of_code_of_our_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    theirs = warnings.formatwarning(UserWarning("a"), UserWarning, "/x/lib.py", 7)
    noise.leave_out()
    ours = Path(noise.__file__).parents[1] / "lightly_ext" / "data" / "listing.py"
    said = warnings.formatwarning(UserWarning("2 files"), UserWarning, str(ours), 52)
    assert said == "Warning: 2 files\n"
    again = warnings.formatwarning(UserWarning("a"), UserWarning, "/x/lib.py", 7)
    assert again == theirs and "/x/lib.py:7" in again
