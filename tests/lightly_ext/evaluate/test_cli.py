from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lightly_ext.evaluate import cli, efficiency
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.session import Session

DOCS = Path(__file__).parents[3] / "docs"


def documented_commands() -> list[list[str]]:
    """Arguments of each `stellar ...` in the guide that names a model or results."""
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        shlex.split(line, comments=True)[1:]
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("stellar ") and "TASK" not in line and "--help" not in line
    ]
    return [line[1:] if line[0] == "evaluate" else line for line in lines]


class TestMain:
    @pytest.mark.parametrize(
        ("options", "untrained", "force"),
        [
            ([], False, False),
            (["--untrained", "--force"], True, True),
            (["--force", "--untrained", "true"], True, True),
            (["--untrained", "false", "--force=true"], False, True),
        ],
    )
    def test_main__switches_stand_alone_or_have_a_value(
        self,
        options: list[str],
        untrained: bool,
        force: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        given: dict[str, Any] = {}

        def run(session: Session, data: str, force: bool = False) -> None:
            given.update(data=data, force=force, untrained=session.untrained)

        monkeypatch.setattr(efficiency, "run_efficiency", run)
        places = ["--output", str(tmp_path), "--accelerator", "cpu"]
        main(["efficiency", "--model", "a", *options, *places, "--data", "b"])
        assert given == {"data": "b", "force": force, "untrained": untrained}

    @pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
    def test_main__documented_commands_are_understood(
        self, command: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module_name, name, _ = cli.TASKS[command[0]]
        module = importlib.import_module(f"lightly_ext.evaluate.{module_name}")
        calls = []

        @functools.wraps(getattr(module, name))
        def run(**kwargs: Any) -> None:
            calls.append(kwargs)

        @functools.wraps(Session.__init__)
        def begin(self: Session, **kwargs: Any) -> None:
            """Starts no devices."""

        monkeypatch.setattr(module, name, run)
        monkeypatch.setattr(Session, "__init__", begin)
        main(command)
        assert len(calls) == 1
        if command[0] == "rank":
            assert calls[0]["others"] == ["stellar-b16", "stellar-b24"]

    def test_main__names_the_tasks(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["unknown"])
        said = capsys.readouterr().out
        assert all(f"  {task} " in said for task in cli.TASKS)
