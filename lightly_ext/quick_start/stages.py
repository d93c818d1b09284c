"""The folder of a try, its stages, and how much of its time is gone."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lightly_ext.durable import remove_partial, replace_text

# In the folder of a try from its start on: which one it is, and what is finished.
MARK = ".stellar_try"
RESULTS = ("table.json", "table.md", "index.html", "model")


class Progress:
    """What of a try is finished, in its folder, so that one that was stopped goes on.

    Attributes:
        output:
            The folder.
        key:
            Tells tries of other photos, options or versions from this one.
        seconds:
            Time that each finished stage took, by its name.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.output = output
        self.key = key
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Makes the folder, or takes it over from an earlier try.

        What is finished of a try of the same key that was stopped is kept; all else of
        an earlier try goes.

        Raises:
            FileExistsError: If something else is in the folder.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        mark = self.output / MARK
        found = {path.name for path in self.output.iterdir()} - {".lock"}
        if found and MARK not in found:
            raise FileExistsError(
                f"'{self.output}' is not empty and not of a try, which would replace "
                "folders in it. Name another --output."
            )
        remove_partial(self.output)
        earlier = json.loads(mark.read_text()) if mark.is_file() else {}
        if earlier.get("key") == self.key and not earlier["complete"]:
            self.seconds = {
                name: seconds
                for name, seconds in earlier["seconds"].items()
                if (self.output / name / "model").is_dir()
            }
        for name in RESULTS:
            path = self.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._write()

    def finish(self, name: str, seconds: float) -> None:
        """Notes that a stage is finished, whatever happens later."""
        self.seconds[name] = seconds
        self._write()

    def complete(self) -> None:
        """Notes that all is done: typed again, the same try starts anew."""
        self._write(complete=True)

    def _write(self, complete: bool = False) -> None:
        state = {"key": self.key, "seconds": self.seconds, "complete": complete}
        replace_text(self.output / MARK, json.dumps(state) + "\n")


@dataclass
class Stages:
    """Announces stages and keeps their times.

    Attributes:
        console:
            Where to print.
        began:
            When the try began, by `time.monotonic`; earlier than it did, by the time of
            what is finished already.
        seconds:
            Wall-clock time of each finished stage.
    """

    console: Console = field(default_factory=Console)
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gone(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a stage."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.console.print(f"{name}: {self.seconds[name]:.1f} s", style="green")

    def say(self, text: str) -> None:
        """Prints a line as it is."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
