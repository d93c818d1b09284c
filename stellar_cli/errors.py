"""What users read when a command cannot do what they asked for."""

from __future__ import annotations

import difflib
import functools
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from stellar_cli.pipes import output_is_closed

# Mistakes in the code, whoever runs it.
BUGS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError),
    *(NotImplementedError, RecursionError, SyntaxError, TypeError),
)
LONGEST_MESSAGE = 1000
# How jsonargparse says that a class cannot be imported, or is of another kind.
NO_CLASS = "dot import path string:|given class_path|not correspond to a subclass"
# Names the file that the first process of a run makes that shows an error.
SHOWN = "STELLAR_ERROR_SHOWN"
# What has another name now.
RENAMED = {"concepts": "atlas"}
# Seconds in which the first process of a run may end by itself.
PATIENCE = 10.0
# Seconds after which an error is not the one that another process has shown.
SAME_ERROR = 15.0


class OptionError(ValueError):
    """Wrong options; the command ends with status 2, as those of argparse do."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that names what is closest to a misspelt name, or in its place now.

    Args:
        name:
            What was given.
        names:
            What there is.

    Returns:
        The question with a space in front, empty if nothing is close.
    """
    close = closest(name, names)
    return f" Did you mean '{close}'?" if close else ""


def closest(name: str, names: Iterable[str]) -> str | None:
    """What is closest to a misspelt name, or in its place now.

    Args:
        name:
            What was given.
        names:
            What there is.

    Returns:
        One of them, or None if nothing is close.
    """
    known = list(names)
    name = RENAMED.get(name, name)
    if name in known:
        return name
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def raise_errors(parser: Any) -> None:
    """Makes a parser raise an OptionError where it would print its usage and exit.

    Args:
        parser:
            Parser of argparse or jsonargparse.
    """
    # Lightning pickles the parser for processes that it spawns.
    parser.error = functools.partial(_raise_error, parser)


def _raise_error(parser: Any, message: str, *_: Any) -> NoReturn:
    raise OptionError(_shortened(message, parser))


@contextmanager
def shown(command: str, debug: bool) -> Iterator[None]:
    """Ends the process with a line or two where a command raises an error of a user.

    Mistakes in the code keep their traceback.

    Args:
        command:
            What was typed, "stellar pretrain".
        debug:
            Show the traceback of every error.

    Raises:
        SystemExit: With status 2 after wrong options, 130 after Ctrl-C, 1 after other
            errors.
    """
    starts_others = not _is_launched() and _rank() == 0
    if starts_others:
        os.environ[SHOWN] = f"{_temporary()}/stellar-{uuid.uuid4().hex}"
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        _say_once(f"\n{command}: stopped.\n")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        left = isinstance(error, BrokenPipeError) and output_is_closed()
        if debug or left:
            raise
        if isinstance(error, BUGS):
            sys.stderr.write(f"{command}: this is a mistake in the package; please ")
            sys.stderr.write("report what follows, with the command.\n")
            raise
        status, where = 1, "`--debug` shows where it happened."
        if isinstance(error, OptionError):
            status, where = 2, f"`{command} --help` lists the options."
        lines = [_one_line(error), *getattr(error, "__notes__", []), where]
        _say_once(f"{command}: " + "\n".join(lines) + "\n")
        raise SystemExit(status) from None
    finally:
        # Lightning names the number of processes where it has started others: one that
        # is late must find that the error is shown.
        if starts_others and "WORLD_SIZE" not in os.environ:
            with suppress(OSError):
                Path(os.environ[SHOWN]).unlink()


def _one_line(error: Exception) -> str:
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of another process
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or 0)


def _is_launched() -> bool:
    """Whether torchrun or Slurm starts all processes, as those of one parent."""
    return "RANK" in os.environ or "SLURM_PROCID" in os.environ


def _temporary() -> str:
    # The variable, not tempfile, which fails where it finds no folder to write to.
    return os.environ.get("TMPDIR") or "/tmp"


def _say_once(text: str) -> None:
    """Prints an error, if no other process of the run on this machine has done so.

    Lightning starts the others as children of the first. It ends by itself then, and
    would be killed where a child ends before it.
    """
    parent, launched = os.getppid(), _is_launched()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    path = f"{_temporary()}/stellar-{os.getuid()}-{parent}-{attempt}"
    if not _is_shown(Path(path if launched else os.environ[SHOWN])):
        sys.stderr.write(text)
        sys.stderr.flush()  # a launcher ends this process when it ends another
    end = time.monotonic() + PATIENCE
    child = _rank() > 0 and not launched
    while child and os.getppid() == parent and time.monotonic() < end:
        time.sleep(0.1)


def _is_shown(marker: Path) -> bool:
    """Whether another process has made the file just now, which this one does else."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        is_old = time.time() - marker.stat().st_mtime > SAME_ERROR
        if is_old:  # of an earlier command
            os.utime(marker)
        return not is_old
    except OSError:  # rather twice than never
        pass
    return False


def _shortened(message: str, parser: Any) -> str:
    """What helps of the message of a parser."""
    names = [name for action in parser._actions for name in action.option_strings]
    patterns = {
        r"unrecognized arguments: ([^\s=]+)": "{}",
        r"Group '(.+?)' does not accept option '(.+?)'": "--{}.{}",
        r"Option '(.+?)' is not accepted": "--{}",
    }
    for pattern, form in patterns.items():
        if match := re.match(pattern, message):
            given = form.format(*match.groups())
            if not given.startswith("-"):
                return f"The argument '{given}' belongs to no option."
            return f"There is no option {given}.{did_you_mean(given, names)}"
    # An option with a short name is "-c/--config".
    if match := re.match(
        r"argument (?:-\w/)?(--[\w.-]+)(?: \S+)?: (.+)", message, re.I
    ):
        option, problem = match.groups()
        if problem == "expected one argument":
            return (
                f"{option} needs a value; one that begins with - is joined to it: "
                f"{option}=VALUE."
            )
        problem = re.sub(r"invalid (\w+) value: (.+)", r"expected \1, got \2", problem)
        return f"{option}: {problem}."
    if match := re.match(r'Parser key "(.+?)":', message):
        return f"--{match[1]}: {_expected(message[match.end() :])}"
    if match := re.match("the following arguments are required: (.+)", message):
        missing = match[1].split(", ")
        options = [f"--{x}" if f"--{x}" in names else x for x in missing]
        return f"Missing: {', '.join(options)}."
    return f"{message[0].upper()}{message[1:]}."


def _expected(text: str) -> str:
    """What jsonargparse says of a value, without the names of types."""
    problem = re.search(r"Option '(\w+)' is not accepted", text)
    if problem:
        return f"there is no option '{problem[1]}'."
    value = re.search(r"(?:Got value|Given value): (.*)", text)
    base = re.search(r"Subtypes: \[<class '(?:\w+\.)*(\w+)'>", text)
    if base and value and re.search(NO_CLASS, text):
        return (
            f"expected {base[1]}, or package.Class derived from it, got '{value[1]}'."
        )
    kinds = dict.fromkeys(
        re.findall(r"Expected an? (.+?)(?:\. Got value|$)", text, re.M)
    )
    if not kinds or not value:
        return " ".join(text.split())
    readable = [
        re.sub(r"(<class '(?:\w+\.)*(\w+)'>|typing\.)", r"\2", kind)
        .replace("NoneType", "null")
        .removeprefix("Literal")
        .strip("[]")
        for kind in kinds
    ]
    return f"expected {' or '.join(readable)}, got '{value[1]}'."
