"""README and docs: every block is run as a reader would, or says why it is not.

`bash` and `python` are run page by page, in order, in a folder with small files under
the names of the docs (`snippets/files.py`); `yaml`, `ini` and `json` are read; `text`
is output and the like. Code makes or imports all its names. What commands need to be
small, and which are not run, is in `snippets/rules.py`. A block that begins with
"# NAME: what it is" is the content of that file, which commands find.
"""

from __future__ import annotations

import configparser
import importlib
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

from lightly_ext.data.streams import find_source
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.transforms import STELLARTransform
from stellar_plugin import Stellar
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.snippets.blocks import (
    PAGES,
    ROOT,
    Snippet,
    commands_of,
    commands_outside,
    docstring_examples,
    free_names,
    snippets_of,
)
from tests.snippets.files import MODEL, SIDE, write_files, write_hub, write_sets
from tests.snippets.programs import check, run, stop_after_options
from tests.snippets.rules import (
    APPENDED,
    CODE_NOT_RUN,
    FORMS,
    NOT_RUN,
    reason_not_to_run,
    small,
)

SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]
KINDS = ("bash", "python", "yaml", "ini", "json", "text", "directive")
# Where docs say that known sets lie.
SETS_AT = {
    "datasets": "",
    "path/to/imagenet": "imagenet",
    "data/imagenet": "imagenet",
    "data/glas": "glas",
    "data/pets": "oxford-iiit-pet",
}
Step = tuple[str, Callable[[], Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What readers have before they begin, and the hub without network."""
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


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The known sets of classes."""
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


def of(language: str) -> list[Any]:
    return [pytest.param(s, id=s.place) for s in SNIPPETS if s.language == language]


def test_every_block__has_a_language() -> None:
    wrong = [f"{s.place}: '{s.language}'" for s in SNIPPETS if s.language not in KINDS]
    assert not wrong, (
        "\n".join(["These blocks have no language that a test knows:", *wrong])
        + f"\nWrite one of {', '.join(KINDS[:-1])} behind the ```; `text` is not run."
    )


def test_commands__stand_in_blocks() -> None:
    loose = [place for page in PAGES for place in commands_outside(page)]
    assert not loose, "commands in indented lines: put them between ```bash and ```"


@pytest.mark.parametrize("snippet", of("bash"))
def test_bash__options_are_understood(
    snippet: Snippet, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
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
    code = [*SNIPPETS, *docstring_examples()]
    lines = [line.strip() for snippet in code for line in snippet.text.splitlines()]
    idle += [p for p in CODE_NOT_RUN if not any(re.fullmatch(p, li) for li in lines)]
    assert not idle, "no command of README or docs is like these rules: remove them"


def copy_files(files: Path, folder: Path) -> None:
    """A copy for a page of its own, without the cache of the hub, which is large."""
    shutil.copytree(files, folder, symlinks=True, ignore=shutil.ignore_patterns(".hub"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page__runs(
    page: Path,
    files: Path,
    sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "reader"
    copy_files(files, folder)
    for name in SETS_AT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(sets / SETS_AT[name])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(reconstruction, "load_networks", tiny_networks)
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
        return [(str(c), lambda c=c: run(small(c.words), folder)) for c in commands]
    if is_left_out(snippet):
        return []
    read = READERS.get(snippet.language)
    return [(snippet.place, lambda: read(snippet))] if read else []


def is_left_out(snippet: Snippet) -> bool:
    """Whether a row of CODE_NOT_RUN is of this code."""
    lines = [line.strip() for line in snippet.text.splitlines()]
    return any(re.fullmatch(p, line) for p in CODE_NOT_RUN for line in lines)


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


def names_of_examples() -> dict[str, Any]:
    """What examples of docstrings leave out: imports, images, a model, its outputs."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE)
    model = Stellar(**MODEL)
    result = model(images)
    uint8 = (torch.rand(2, 8, 3, 224, 224) * 255).byte()
    unit = torch.nn.functional.normalize(torch.randn(2, 3, 4, 8), dim=-1)
    return {
        **{"torch": torch, "Image": Image, "STELLARTransform": STELLARTransform},
        "SOURCE": "runs/my_run/model",
        **{"find_source": find_source, "device": torch.device("cpu")},
        **{"image": Image.open("photo.jpg"), "images": images, "model": model},
        **{"lowrank": result.lowrank, "grid_size": result.grid_size},
        **{"tokens": torch.randn(2, 4, 768), "view_tokens": torch.randn(2, 3, 4, 768)},
        **{"embeddings": unit[:, 0], "view_embeddings": unit, "W": torch.randn(12, 8)},
        **{"cls": unit[:, 0, 0], "view_cls": unit[:, :, 0], "local_cls": unit[:, :, 1]},
        **{"W_cls": torch.randn(12, 8), "global_views": uint8},
        **{"local_views": uint8[..., :96, :96], "labels": torch.arange(64)},
        **{"features": torch.randn(64, 768), "decoded": images.flip(0)},
        **{
            "images_of_the_tokenizer": images,
            "networks": tiny_networks(Devices(accelerator="cpu")),
        },
    }


@pytest.mark.slow
def test_docstrings__examples_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_files(files, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    examples = [e for e in docstring_examples() if not is_left_out(e)]
    given = names_of_examples()

    def execute(example: Snippet) -> None:
        path = example.path.relative_to(ROOT).with_suffix("")
        module = importlib.import_module(".".join(path.parts))
        code = compile(example.code, example.place, "exec")
        exec(code, {**given, **vars(module)})

    fail_for([(e.place, partial(execute, e)) for e in examples])
