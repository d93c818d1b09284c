"""Pages of the reference whose text is made from the code when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sphinx.application import Sphinx

import mm_configs
from _ext.options import commands_page, pretrain_page, tasks_page
from _ext.recipes import recipes_page
from lightly_ext.evaluate.report.protocol_cards import card_table, known_protocols
from lightly_ext.evaluate.result import markdown_table
from stellar_cli.tasks import TASKS


def protocols_page() -> str:
    """The card of every protocol."""
    return "\n".join(
        f"## {name}\n\n{card_table(protocol)}"
        for name, protocol in known_protocols().items()
    )


def configs_page() -> str:
    """What each config of mmsegmentation is for."""
    rows = [(f"`{name}`", mm_configs.purpose(name)) for name in mm_configs.names()]
    return markdown_table([("config", "what it is for"), *rows])


def evaluate_page() -> str:
    """The function behind each task of `stellar evaluate`."""
    functions = [
        f"lightly_ext.evaluate.{module}.run_{task.replace('-', '_')}"
        for task, (module, _) in TASKS.items()
    ]
    tasks = "\n".join(f".. autofunction:: {name}" for name in functions)
    return f"## Tasks\n\n```{{eval-rst}}\n{tasks}\n```\n"


PAGES: dict[str, Callable[[], str]] = {
    "api/options_pretrain": pretrain_page,
    "api/options_evaluate": tasks_page,
    "api/options": commands_page,
    "api/recipes": recipes_page,
    "api/mm_configs": configs_page,
    "api/protocol_cards": protocols_page,
    "api/evaluate": evaluate_page,
}


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Appends what is made from the code."""
    if docname in PAGES:
        source[0] += "\n" + PAGES[docname]()


def always_read(app: Sphinx, env: Any, *changed: Any) -> Iterable[str]:
    """Pages that follow the code, whose files do not change with it."""
    return [name for name in env.found_docs if name.startswith("api/")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers what fills the pages."""
    app.connect("source-read", fill)
    app.connect("env-get-outdated", always_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
