"""The blocks of README and docs, the examples of docstrings, and what is in them."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("stellar_plugin", "lightly_ext", "stellar_cli")
LANGUAGES = {
    **dict.fromkeys(("bash", "sh", "shell"), "bash"),
    **dict.fromkeys(("python", "py"), "python"),
    **{"yaml": "yaml", "ini": "ini", "json": "json", "text": "text"},
}
# Of MyST: content in a language, and what belongs to the site alone.
CODE_DIRECTIVE = re.compile(r"\{code(?:-block|-cell)?\}\s*(\w+)")
DIRECTIVE = re.compile(r"\{[\w:-]+\}")
# A block that is a file says so in its first line: "# NAME: what it is".
FILE = re.compile(r"# (\w+\.\w+)\b")
LOOSE = re.compile(r"(?: {4,}|\t+)(?:stellar|mim|python|pip|torchrun|make) \S")
FENCE = re.compile(r"(?P<indent>[ >]*)(?P<ticks>`{3,}|~{3,})(?P<info>[^`]*)")
PROMPT = re.compile(r"(?:>>>|\.\.\.)(?: |$)")
# A path in the place of a command, which bash would run; only its name is kept.
PATH_OF_COMMAND = re.compile(
    r"(?<!\\\n)(^|&& |; |\| )( *)[\w./-]*/(?=\w+(?:\s|$))", re.M
)
# Bash says what it would run, and its line, in place of running it: all is unknown to
# it, and restricted it takes no path. Of what commands print, others need paths of
# configs alone: "$(stellar configs NAME)".
RECORD = r"""
record() { local line=$1; shift; printf '%s\0' "$((line - OFFSET))" "$#" "$@" >&3; }
command_not_found_handle() {
    record "${BASH_LINENO[0]}" "$@"
    if [[ "$1 ${2-}" == 'stellar configs' ]]; then echo "$CONFIGS/${3-}.py"; fi
}
for name in cd source .; do
    eval "$name() { record \"\${BASH_LINENO[0]}\" $name \"\$@\"; }"
done
TEXT=$(</dev/stdin)
set -r
eval "$TEXT"
""".strip()


@dataclass(frozen=True)
class Snippet:
    """A block of a page, or the example of a docstring.

    Attributes:
        path:
            File that it is in.
        line:
            Number of the line before its first.
        language:
            One of the values of `LANGUAGES`, or what a page says that is none.
        text:
            Its content.
    """

    path: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """File and line, as editors open them."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """Name of the file that it is the content of."""
        named = FILE.match(self.text)
        return named[1] if named else None

    @property
    def code(self) -> str:
        """The content behind empty lines, so that errors name lines of the file."""
        return "\n" * self.line + self.text


@dataclass(frozen=True)
class Command:
    """What a shell would run.

    Attributes:
        snippet:
            The block that it is in.
        line:
            Its line in the file.
        words:
            Program and arguments.
    """

    snippet: Snippet
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """Words with one space between them, without quotes."""
        return " ".join(self.words)

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.snippet.path.relative_to(ROOT)}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def snippets_of(path: Path) -> list[Snippet]:
    """The fenced blocks of a page, also those in lists and quotes."""
    found, lines = [], iter(enumerate(path.read_text(encoding="utf-8").split("\n"), 1))
    for number, line in lines:
        if fence := FENCE.fullmatch(line):
            content = list(_until(fence, lines, f"{path}:{number}"))
            text = "".join(f"{line}\n" for line in content)
            found.append(Snippet(path, number, _language(fence["info"].strip()), text))
    return found


def commands_outside(path: Path) -> list[str]:
    """Places of indented lines outside of blocks that are commands."""
    lines = path.read_text(encoding="utf-8").split("\n")
    inside = {
        number
        for snippet in snippets_of(path)
        for number in range(snippet.line, snippet.line + snippet.text.count("\n") + 1)
    }
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for number, line in enumerate(lines, 1)
        if number not in inside and LOOSE.match(line)
    ]


def _until(
    fence: re.Match[str], lines: Iterable[tuple[int, str]], place: str
) -> Iterator[str]:
    for _, line in lines:
        line = line.removeprefix(fence["indent"])
        if re.fullmatch(rf"\s*{fence['ticks'][0]}{{{len(fence['ticks'])},}}\s*", line):
            return
        yield line
    raise AssertionError(f"{place}: a block without end")


def _language(info: str) -> str:
    if directive := CODE_DIRECTIVE.match(info):
        info = directive[1]
    elif DIRECTIVE.match(info):
        return "directive"
    word = info.split()[0] if info else ""
    return LANGUAGES.get(word, word)


def docstring_examples() -> list[Snippet]:
    """Lines behind `>>>` in docstrings, as lightly has them: each line has a prompt."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if ">>>" in text:
                found += _examples(path, ast.parse(text))
    return found


def _examples(path: Path, tree: ast.Module) -> Iterator[Snippet]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, kinds) or not (text := ast.get_docstring(node, False)):
            continue
        start = node.body[0].lineno
        lines = [line.strip() for line in text.split("\n")]
        marked = [i for i, line in enumerate(lines) if PROMPT.match(line)]
        if marked:
            first, last = marked[0], marked[-1]
            code = [PROMPT.sub("", line) for line in lines[first : last + 1]]
            kept = (
                code[i - first] if i in marked else "" for i in range(first, last + 1)
            )
            content = "".join(f"{line}\n" for line in kept)
            yield Snippet(path, start + first - 1, "python", content)


@cache
def commands_of(snippet: Snippet) -> tuple[Command, ...]:
    """What a shell would run of a block: loops unrolled, quotes and variables resolved.

    Args:
        snippet:
            Block in the language of shells.

    Raises:
        AssertionError: If the shell ends with an error.
    """
    with TemporaryDirectory() as folder, TemporaryFile() as record:
        script = f"exec 3>&{record.fileno()}\n{RECORD}"
        done = subprocess.run(
            ["/bin/bash", "-eu", "-c", script],
            input=PATH_OF_COMMAND.sub(r"\1\2", snippet.text),
            cwd=folder,
            env={
                "PATH": "/nowhere",
                "CONFIGS": str(ROOT / "mm_configs"),
                "OFFSET": str(script.count("\n")),
            },
            pass_fds=[record.fileno()],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{snippet.place}: {done.stderr}"
        record.seek(0)
        fields = iter(record.read().decode().split("\0")[:-1])
    return tuple(
        Command(snippet, snippet.line + int(line), tuple(islice(fields, int(number))))
        for line, number in zip(fields, fields, strict=True)
    )


def free_names(snippet: Snippet) -> set[str]:
    """Names that Python code reads and nothing in it makes."""

    def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        yield table
        for child in table.get_children():
            yield from tables(child)

    top = symtable.symtable(snippet.text, snippet.place, "exec")
    made = {
        s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()
    }
    read = {
        s.get_name()
        for table in tables(top)
        for s in table.get_symbols()
        if s.is_referenced() and (s.is_global() or table is top)
    }
    return read - made - set(dir(builtins)) - {"__name__", "__file__"}
