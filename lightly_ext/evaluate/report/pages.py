"""Tables of results as Markdown, JSON and one HTML page."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from lightly_ext.evaluate.curves import axis_title
from lightly_ext.evaluate.report.exhibits import Exhibit
from lightly_ext.evaluate.report.scores import score_title, shown_score
from lightly_ext.evaluate.report.tables import (
    Column,
    Row,
    Table,
    card_differences,
    learning_gains,
    stored_score,
)
from lightly_ext.evaluate.result import escaped, markdown_table, shown_value
from lightly_ext.pages.page import render_page
from stellar_plugin.protocols import FEATURES

READING = (
    "A column is one data set under one card: only equal cards share it. Published "
    "numbers are other people's measurements, under the card of their source. Several "
    "seeds are shown as mean [min, max] and their number n. Chance is what guessing "
    "gives, untrained the same architecture with random weights."
)


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        tables: The tables.
        notes: What was skipped, and why.
        num_results: Number of results, those that have pictures alone included.
        exhibits: What they have to look at.
    """

    tables: Sequence[Table]
    notes: Sequence[str]
    num_results: int
    exhibits: Sequence[Exhibit] = ()


@dataclass(frozen=True)
class Grid:
    """A table of text with the cards below it.

    Attributes:
        title: What was measured.
        head: Titles of the columns.
        rows: Kind of row and its cells, the name first.
        card_ids: A letter per card.
        shared: Fields of the card that all columns share.
        differences: Fields in which cards differ: name and a value per card.
        gains: Rows of trained against untrained, the head first; empty if there is
            nothing to compare.
    """

    title: str
    head: list[str]
    rows: list[tuple[str, list[str]]]
    card_ids: list[str]
    shared: dict[str, str]
    differences: list[list[str]]
    gains: list[list[str]]


def to_grid(table: Table) -> Grid:
    """A table as text.

    Args:
        table:
            The table.
    """
    letters = _card_letters(table)
    differences = card_differences(table.cards)
    card = next(iter(table.cards.values()))
    return Grid(
        _title(table),
        ["model", *_head(table, letters)],
        [(row.kind, [_row_title(row), *_cells(table, row)]) for row in table.rows],
        list(letters.values()),
        {k: shown_value(v) for k, v in card.items() if k not in differences},
        [
            [name, *("-" if v is None else shown_value(v) for v in values)]
            for name, values in differences.items()
        ],
        _gain_rows(table, letters),
    )


def to_markdown(report: Report) -> str:
    """The report as Markdown.

    Args:
        report:
            The report.
    """
    parts = ["# Evaluation report", READING]
    if report.notes:
        parts.append("\n".join(f"- {escaped(note)}" for note in report.notes))
    for grid in map(to_grid, report.tables):
        parts.append(f"## {escaped(grid.title)}")
        rows = [_named(kind, cells) for kind, cells in grid.rows]
        parts.append(markdown_table([grid.head, *rows]))
        if grid.gains:
            parts.append("Learning, against the best untrained feature:")
            parts.append(markdown_table(grid.gains))
        if grid.differences:
            parts.append("Where the cards differ:")
            head = ["field", *grid.card_ids]
            parts.append(markdown_table([head, *grid.differences]))
        shared = "\n".join(f"- {k}: {escaped(v)}" for k, v in grid.shared.items())
        parts.append(f"{_card_heading(grid)}\n\n{shared}")
    if report.exhibits:
        parts.append("## Pictures and pages")
        parts.append("\n".join(map(_links, report.exhibits)))
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    """The report as a page that needs nothing else; everything in it is escaped.

    Args:
        report:
            The report.
    """
    return render_page(
        "evaluate/report/report.html",
        title="Evaluation report",
        grids=[to_grid(table) for table in report.tables],
        notes=report.notes,
        num_results=report.num_results,
        exhibits=report.exhibits,
        reading=READING,
        date=datetime.date.today().isoformat(),
        card_heading=_card_heading,
    )


def to_json(report: Report) -> dict[str, Any]:
    """The report with unrounded numbers.

    Args:
        report:
            The report.
    """
    return {
        "tables": [_table_json(table) for table in report.tables],
        "notes": list(report.notes),
    }


def _links(exhibit: Exhibit) -> str:
    files = {**exhibit.pages, **{p.name: p.address for p in exhibit.pictures}}
    links = ", ".join(f"[{escaped(name)}]({at})" for name, at in files.items())
    return f"- {escaped(exhibit.title)}: {links}"


def _table_json(table: Table) -> dict[str, Any]:
    return {
        "task": table.task,
        "protocol": table.protocol,
        "cards": {digest: dict(card) for digest, card in table.cards.items()},
        "cells": [
            {
                **_place(row, column),
                "mean": mean(cell.values),
                "min": min(cell.values),
                "max": max(cell.values),
                "n": len(cell.values),
                "seeds": cell.seeds,
                "values": cell.values,
                "chance": cell.chance,
                "untrained": cell.untrained,
            }
            for (row, column), cell in table.cells.items()
        ],
        "gains": [
            {
                **_place(gain.row, gain.column),
                "gain": gain.value,
                "untrained": _place(gain.untrained, gain.untrained_column),
            }
            for gain in learning_gains(table)
        ],
    }


def _place(row: Row, column: Column) -> dict[str, str]:
    return {
        "model": row.model,
        "kind": row.kind,
        "detail": row.detail,
        "data": column.data,
        "card": column.digest,
        "score": stored_score(row, column),
        "at": column.at,
    }


def _title(table: Table) -> str:
    """Task, protocol where it has another name, and data set of curves."""
    title = table.task
    if not table.protocol.startswith(table.task):
        title = f"{title}, {table.protocol}"
    elif table.protocol != table.task:
        title = table.protocol
    first = table.columns[0]
    return f"{title}: {first.data}" if first.at else title


def _card_letters(table: Table) -> dict[str, str]:
    """A letter for each card, then A1, B1, ..."""
    names: dict[str, str] = {}
    for i, digest in enumerate(table.cards):
        letter = chr(ord("A") + i % 26)
        names[digest] = letter if i < 26 else f"{letter}{i // 26}"
    return names


def _column_title(task: str, column: Column, letters: Mapping[str, str]) -> str:
    if column.at:
        return f"{axis_title(task)}: {column.at}"
    letter = f"{letters[column.digest]}. " if len(letters) > 1 else ""
    feature = column.card.get("features")
    # The card of retrieval has all that is compared, which its rows name.
    of_feature = f", {feature}" if feature in FEATURES else ""
    return f"{letter}{column.data}{of_feature}: {score_title(column.score)}"


def _row_title(row: Row) -> str:
    return f"{row.title}: {score_title(row.score)}" if row.score else row.title


def _head(table: Table, letters: Mapping[str, str]) -> list[str]:
    """Titles of the columns; plain scores have chance and untrained beside them."""
    titles = []
    for column in table.columns:
        titles.append(_column_title(table.task, column, letters))
        titles += [] if column.at else ["chance", "untrained"]
    return titles


def _cells(table: Table, row: Row) -> list[str]:
    texts = []
    for column in table.columns:
        cell = table.cells.get((row, column))
        text = "" if cell is None else cell.text(row.score or column.score)
        beside = ["", ""] if cell is None else cell.beside(column.score)
        if row.kind == "published":
            beside = ["", ""]
        elif row.kind == "untrained":
            beside[1] = ""
        texts += [text] if column.at else [text, *beside]
    return texts


def _gain_rows(table: Table, letters: Mapping[str, str]) -> list[list[str]]:
    """Trained, best untrained with its feature, and the difference of the means."""
    rows = []
    for gain in learning_gains(table):
        score = gain.column.score
        untrained = table.cells[gain.untrained, gain.untrained_column]
        feature = gain.untrained_column.card.get("features")
        rows.append(
            [
                gain.row.title,
                _column_title(table.task, gain.column, letters),
                table.cells[gain.row, gain.column].text(score),
                f"{untrained.text(score)} ({gain.untrained.title}"
                + (f", {feature})" if feature else ")"),
                _signed(score, gain.value),
            ]
        )
    head = ["model", "column", "trained", "best untrained", "gain"]
    return [head, *rows] if rows else []


def _signed(score: str, value: float) -> str:
    text = shown_score(score, value)
    return text if text.startswith("-") else f"+{text}"


def _card_heading(grid: Grid) -> str:
    if len(grid.card_ids) == 1:
        return "The card:"
    return f"What the cards {', '.join(grid.card_ids)} share:"


def _named(kind: str, cells: list[str]) -> list[str]:
    return [f"*{cells[0]}*", *cells[1:]] if kind == "published" else cells
