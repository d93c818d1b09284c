"""What an index says of itself: what made its tokens, and where its images lie."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.finite import FULL

CARD_NAME = "index.json"
SCHEMA = 1
# What decides not, or not alone: images and weights may lie elsewhere, and what is made
# of the known image tells whether other versions matter.
BESIDE = ("images", "model", "known", "versions")
# How far what is made of the known image may be from what was, as a fraction of it: in
# full precision about what tokens lose in a byte per number.
TOLERANCE, HALF_TOLERANCE = 1e-2, 3e-2


@dataclass(frozen=True)
class IndexCard:
    """What an index says of itself.

    Attributes:
        num_tokens:
            Tokens of an image.
        dim:
            Numbers of a token.
        cls_dim:
            Numbers of a CLS token, 0 where the model has none.
        grid_size:
            Rows and columns of the maps.
        resize:
            Length of the shorter side of the images after resizing, px.
        crop:
            Side of their centre crop, px.
        identity:
            What else made the tokens, as values for JSON.
        images:
            Folder of the images, absolute.
        model:
            Arguments of `load_frozen_model` that load the model.
        known:
            What the model made of an image that is always the same.
        versions:
            Versions of the packages that did, by name.
    """

    num_tokens: int
    dim: int
    cls_dim: int
    grid_size: tuple[int, int]
    resize: int
    crop: int
    identity: dict[str, Any]
    images: str
    model: dict[str, Any]
    known: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> IndexCard:
        """Reads the card of an index.

        Raises:
            FileNotFoundError: If there is none in the folder.
            ValueError: If it cannot be read, or is of another version.
        """
        path = folder / CARD_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no index in '{folder}': `stellar index --model MODEL "
                f"--data FOLDER --output {folder}` makes one."
            )
        return cls.from_json(path.read_text("utf-8", errors="replace"), str(path))

    @classmethod
    def from_json(cls, text: str, where: str) -> IndexCard:
        """Reads the text of a card.

        Args:
            text:
                What `to_json` gave.
            where:
                Where it stood, for messages.

        Raises:
            ValueError: If it cannot be read, or is of another version.
        """
        try:
            values = json.loads(text)
            schema = values.pop("schema")
            if schema == SCHEMA:
                values["grid_size"] = tuple(values["grid_size"])
                card = cls(**values)
                card._check_values()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"'{where}' is no card of an index ({error}): make the index anew, "
                "in another place."
            ) from error
        if schema != SCHEMA:
            raise ValueError(
                f"'{where}' is of version {schema}, this is version {SCHEMA}: make the "
                "index anew, in another place."
            )
        return card

    def _check_values(self) -> None:
        """Checks what somebody may have edited."""
        for name, kind in get_type_hints(IndexCard).items():
            value = getattr(self, name)
            if not isinstance(value, get_origin(kind) or kind):
                raise ValueError(f"{name} is {value!r}")
        sides = (self.num_tokens, self.dim, *self.grid_size, self.resize, self.crop)
        whole = all(isinstance(side, int) and side > 0 for side in sides)
        if not whole or len(self.grid_size) != 2 or self.cls_dim < 0:
            raise ValueError(f"sizes are {(*sides, self.cls_dim)}")
        if not all(isinstance(value, float) for value in self.known):
            raise ValueError("known has something else than numbers")

    def to_json(self) -> str:
        """The card as text."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=2)

    def save(self, folder: Path) -> None:
        """Writes the card, as a whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / CARD_NAME, self.to_json() + "\n")

    def check_same(self, other: IndexCard, where: str) -> None:
        """Checks that tokens of another card may stand beside those of this one.

        Args:
            other:
                The card of the other tokens.
            where:
                The index of this card, for the message.

        Raises:
            ValueError: If they were made otherwise.
        """
        mine, theirs = self._deciding(), other._deciding()
        differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        if differing:
            told = [(k, *map(_short, (mine.get(k), theirs.get(k)))) for k in differing]
            texts = "; ".join(f"{k}: {a} there, {b} here" for k, a, b in told)
            raise ValueError(
                f"The index in '{where}' has tokens of '{self.model.get('model')}', "
                f"made otherwise, which these cannot be compared with ({texts}): name "
                "another index, or the model and the options that made it."
            )
        self._check_known(other, where)

    def _check_known(self, other: IndexCard, where: str) -> None:
        """What hashes of weights do not tell: how the code reads and runs them."""
        if len(self.known) != len(other.known):
            raise ValueError(
                f"The card of the index in '{where}' tells {len(self.known)} numbers "
                f"of a known image, not {len(other.known)}, so somebody edited it: "
                "make the index anew, in another place."
            )
        distance = math.dist(self.known, other.known) / (math.hypot(*self.known) or 1)
        full = self.identity.get("precision") == FULL
        if distance <= (TOLERANCE if full else HALF_TOLERANCE):
            return
        names = sorted(self.versions | other.versions)
        told = [(n, self.versions.get(n), other.versions.get(n)) for n in names]
        texts = [f"{n} {a} there, {b} here" for n, a, b in told if a != b]
        raise ValueError(
            f"The same weights make other tokens of a known image than when the index "
            f"in '{where}' was made: they differ by {distance:.0%} "
            f"({'; '.join(texts) or 'packages of the same versions'}). Make the index "
            "anew, in another folder, or go back to these versions."
        )

    def _deciding(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        identity = values.pop("identity")
        return {k: v for k, v in values.items() if k not in BESIDE} | identity


def _short(value: Any) -> str:
    """A value for a message: of hashes the beginning."""
    text = str(value)
    return text if len(text) < 64 else f"{text[:8]}..."
