"""The folder of a demo, and its stages: announced, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

# In the folder of a demo from its start on; and what one leaves at its end.
MARK, RESULTS = ".stellar_demo", ("table.json", "table.md", "index.html")


def start_output(output: Path) -> None:
    """Makes a folder for a demo, which may replace what is in it.

    Args:
        output:
            The folder: new, empty, or that of an earlier demo, whose results go.

    Raises:
        FileExistsError: If something else is in it.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in output.iterdir()} - {".lock"}
    if found and not found & {MARK, "table.json"}:
        raise FileExistsError(
            f"'{output}' is not empty and not of a demo, which would replace folders "
            "in it. Name another --output."
        )
    (output / MARK).touch()
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)


@dataclass
class Stages:
    """Announces stages and keeps their times.

    Attributes:
        console:
            Where to print.
        seconds:
            Wall-clock time of each finished stage.
    """

    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a stage."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {name}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.console.print(f"{name}: {self.seconds[name]:.1f} s", style="green")
