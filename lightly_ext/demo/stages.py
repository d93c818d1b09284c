"""The stages of a demo: announced, and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console


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
