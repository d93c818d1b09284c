"""README and docs: every block is run as a reader would, or says why it is not.

`bash` and `python` are run page by page, in order, in a folder with small files under
the names of the docs (`snippets/files.py`); `yaml`, `ini` and `json` are read; `text`
is output and the like. Code makes or imports all its names. What commands need to be
small, and which are not run, is in `snippets/rules.py`. A block that begins with
"# NAME: what it is" is the content of that file, which commands find.
"""

from __future__ import annotations

import configparser
import json
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from tests.snippets.blocks import PAGES, Snippet, commands_of, free_names, snippets_of
from tests.snippets.files import write_files, write_hub
from tests.snippets.programs import check, run, stop_after_options
from tests.snippets.rules import APPENDED, FORMS, NOT_RUN, appended, reason_not_to_run

SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]
KINDS = ("bash", "python", "yaml", "ini", "json", "text", "directive")
Step = tuple[str, Callable[[], Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that commands run in, and the hub without network."""
    folder = tmp_path_factory.mktemp("snippets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / ".hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        write_hub(folder / ".hub")
        write_files(folder)
        for snippet in SNIPPETS:
            if snippet.file:
                (folder / snippet.file).write_text(snippet.text)
        yield folder


@pytest.fixture
def folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


def of(language: str) -> list[Any]:
    return [pytest.param(s, id=s.place) for s in SNIPPETS if s.language == language]


def test_every_block__has_a_language() -> None:
    wrong = [f"{s.place}: '{s.language}'" for s in SNIPPETS if s.language not in KINDS]
    assert not wrong, (
        "\n".join(["These blocks have no language that a test knows:", *wrong])
        + f"\nWrite one of {', '.join(KINDS[:-1])} behind the ```; `text` is not run."
    )


@pytest.mark.parametrize("snippet", of("bash"))
def test_bash__options_are_understood(
    snippet: Snippet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_options(monkeypatch)
    commands = [c for c in commands_of(snippet) if not re.fullmatch(FORMS, c.text)]
    fail_for([(str(c), lambda c=c: check(c.words)) for c in commands])


@pytest.mark.parametrize("snippet", of("python"))
def test_python__names_are_made_or_imported(snippet: Snippet) -> None:
    assert free_names(snippet) == set(), snippet.place


def test_rules__each_is_needed() -> None:
    bash = [s for s in SNIPPETS if s.language == "bash"]
    texts = [command.text for snippet in bash for command in commands_of(snippet)]
    run = [text for text in texts if not reason_not_to_run(text)]
    idle = [p for p in NOT_RUN if not any(re.fullmatch(p, t) for t in texts)]
    idle += [p for p, *_ in APPENDED if not any(re.match(p, t) for t in run)]
    assert not idle, "no command of README or docs is like these rules: remove them"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[:0], ids=lambda page: page.name)
def test_page__runs(page: Path, folder: Path) -> None:
    snippets = [s for s in SNIPPETS if s.path == page]
    fail_for([step for s in snippets for step in steps_of(s, folder)])


def fail_for(steps: list[Step]) -> None:
    """Takes all steps, then fails with the errors of all that failed."""
    errors = []
    for what, step in steps:
        try:
            step()
        except (Exception, SystemExit) as error:
            errors.append(f"{what}\n{''.join(traceback.format_exception(error)[-4:])}")
    assert not errors, "\n" + "\n".join(errors)


def steps_of(snippet: Snippet, folder: Path) -> list[Step]:
    """What there is to do of a block, each with its place."""
    if snippet.language == "bash":
        commands = [c for c in commands_of(snippet) if not reason_not_to_run(c.text)]
        return [
            (str(c), lambda c=c: run([*c.words, *appended(c.text)], folder))
            for c in commands
        ]
    read = READERS.get(snippet.language)
    return [(snippet.place, lambda: read(snippet))] if read else []


def run_python(snippet: Snippet) -> None:
    if re.search(r"^_base_ = ", snippet.text, re.MULTILINE):
        load_config(snippet.text)
    else:
        code = compile(snippet.code, snippet.place, "exec")
        exec(code, {"__name__": "__main__"})


def load_config(text: str) -> None:
    from mmengine.config import Config

    Path("config_of_a_page.py").write_text(text)
    Config.fromfile("config_of_a_page.py")


READERS: dict[str, Callable[[Snippet], Any]] = {
    "python": run_python,
    "yaml": lambda snippet: yaml.safe_load(snippet.text),
    "json": lambda snippet: json.loads(snippet.text),
    "ini": lambda snippet: configparser.ConfigParser().read_string(snippet.text),
}
