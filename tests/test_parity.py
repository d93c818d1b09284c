"""Number by number against the published implementation; see docs/parity.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests import parity

DOCS = Path(__file__).parents[1] / "docs" / "parity.md"


@pytest.fixture(scope="module")
def report() -> list[parity.Row]:
    return parity.rows()


class TestParity:
    def test_rows__within_tolerance(self, report: list[parity.Row]) -> None:
        beyond = [row for row in report if not row.is_within]
        assert beyond == []

    def test_rows__every_quantity_is_in_the_docs(
        self, report: list[parity.Row]
    ) -> None:
        start = DOCS.read_text().index("| quantity")
        lines = DOCS.read_text()[start:].split("\n\n")[0].splitlines()[2:]
        documented = [line.split(" | ")[0].removeprefix("| ") for line in lines]
        assert documented == [row.quantity for row in report]

    def test_rows__see_a_small_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = parity.reference.weights()
        weights["encoder.layernorm.weight"] *= 1 + 1e-4
        monkeypatch.setattr(parity.reference, "weights", lambda: weights)
        beyond = {row.quantity for row in parity.rows() if not row.is_within}
        expected = {"sparse, 64 x 64 px", "pixels", "step, tokens of masked views"}
        assert expected <= beyond

    def test_table__numbers_and_counts(self) -> None:
        rows = [
            parity.Row("a", 1.23e-6, 2e-5),
            parity.Row("b", 0.0, 0, parity.COUNT),
            parity.Row("c", math.nan, 1e-5, parity.RELATIVE),
        ]
        lines = parity.table(rows).splitlines()
        assert lines[2] == "| a | 1.2e-06 | 2e-05 | absolute |"
        assert lines[3] == "| b | 0 | 0 | number that differ |"
        assert "nan" in lines[4] and not rows[2].is_within
        assert math.isnan(parity._worst([0.0, math.nan, 1.0]))

    def test_plain_fourier_code__centre_patch(self) -> None:
        # The middle of an odd grid has phase zero.
        position = parity.FourierPositionEncoding(6)
        code = parity.plain_fourier_code(position, 3, 5)
        expected = torch.tensor([0.0, 1.0] * 3, dtype=torch.float64)
        torch.testing.assert_close(code[7], expected)
