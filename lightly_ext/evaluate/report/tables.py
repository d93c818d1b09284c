"""Results as tables in which only what may be compared shares a column."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal, NamedTuple

from lightly_ext.evaluate.report.published import Published
from lightly_ext.evaluate.report.scores import SCORES, shown_score
from lightly_ext.evaluate.result import Result
from stellar_plugin.protocols import card_digest

# What the paper's tables show first; every other task comes after, by its name.
FIRST_TASKS = ("linear-paper", "linear", "knn", "segmentation", "reconstruction")
Kind = Literal["trained", "untrained", "published"]
KINDS: tuple[Kind, ...] = ("trained", "untrained", "published")


@dataclass(frozen=True)
class Column:
    """One score under one card; equal cards only.

    Attributes:
        digest: Short name of the card.
        score: Name of the score, "" where rows have it.
        at: Which value of a score that is a curve, "" for a plain one.
        card: The card.
    """

    digest: str
    score: str
    at: str
    card: Mapping[str, Any] = field(compare=False, repr=False)

    @property
    def data(self) -> str:
        """The data set, marked where only a part of it was used."""
        data = str(self.card.get("data", "?"))
        limit = self.card.get("limit")
        return data if limit is None else f"{data} (limited to {limit} images)"


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        kind: Whether its numbers were measured here, and on which weights.
        model: Its name.
        detail: What tells it from rows of the same name: hash of the weights, or source
            of published numbers.
        score: Name of the score where columns are the points of a curve, else "".
    """

    kind: Kind
    model: str
    detail: str = ""
    score: str = ""

    @property
    def title(self) -> str:
        """The name with what must be said beside it."""
        notes = [self.detail] if self.detail else []
        if self.kind == "published":
            notes.insert(0, "published")
        elif self.kind == "untrained" and "untrained" not in self.model:
            notes.insert(0, "untrained")
        return f"{self.model} ({', '.join(notes)})" if notes else self.model


class Cell(NamedTuple):
    """The values of one row in one column, one per seed.

    Attributes:
        seeds: The seeds, [None] for a published number.
        values: The values, in the same order.
    """

    seeds: list[int | None]
    values: list[float]

    def text(self, score: str) -> str:
        """The value, or mean [min, max] and number of seeds."""
        shown = [shown_score(score, v) for v in self.values]
        if len(shown) == 1:
            return shown[0]
        first, last = (shown_score(score, f(self.values)) for f in (min, max))
        middle = shown_score(score, mean(self.values))
        return f"{middle} [{first}, {last}], n {len(shown)}"


class Gain(NamedTuple):
    """What learning brought: a trained model beside the best untrained feature."""

    row: Row
    column: Column
    untrained: Row
    untrained_column: Column
    value: float


@dataclass(frozen=True)
class Table:
    """Scores of one task under one kind of protocol.

    Attributes:
        task: Name of the task.
        protocol: Name of the protocol.
        cells: Cells by row and column.
    """

    task: str
    protocol: str
    cells: Mapping[tuple[Row, Column], Cell]

    @property
    def rows(self) -> list[Row]:
        """Measured models first, published numbers last."""
        rows = dict.fromkeys(row for row, _ in self.cells)
        return sorted(rows, key=lambda r: KINDS.index(r.kind))

    @property
    def columns(self) -> list[Column]:
        """By data set; cards with measured numbers first, then by feature and point."""
        measured = {c.digest for r, c in self.cells if r.kind != "published"}

        def place(column: Column) -> tuple[Any, ...]:
            feature = str(column.card.get("features", ""))
            unmeasured = column.digest not in measured
            data = str(column.card.get("data"))
            card = (data, unmeasured, feature != "auto", feature, column.digest)
            return *card, _point(column.at)

        return sorted(dict.fromkeys(column for _, column in self.cells), key=place)

    @property
    def cards(self) -> dict[str, Mapping[str, Any]]:
        """The cards by digest, in the order of the columns."""
        return {column.digest: column.card for column in self.columns}

    @property
    def only_published(self) -> bool:
        """Whether nothing of it was measured here."""
        return all(row.kind == "published" for row in self.rows)


def build_tables(
    results: Sequence[Result], published: Iterable[Published] = ()
) -> list[Table]:
    """Sorts results into tables.

    Args:
        results:
            Measured results; of equal ones (task, model, weights, card, seed) one.
        published:
            Published numbers.

    Returns:
        A table per task and protocol for plain scores, and one per card for scores that
        are curves; what was only published comes last.
    """
    cells: dict[tuple[str, ...], dict[tuple[Row, Column], Cell]] = defaultdict(dict)
    rows = _rows(results)
    for result, row in zip(results, rows, strict=True):
        seed = result.provenance.get("seed")
        for key, place, value in _numbers(result, row):
            cell = cells[key].setdefault(place, Cell([], []))
            cell.seeds.append(seed)
            cell.values.append(value)
    entries = list(published)
    for entry, row in zip(entries, _published_rows(entries), strict=True):
        for key, place, value in _numbers(entry.result, row):
            cells[key][place] = Cell([None], [value])
    tables = [Table(key[0], key[1], of_table) for key, of_table in cells.items()]
    return sorted(tables, key=_table_place)


def _point(at: str) -> float:
    """Place of a point on a curve, 0 where it is no number."""
    try:
        return float(at)
    except ValueError:
        return 0.0


def learning_gains(table: Table) -> list[Gain]:
    """Trained models beside the best untrained feature.

    Args:
        table:
            A table; without untrained models there is nothing to say.
    """
    gains = []
    for (row, column), cell in table.cells.items():
        score = SCORES.get(column.score)
        if row.kind != "trained" or score is None:
            continue
        sign = 1 if score.higher_is_better else -1
        rivals = {
            place: sign * mean(other.values)
            for place, other in table.cells.items()
            if place[0].kind == "untrained" and _same_but_feature(place[1], column)
        }
        if rivals:
            best = max(rivals, key=lambda place: rivals[place])
            value = mean(cell.values) - mean(table.cells[best].values)
            gains.append(Gain(row, column, *best, value))
    return gains


def card_differences(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Fields in which cards differ, with the value in each card or None.

    Args:
        cards:
            Cards by digest.
    """
    names = dict.fromkeys(name for card in cards.values() for name in card)
    values = {name: [card.get(name) for card in cards.values()] for name in names}
    return {name: v for name, v in values.items() if any(x != v[0] for x in v)}


def is_untrained(result: Result) -> bool:
    """Whether weights are random or none; mmseg's results name the checkpoint."""
    of = result.provenance
    notes = [str(of.get(name, "")) for name in ("sha256", "checkpoint")]
    random = any(note.startswith(("random weights", "no weights")) for note in notes)
    return random or result.model.endswith("(untrained)")


def _rows(results: Sequence[Result]) -> list[Row]:
    """A row per model; two, if the same name and seed stand for different weights."""
    hashes: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for r in results:
        key = (r.model, is_untrained(r), r.provenance.get("seed"))
        hashes[key].add(str(r.provenance.get("sha256")))
    split = {key[:2] for key, found in hashes.items() if len(found) > 1}
    rows = []
    for r in results:
        untrained = is_untrained(r)
        digest = str(r.provenance.get("sha256")).removeprefix("weights ")[:8]
        detail = f"sha256 {digest}" if (r.model, untrained) in split else ""
        rows.append(Row("untrained" if untrained else "trained", r.model, detail))
    return rows


def _published_rows(entries: Sequence[Published]) -> list[Row]:
    """A row per model, task and protocol, that names all its sources."""
    sources: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    keys = [(e.model, e.task, e.protocol.name) for e in entries]
    for key, entry in zip(keys, entries, strict=True):
        sources[key][entry.source] = None
    return [Row("published", key[0], ", ".join(sources[key])) for key in keys]


def _table_place(table: Table) -> tuple[Any, ...]:
    first = FIRST_TASKS.index(table.task) if table.task in FIRST_TASKS else 99
    return table.only_published, first, table.task, table.protocol


def _numbers(
    result: Result, row: Row
) -> Iterable[tuple[tuple[str, ...], tuple[Row, Column], float]]:
    """Table, place in it and value of each score. Counts are no scores."""
    card = result.protocol
    digest = card_digest(dict(card))
    name = str(card.get("name", "?"))
    for score, value in result.scores.items():
        if score.startswith("num_") or value is None:
            continue
        if not isinstance(value, Mapping):
            key = (result.task, name)
            yield key, (row, Column(digest, score, "", card)), float(value)
            continue
        of_score = Row(row.kind, row.model, row.detail, score)
        for at, point in value.items():
            if point is not None:
                column = Column(digest, "", at, card)
                yield (result.task, name, digest), (of_score, column), float(point)


def _same_but_feature(a: Column, b: Column) -> bool:
    """Whether two columns differ in the feature at most."""
    cards = [{k: v for k, v in c.card.items() if k != "features"} for c in (a, b)]
    return cards[0] == cards[1] and (a.score, a.at) == (b.score, b.at)
