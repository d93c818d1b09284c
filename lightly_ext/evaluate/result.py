"""A score, with everything that one must know to trust and to compare it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stellar_plugin.protocols import card_digest

RESULT_NAME = "result.json"


@dataclass(frozen=True)
class Result:
    """Scores of one model on one data set under one protocol.

    Attributes:
        task:
            Name of the evaluation, for example "knn".
        model:
            Name of the model in tables.
        data:
            Name of the data set in tables.
        scores:
            Numbers by name. Fractions are in 0 to 1; other units are in the name
            ("psnr_db").
        protocol:
            Card of the protocol: must be equal for two results to share a column.
        provenance:
            Where the numbers come from: may differ.
    """

    task: str
    model: str
    data: str
    scores: Mapping[str, Any]
    protocol: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Short name of this protocol, these weights and this seed."""
        identity = [dict(self.protocol), self.model, self.provenance.get("sha256")]
        return card_digest({"of": [*identity, self.provenance.get("seed")]})

    def save(self, folder: Path) -> None:
        """Writes result.json and result.md into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2)
        (folder / RESULT_NAME).write_text(f"{text}\n")
        (folder / "result.md").write_text(self.to_markdown())

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads a result.json.

        Raises:
            ValueError: If the file is none.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is no stored result: {error}.") from error

    def to_markdown(self) -> str:
        """Scores and card as Markdown."""
        return "\n".join(
            [
                f"# {self.task}: {self.model} on {self.data}\n",
                _table("score", self.scores),
                _table("protocol", self.protocol),
                _table("provenance", self.provenance),
            ]
        )


def shown_value(value: Any) -> str:
    """A value of a card as text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {shown_value(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(shown_value(v) for v in value)
    return str(value)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        rows:
            Text by rows, the head first. No text ends its cell, or is a tag.
    """
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def escaped(text: str) -> str:
    """Text that ends no cell of a Markdown table and is no tag."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {title} | |", "| --- | --- |"]
    lines += [f"| {name} | {shown_value(value)} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"
