from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lightly_ext.evaluate.report.protocol_cards import (
    card_table,
    fill_cards,
    known_protocols,
    main,
)
from stellar_plugin.protocols import KNN, Protocol


@dataclass(frozen=True, kw_only=True)
class SmallProtocol(Protocol):
    crop: int
    lrs: tuple[float, ...] = ()
    rule: str = ""


FIRST = SmallProtocol(name="first", source="us", crop=224, lrs=(0.1, 0.2))
SECOND = SmallProtocol(name="second", source="us", crop=224, rule="a|b")
KNOWN = {"FIRST": FIRST, "SECOND": SECOND}
DOCS = Path(__file__).parents[4] / "docs"


class TestCardTable:
    def test_card_table__all_fields(self) -> None:
        assert card_table(FIRST).splitlines() == [
            "| field | value |",
            "| --- | --- |",
            "| name | first |",
            "| source | us |",
            "| crop | 224 |",
            "| lrs | 0.1, 0.2 |",
        ]

    def test_card_table__only_differences(self) -> None:
        assert card_table(SECOND, FIRST).splitlines()[2:] == [
            "| name | second |",
            "| rule | a\\|b |",
            "| lrs | not used |",
        ]


class TestFillCards:
    def test_fill_cards__between_markers_alone(self) -> None:
        text = "a\n<!-- card FIRST -->\nold\n<!-- end -->\nb\n"
        filled = fill_cards(text, KNOWN)
        assert filled == (
            f"a\n<!-- card FIRST -->\n\n{card_table(FIRST)}\n<!-- end -->\nb\n"
        )
        assert fill_cards(filled, KNOWN) == filled

    def test_fill_cards__others_are_what_no_marker_names(self) -> None:
        text = (
            "<!-- card SECOND over FIRST -->\n<!-- end -->\n"
            "<!-- other cards -->\n<!-- end -->\n"
        )
        filled = fill_cards(text, KNOWN)
        assert card_table(SECOND, FIRST) in filled
        assert f"`FIRST`\n\n{card_table(FIRST)}" in filled
        assert "`SECOND`" not in filled

    def test_fill_cards__unknown_name(self) -> None:
        with pytest.raises(ValueError, match="no protocol THIRD"):
            fill_cards("<!-- card THIRD -->\n<!-- end -->", KNOWN)


def test_main__fills_a_file(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- card KNN -->\n<!-- end -->\n")
    main([str(page)])
    assert card_table(KNN) in page.read_text()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_docs__cards_are_those_of_the_module(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill_cards(text, known_protocols()) == text, (
        f"run `python -m lightly_ext.evaluate.report.protocol_cards docs/{page.name}`"
    )


def test_docs__evaluation_has_every_card() -> None:
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert "<!-- other cards -->" in text
