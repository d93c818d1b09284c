from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from stellar_cli.pipes import closed_pipes

# Prints more than one buffer; as a command, and as the parsers of commands do it.
PRINTS = """
import sys
from stellar_cli import __main__ as cli
from stellar_cli.errors import shown

def fake(arguments):
    with shown("stellar fake", False):
        {body}

cli._main = fake
cli.main([])
"""


def run_unread(body: str, *options: str) -> tuple[int, str]:
    """Runs a command whose reader has left: exit status, what it said as an error."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, *options, "-c", body],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writing)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    "body",
    [
        "print('a line')",
        "print('a line\\n' * 100_000)",
        "print('the help'); sys.exit(0)",
        "print('a line', flush=True)",
    ],
)
@pytest.mark.parametrize("options", [(), ("-u",)])
def test_main__nobody_reads(body: str, options: tuple[str, ...]) -> None:
    assert run_unread(PRINTS.format(body=body), *options) == (1, "")


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"]])
def test_main__nobody_reads_the_help(arguments: list[str]) -> None:
    body = f"from stellar_cli.__main__ import main; main({arguments})"
    assert run_unread(body) == (1, "")


def test_main__another_pipe_is_an_error() -> None:
    body = PRINTS.format(body="raise BrokenPipeError(32, 'of a worker')")
    ended = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, stdin=None
    )
    assert ended.returncode == 1
    assert "stellar fake: [Errno 32] of a worker" in ended.stderr


def test_closed_pipes__output_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(BrokenPipeError), closed_pipes():
        raise BrokenPipeError
