"""Protocol cards in the documentation, printed from `stellar_plugin.protocols`.

    python -m lightly_ext.evaluate.report.protocol_cards docs/evaluation.md

fills what stands between a marker and `<!-- end -->`. Markers are `<!-- card KNN -->`,
`<!-- card FINETUNE over LINEAR_PAPER -->` for the differences alone, and
`<!-- other cards -->` for all that no other marker of the file names.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightly_ext.evaluate.result import markdown_table, shown_value
from stellar_plugin import protocols
from stellar_plugin.protocols import Protocol

MARKED = re.compile(
    r"(<!-- (?:card (?P<name>\w+)(?: over (?P<base>\w+))?|other cards) -->\n)"
    r".*?(<!-- end -->)",
    re.DOTALL,
)


def known_protocols() -> dict[str, Protocol]:
    """The constants of `stellar_plugin.protocols` by name, in their order."""
    values = vars(protocols).items()
    return {name: value for name, value in values if isinstance(value, Protocol)}


def card_table(protocol: Protocol, base: Protocol | None = None) -> str:
    """A card as a Markdown table.

    Args:
        protocol:
            The protocol.
        base:
            Leave out what is as in this one.
    """
    card, known = protocol.card(), {} if base is None else base.card()
    rows = [(k, shown_value(v)) for k, v in card.items() if known.get(k) != v]
    rows += [(k, "not used") for k in known if k not in card]
    return markdown_table([("field", "value"), *rows]) + "\n"


def fill_cards(text: str, known: Mapping[str, Protocol]) -> str:
    """Replaces what stands between the markers of a page.

    Args:
        text:
            The page, in Markdown.
        known:
            Protocols by the names that markers use.

    Raises:
        ValueError: If a marker names no protocol.
    """
    found = list(MARKED.finditer(text))
    names = {name for m in found for name in m.group("name", "base") if name}
    unknown = sorted(names - set(known))
    if unknown:
        raise ValueError(f"There is no protocol {', '.join(unknown)}.")
    others = [name for name in known if name not in {m["name"] for m in found}]

    def fill(match: re.Match[str]) -> str:
        if match["name"]:
            base = known[match["base"]] if match["base"] else None
            body = card_table(known[match["name"]], base)
        else:
            body = "\n".join(f"`{n}`\n\n{card_table(known[n])}" for n in others)
        return f"{match[1]}\n{body}\n{match[4]}" if body else match[1] + match[4]

    return MARKED.sub(fill, text)


def main(paths: Sequence[str]) -> None:
    """Fills the cards of pages.

    Args:
        paths:
            Markdown files.
    """
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        path.write_text(fill_cards(text, known_protocols()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
