"""`python -m benchmarks.search build ...` and `... ask ...`, see the modules."""

from __future__ import annotations

import sys

from benchmarks.search import ask, build

COMMANDS = {"build": build.main, "ask": ask.main}

if __name__ == "__main__":
    if not {*sys.argv[1:2]} & COMMANDS.keys():
        sys.exit(f"usage: python -m benchmarks.search {{{','.join(COMMANDS)}}} ...")
    COMMANDS[sys.argv[1]](sys.argv[2:])
