"""What the parts of the GPU benchmark leave behind: one JSON and one Markdown file."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Cell = str | float | int | None


class Results:
    """The file `gpu.json` of a run, and `gpu.md`, which says the same to people.

    Only one process writes at a time: the parts run one after the other.

    Attributes:
        folder: Where both files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "gpu.json"

    def read(self) -> dict[str, Any]:
        """The whole file: `machine`, and `parts` by letter."""
        if not self.path.exists():
            return {"machine": {}, "parts": {}}
        content: dict[str, Any] = json.loads(self.path.read_text())
        return content

    def values(self, letter: str) -> dict[str, Any]:
        """Figures of a part, none if it has not run."""
        values: dict[str, Any] = self.read()["parts"].get(letter, {}).get("values", {})
        return values

    def update(self, letter: str, **fields: Any) -> None:
        """Sets fields of a part."""
        content = self.read()
        content["parts"].setdefault(letter, {}).update(fields)
        self._write(content)

    def set_machine(self, **fields: Any) -> None:
        """Sets what is known of the machine."""
        content = self.read()
        content["machine"].update(fields)
        self._write(content)

    def _write(self, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A part may be stopped while it writes: never half a file.
        for path, text in (
            (self.path, json.dumps(content, indent=1)),
            (self.folder / "gpu.md", _markdown(content)),
        ):
            temporary = path.with_suffix(".part")
            temporary.write_text(text)
            os.replace(temporary, path)


class Report:
    """What one part reports; every call is on disk when it returns.

    Attributes:
        results: The run's files.
        letter: The part.
    """

    def __init__(self, results: Results, letter: str) -> None:
        self.results, self.letter = results, letter
        self._values: dict[str, Cell] = {}
        self._tables: list[dict[str, Any]] = []
        self._failures: dict[str, str] = {}

    def values(self, **values: Cell) -> None:
        """Adds figures, with their unit at the end of their name."""
        self._values.update(values)
        self.results.update(self.letter, values=self._values)
        print("; ".join(f"{k} {shown(v)}" for k, v in values.items()), flush=True)

    def known(self) -> dict[str, Any]:
        """The figures so far."""
        return dict(self._values)

    def table(
        self, title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Adds a table."""
        table = {"title": title, "head": list(head), "rows": [list(r) for r in rows]}
        self._tables.append(table)
        self.results.update(self.letter, tables=self._tables)
        print(f"\n{markdown_table(table)}\n", flush=True)

    def headline(self, text: str) -> None:
        """Says in a line what the part has found."""
        self.results.update(self.letter, headline=text)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Keeps a failure (lack of memory, too) from ending the part."""
        try:
            yield
        except Exception as error:
            self._failures[name] = f"{type(error).__name__}: {error}"[:2000]
            self.results.update(self.letter, failures=self._failures)
            traceback.print_exc()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def shown(value: Cell) -> str:
    """A figure as text: three digits, whole where large."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown_table(table: dict[str, Any]) -> str:
    """The table as Markdown, its title above."""
    lines = [table["head"], ["---"] * len(table["head"]), *table["rows"]]
    text = "\n".join(f"| {' | '.join(map(shown, line))} |" for line in lines)
    return f"{table['title']}\n\n{text}"


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """A table with a line for every part."""
    rows = [
        [
            letter,
            part.get("title"),
            part.get("status"),
            part.get("seconds"),
            "; ".join(
                [
                    part.get("headline", ""),
                    *(f"FAILED {k}" for k in part.get("failures", ())),
                ]
            ).strip("; "),
        ]
        for letter, part in content["parts"].items()
    ]
    machine = ", ".join(str(v) for v in content["machine"].values())
    return {
        "title": machine,
        "head": ["part", "what", "status", "seconds", "found"],
        "rows": rows,
    }


def _markdown(content: dict[str, Any]) -> str:
    blocks = [markdown_table(summary(content))]
    for letter, part in content["parts"].items():
        blocks.append(f"## {letter}: {part.get('title', '')}")
        values = [[name, value] for name, value in part.get("values", {}).items()]
        tables = [{"title": "Figures", "head": ["what", "value"], "rows": values}]
        blocks += [markdown_table(t) for t in [*tables, *part.get("tables", [])]]
        blocks += [f"Failed, {k}: `{v}`" for k, v in part.get("failures", {}).items()]
    return "\n\n".join(blocks) + "\n"
