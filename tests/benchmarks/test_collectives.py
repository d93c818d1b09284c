from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.collectives import Row, measure, sources

SIZES = {"gradients": 100, "buffers": 5, "prototypes": 48}


def test_sources() -> None:
    found = [("all_reduce", (60,)), ("all_reduce", (48,)), ("all_reduce", (40,))]
    told = [
        ("DDP: gradients", 240),
        ("Sinkhorn: columns", 192),
        ("DDP: gradients", 160),
    ]
    assert sources(found, SIZES) == told
    assert sources([("all_reduce", (60,))], SIZES) == [("not known", 240)]


@pytest.mark.slow
def test_measure__all_that_a_step_exchanges(tmp_path: Path) -> None:
    rows = measure(tmp_path)
    gradients = next(row for row in rows if row.source == "DDP: gradients")
    # Maximum and three sums of 48 prototypes, of two heads: 2 x (1 + 3) x 48 x 4 bytes.
    every = [
        ("broadcast", "DDP: buffers", 1, 88),
        ("all_reduce", "Sinkhorn: columns", 8, 1536),
        ("all_reduce", "DDP: gradients", gradients.number, 4 * 1_219_499),
        ("all_reduce", "is all finite", 1, 4),
        ("all_reduce", "signals and saves", 1, 8),
    ]
    logged = [("all_reduce", "logged terms of the loss", 1, 36)]
    expected = [Row("not logged", *row) for row in every]
    expected += [Row("logged", *row) for row in [*every, *logged]]
    assert sorted(rows) == sorted(expected)
