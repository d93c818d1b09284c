"""Results as tables in which only what may be compared shares a column."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Literal, NamedTuple

from lightly_ext.evaluate.curves import point_place
from lightly_ext.evaluate.report.published import Published
from lightly_ext.evaluate.report.scores import (
    REFERENCES,
    SCORES,
    shown_score,
    split_score,
    subject_title,
)
from lightly_ext.evaluate.result import (
    UNTOLD,
    Result,
    is_count,
    is_untrained,
    shown_value,
)
from stellar_plugin.protocols import NOT_TOLD, card_digest

# What the paper's tables show first; every other task comes after, by its name.
FIRST_TASKS = ("linear-paper", "linear", "knn", "segmentation", "reconstruction")
# What differs between seeds, because other weights were trained by each.
OF_WEIGHTS = ("sha256", "checkpoint", "decoder_sha256", "decoder", "probe")
HASH = re.compile(r"[0-9a-f]{9,}")
Kind = Literal["trained", "untrained", "published"]
KINDS: tuple[Kind, ...] = ("trained", "untrained", "published")


@dataclass(frozen=True)
class Column:
    """One score under one card; equal cards only.

    Attributes:
        digest: Short name of the card.
        score: Name of the score, "" where rows have it.
        at: Which value of a score that is a curve, "" for a plain one.
        inputs: What tells the data from others of the same name, "" where all are one.
        card: The card.
    """

    digest: str
    score: str
    at: str
    inputs: str
    card: Mapping[str, Any] = field(compare=False, repr=False)

    @property
    def data(self) -> str:
        """The data set, marked where a part was used, or others have its name."""
        limit = self.card.get("limit")
        notes = [] if limit is None else [f"limited to {limit} images"]
        notes += [self.inputs] if self.inputs else []
        data = str(self.card.get("data", "?"))
        return f"{data} ({'; '.join(notes)})" if notes else data


@dataclass(frozen=True)
class Row:
    """One model, or what is scored beside others in a run of it.

    Attributes:
        kind: Whether its numbers were measured here, and on which weights.
        model: Its name.
        detail: What tells it from rows of the same name: hash of the weights,
            precision, another option; or source of published numbers.
        score: Name of the score where columns are the points of a curve, else "".
        subject: What the scores are of, see `scores.split_score`, "" for the model.
    """

    kind: Kind
    model: str
    detail: str = ""
    score: str = ""
    subject: str = ""

    @property
    def title(self) -> str:
        """The name with what must be said beside it."""
        notes = [self.detail] if self.detail else []
        if self.kind == "published":
            notes.insert(0, "published")
        elif self.kind == "untrained" and "untrained" not in self.model:
            notes.insert(0, "untrained")
        title = f"{self.model} ({', '.join(notes)})" if notes else self.model
        return f"{title}: {subject_title(self.subject)}" if self.subject else title


class Cell(NamedTuple):
    """The values of one row in one column, one per seed.

    Attributes:
        seeds: The seeds, [None] for a published number.
        values: The values, in the same order.
        chance: What guessing gives, None where that is not told.
        untrained: Scores of the same architecture with random weights, likewise.
    """

    seeds: list[int | None]
    values: list[float]
    chance: list[float | None]
    untrained: list[float | None]

    def text(self, score: str) -> str:
        """The value, or mean [min, max] and number of seeds."""
        return _text(score, self.values)

    def beside(self, score: str) -> list[str]:
        """Chance and untrained scores as text; chance is mostly equal for all."""
        chance = list(dict.fromkeys(self.chance))
        return [_text(score, values) for values in (chance, self.untrained)]


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
        """Measured models first, published numbers last or below their own model."""
        rows = dict.fromkeys(row for row, _ in self.cells)
        trained = [row.model for row in rows if row.kind == "trained"]
        models = {model: i for i, model in enumerate(dict.fromkeys(trained))}

        def place(row: Row) -> tuple[int, int, int]:
            kind = KINDS.index(row.kind)
            if row.kind == "untrained" or row.model not in models:
                return kind, 0, 0
            return 0, models[row.model], kind

        return sorted(rows, key=place)

    @property
    def columns(self) -> list[Column]:
        """By data set; cards with measured numbers first, then by feature and point."""
        measured = {c.digest for r, c in self.cells if r.kind != "published"}

        def place(column: Column) -> tuple[Any, ...]:
            feature = str(column.card.get("features", ""))
            unmeasured = column.digest not in measured
            data = str(column.card.get("data"))
            card = (data, unmeasured, feature != "auto", feature, column.digest)
            return *card, column.inputs, point_place(column.at)

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
            Measured results; of those with the same digest one.
        published:
            Published numbers.

    Returns:
        A table per task and protocol for plain scores, and one per card for scores that
        are curves; what was only published comes last.
    """
    cells: dict[tuple[str, ...], dict[tuple[Row, Column], Cell]] = defaultdict(dict)
    measured = {result.measurement: result.scores for result in results}
    rows, inputs = _rows(results), _inputs(results)
    for result, row, of_data in zip(results, rows, inputs, strict=True):
        seed = result.provenance.get("seed")
        untrained = result.untrained or measured.get(str(result.control), {})
        for key, place, value in _numbers(result, row, of_data):
            stored = stored_score(*place)
            cell = cells[key].setdefault(place, Cell([], [], [], []))
            cell.seeds.append(seed)
            cell.values.append(value)
            cell.chance.append(None if place[1].at else result.chance.get(stored))
            cell.untrained.append(None if place[1].at else untrained.get(stored))
    entries = list(published)
    for entry, row in zip(entries, _published_rows(entries), strict=True):
        for key, place, value in _numbers(entry.result, row, ""):
            cells[key][place] = Cell([None], [value], [None], [None])
    tables = [Table(key[0], key[1], of_table) for key, of_table in cells.items()]
    return sorted(tables, key=_table_place)


def _knows_nothing(row: Row) -> bool:
    return row.subject.split("_")[0] in REFERENCES


def _text(score: str, values: Sequence[float | None]) -> str:
    """A value, mean [min, max] and number of several, or that none is told."""
    told = [v for v in values if v is not None]
    if not told:
        return NOT_TOLD
    if len(told) == 1:
        return shown_score(score, told[0])
    middle, first, last = (shown_score(score, f(told)) for f in (mean, min, max))
    return f"{middle} [{first}, {last}], n {len(told)}"


def learning_gains(table: Table) -> list[Gain]:
    """Trained models beside the best untrained feature.

    Args:
        table:
            A table; without untrained models there is nothing to say.
    """
    gains = []
    for (row, column), cell in table.cells.items():
        score = SCORES.get(column.score)
        if row.kind != "trained" or score is None or _knows_nothing(row):
            continue
        sign = 1 if score.higher_is_better else -1
        rivals = {
            place: sign * mean(other.values)
            for place, other in table.cells.items()
            if place[0].kind == "untrained"
            and place[0].subject == row.subject
            and _same_but_feature(place[1], column)
        }
        if rivals:
            best = max(rivals, key=lambda place: rivals[place])
            value = mean(cell.values) - mean(table.cells[best].values)
            gains.append(Gain(row, column, *best, value))
    return gains


def stored_score(row: Row, column: Column) -> str:
    """Name of the score of a cell as results have it."""
    score = row.score or column.score
    return f"{row.subject}_{score}" if row.subject else score


def card_differences(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Fields in which cards differ, with the value in each card or None.

    Args:
        cards:
            Cards by digest.
    """
    names = dict.fromkeys(name for card in cards.values() for name in card)
    values = {name: [card.get(name) for card in cards.values()] for name in names}
    return {name: v for name, v in values.items() if any(x != v[0] for x in v)}


def _rows(results: Sequence[Result]) -> list[Row]:
    """A row per model; several, named by what differs, where a name stands for more.

    Seeds share a row, and with them the weights that they started from.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        groups[_group(r)].append(r)
    differing = {key: _differing(found) for key, found in groups.items()}
    rows = []
    for r in results:
        traits = r.traits
        found = [n for n in differing[_group(r)] if n in traits or r.identity]
        names = [n for n in found if n in traits or n != UNTOLD]
        detail = ", ".join(_shown_trait(n, traits.get(n)) for n in names)
        kind: Kind = "untrained" if is_untrained(r) else "trained"
        rows.append(Row(kind, r.model, detail))
    return rows


def _group(result: Result) -> tuple[Any, ...]:
    """What a row and its table are told by, but for details."""
    protocol = result.protocol.get("name")
    return result.task, protocol, result.model, is_untrained(result)


def _differing(results: Sequence[Result]) -> list[str]:
    """Traits in which results of one model differ, those of weights for equal seeds."""
    found: dict[tuple[str, Any], set[str]] = defaultdict(set)
    names = dict.fromkeys(name for r in results for name in r.traits if name != "seed")
    for name in names:
        for r in results:
            if name in r.traits or r.identity:  # untold is not None
                seed = r.provenance.get("seed") if name in OF_WEIGHTS else None
                found[name, seed].add(json.dumps(r.traits.get(name)))
    differing = {name for (name, _), values in found.items() if len(values) > 1}
    return [name for name in names if name in differing]


def _shown_trait(name: str, value: Any) -> str:
    if value is None:
        return f"no {name}"
    text = shown_value(value).removeprefix("weights ")
    return f"{name} {text[:8] if HASH.fullmatch(text) else text}"


def _inputs(results: Sequence[Result]) -> list[str]:
    """For each result what tells its data from other data under the same card."""
    found: dict[str, set[str]] = defaultdict(set)
    for r in results:
        found[card_digest(dict(r.protocol))].add(json.dumps(r.inputs, sort_keys=True))
    return [
        ", ".join(_shown_trait(*item) for item in r.inputs.items()) or "images not told"
        if len(found[card_digest(dict(r.protocol))]) > 1
        else ""
        for r in results
    ]


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
    result: Result, row: Row, inputs: str
) -> Iterable[tuple[tuple[str, ...], tuple[Row, Column], float]]:
    """Table, place in it and value of each score. Counts are no scores."""
    card = result.protocol
    digest = card_digest(dict(card))
    name = str(card.get("name", "?"))
    for score, value in result.scores.items():
        if is_count(score) or value is None:
            continue
        if not isinstance(value, Mapping):
            subject, measure = split_score(score)
            of_subject = replace(row, subject=subject)
            column = Column(digest, measure, "", inputs, card)
            yield (result.task, name), (of_subject, column), float(value)
            continue
        of_score = Row(row.kind, row.model, row.detail, score)
        for at, point in value.items():
            if point is not None:
                column = Column(digest, "", at, inputs, card)
                yield (result.task, name, digest), (of_score, column), float(point)


def _same_but_feature(a: Column, b: Column) -> bool:
    """Whether two columns differ in the feature at most."""
    cards = [{k: v for k, v in c.card.items() if k != "features"} for c in (a, b)]
    places = [(c.score, c.at, c.inputs) for c in (a, b)]
    return cards[0] == cards[1] and places[0] == places[1]
