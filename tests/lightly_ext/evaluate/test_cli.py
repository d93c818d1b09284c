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
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.results import Results
from stellar_cli.errors import OptionError
from stellar_cli.tasks import TASKS
from tests.lightly_ext.evaluate.small import write_model

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
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        given: dict[str, Any] = {}

        def run(
            model: FrozenModel,
            devices: Devices,
            results: Results,
            data: str,
            force: bool = False,
        ) -> None:
            given.update(data=data, force=force, untrained=model.origin.untrained)

        monkeypatch.setattr(efficiency, "run_efficiency", run)
        monkeypatch.setattr(efficiency, "check_efficiency", lambda results: None)
        places = ["--output", str(tmp_path), "--accelerator", "cpu"]
        model = write_model(tmp_path / "model")
        main(["efficiency", "--model", model, *options, *places, "--data", "b"])
        assert given == {"data": "b", "force": force, "untrained": untrained}
        said = f"Model, {tmp_path.name}{' (untrained)' if untrained else ''}: "
        said += "features auto: sparse"
        if not untrained:
            said += "; read as: STELLAR in layout 'stellar'; told by: names of layout "
            said += "'stellar'"
        assert f"{said}.\n" in capsys.readouterr().out

    @pytest.mark.parametrize("command", documented_commands(), ids=" ".join)
    def test_main__documented_commands_are_understood(
        self, command: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module_name, _ = TASKS[command[0]]
        name = f"run_{command[0].replace('-', '_')}"
        module = importlib.import_module(f"lightly_ext.evaluate.{module_name}")
        calls = []

        @functools.wraps(getattr(module, name))
        def run(**kwargs: Any) -> None:
            calls.append(kwargs)

        monkeypatch.setattr(module, name, run)
        monkeypatch.setattr(cli, "_begin", lambda values, check: {})
        main(command)
        assert len(calls) == 1
        if command[0] == "rank":
            assert calls[0]["others"] == ["stellar-b16", "stellar-b24"]

    def test_main__help_of_a_task(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="0"):
            main(["knn", "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "--model MODEL What to evaluate: file, folder" in said
        assert "--neighbours NEIGHBOURS Number of training images that vote" in said

    @pytest.mark.parametrize(
        ("task", "extra"), [("knn", "eval"), ("align-text", "text")]
    )
    def test_main__missing_package(
        self, task: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def not_there(name: str) -> None:
            raise ModuleNotFoundError(f"No module named {name}", name="some.part")

        monkeypatch.setattr(importlib, "import_module", not_there)
        pattern = rf"{task}` needs the package 'some.part'.*'stellar-plugin\[{extra}\]'"
        with pytest.raises(SystemExit, match=pattern):
            main([task])

    def test_main__own_module_missing_is_no_missing_package(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(TASKS, "knn", ("gone", ""))
        with pytest.raises(ModuleNotFoundError, match=r"lightly_ext\.evaluate\.gone"):
            main(["knn"])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (["--data", "gone"], "^There is no folder 'gone'"),
            (["--data", "a", "--crop", "0"], "^crop must be at least 1, got 0"),
        ],
    )
    def test_main__errors_are_one_message(
        self, options: list[str], match: str, tmp_path: Path
    ) -> None:
        places = ["--output", str(tmp_path), "--accelerator", "cpu"]
        with pytest.raises((ValueError, OSError), match=match):
            main(["knn", "--model", "patches", *places, *options])

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--data", "a"], "^Missing: --model.$"),
            (["--model", "a"], "^Missing: --data.$"),
            (
                ["--model", "a", "--data", "b", "--neigbours", "1"],
                r"^There is no option --neigbours. Did you mean '--neighbours'\?$",
            ),
            (
                ["--model", "a", "--data", "b", "--neighbours", "x"],
                "^--neighbours: expected int, got 'x'.$",
            ),
        ],
    )
    def test_main__wrong_options(self, options: list[str], said: str) -> None:
        with pytest.raises(OptionError, match=said):
            main(["knn", *options])

    def test_main__no_option_at_all(self) -> None:
        with pytest.raises(OptionError, match=r"^Missing: results\.$"):
            main(["report"])
