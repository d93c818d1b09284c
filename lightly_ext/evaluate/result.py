"""A score, with everything that one must know to trust and to compare it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.curves import curve_rows
from stellar_plugin.protocols import NOT_TOLD, card_digest, json_values

RESULT_NAME = "result.json"
# What results without an identity, of mmsegmentation or an older version, tell of it.
TOLD = (
    *("sha256", "checkpoint", "seed", "precision", "num_images", "mean", "std"),
    *("interpolation", "feature", "latent", "decoder_sha256"),
)
UNTOLD = "identity"


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
        identity:
            What else decides on the scores, and so on the place of the result: "model",
            "options" and "inputs", by name. Empty for results that do not tell it.
        chance:
            What guessing gives, by the names of scores that have such a level.
        untrained:
            Scores of the same architecture with random weights, in the same run
            otherwise; empty if they were not computed.
    """

    task: str
    model: str
    data: str
    scores: Mapping[str, Any]
    protocol: Mapping[str, Any]
    provenance: Mapping[str, Any]
    identity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chance: Mapping[str, float] = field(default_factory=dict)
    untrained: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Short name of the model and of everything that decides on the scores."""
        of = [self.task, self.model, self.identity or self.traits]
        return card_digest({"card": dict(self.protocol), "of": of})

    @property
    def measurement(self) -> str:
        """The same for results that measure the same, whatever they are called."""
        return self._measurement(self.identity)

    @property
    def control(self) -> str | None:
        """`measurement` of the same run on random weights of its seed.

        None for a model whose weights are random or none, or whose identity is unknown.
        """
        seed = self.identity.get("options", {}).get("seed")
        if seed is None or is_untrained(self):
            return None
        model = {"sha256": random_weights(seed), "seed": seed, "facts": {}}
        model = {**self.identity["model"], **model}
        return self._measurement({**self.identity, "model": model})

    def _measurement(self, identity: Mapping[str, Any]) -> str:
        return card_digest({"card": dict(self.protocol), "of": [self.task, identity]})

    @property
    def inputs(self) -> dict[str, Any]:
        """Fingerprints of the data by what it is for, as far as they are told."""
        return dict(self.identity.get("inputs", {}))

    @property
    def traits(self) -> dict[str, Any]:
        """Model and options by name, which decide beside card and inputs."""
        if self.identity:
            return {**self.identity["model"], **self.identity["options"]}
        told = {k: self.provenance[k] for k in TOLD if k in self.provenance}
        return {**told, UNTOLD: NOT_TOLD}

    def save(self, folder: Path) -> None:
        """Writes result.json and result.md into a folder, each as a whole or not."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json_values(asdict(self)), indent=2, allow_nan=False)
        replace_text(folder / RESULT_NAME, f"{text}\n")
        replace_text(folder / "result.md", self.to_markdown())

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads a result.json.

        Raises:
            ValueError: If the file is none.
        """
        try:
            # Older versions wrote NaN and Infinity, which are no numbers.
            text = path.read_text()
            return cls(**json.loads(text, parse_constant=lambda _: None))
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is no stored result: {error}.") from error

    def beside(self, score: str) -> list[str]:
        """Chance and the untrained score as text, "not told" if there is none."""
        levels = (self.chance.get(score), self.untrained.get(score))
        return [NOT_TOLD if v is None else shown_value(v) for v in levels]

    def plain_rows(self) -> list[list[str]]:
        """The scores that are numbers, beside them chance and untrained; head first."""
        head = ["score", "", "chance", "untrained"]
        rows = [
            [name, shown_value(v), *(["", ""] if is_count(name) else self.beside(name))]
            for name, v in self.scores.items()
            if not isinstance(v, Mapping)
        ]
        return [head, *rows]

    def curve_rows(self) -> list[list[str]]:
        """The scores that are curves, see `curves.curve_rows`."""
        return curve_rows(self.task, self.scores, self.untrained)

    def _score_tables(self) -> list[list[list[str]]]:
        """Those of the tables of scores that have rows."""
        tables = [self.plain_rows(), self.curve_rows()]
        return [rows for rows in tables if len(rows) > 1]

    def to_markdown(self) -> str:
        """Scores and card as Markdown."""
        return "\n".join(
            [
                f"# {self.task}: {self.model} on {self.data}\n",
                *(f"{markdown_table(rows)}\n" for rows in self._score_tables()),
                _table("protocol", self.protocol),
                *(_table(of, values) for of, values in self.identity.items()),
                _table("provenance", self.provenance),
            ]
        )


def random_weights(seed: int) -> str:
    """What stands in the place of the hash of random weights."""
    return f"random weights of seed {seed}"


def is_untrained(result: Result) -> bool:
    """Whether weights are random or none; mmseg's results name the checkpoint."""
    of = result.provenance
    notes = [str(of.get(name, "")) for name in ("sha256", "checkpoint")]
    random = any(note.startswith(("random weights", "no weights")) for note in notes)
    return random or result.model.endswith("(untrained)")


def is_count(score: str) -> bool:
    """Whether a score is a number of images, which nothing is compared with."""
    return score.startswith("num_")


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
    texts = [(name, shown_value(value)) for name, value in rows.items()]
    return f"{markdown_table([(title, ''), *texts])}\n"
