from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import pytest
from rich.console import Console

from stellar_cli import __main__ as cli
from stellar_cli.tasks import TASKS

# What takes seconds to import, and what a bare installation does not have.
HEAVY = (
    *("torch", "torchvision", "timm", "jsonargparse", "stellar_plugin"),
    *("lightly", "lightly_ext", "pytorch_lightning", "torchmetrics"),
    *("mmseg", "mmcv", "mmengine", "sklearn", "matplotlib", "rich"),
)


def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where no other package can be imported."""
    # None in sys.modules: not installed.
    body = (
        f"import sys\nsys.modules.update(dict.fromkeys({HEAVY!r}))\n"
        f"from stellar_cli.__main__ import main\nmain({list(arguments)!r})"
    )
    return subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)


class TestMain:
    @pytest.mark.parametrize(
        "arguments, code",
        [
            (["--help"], 0),
            ([], 2),
            (["--version"], 0),
            (["evaluate", "--help"], 0),
            (["evaluate"], 2),
            (["pretrain", "--help"], 0),
            (["pretrain", "--config", "a", "-h"], 0),
        ],
    )
    def test_main__helps_without_the_packages(
        self, arguments: list[str], code: int
    ) -> None:
        result = run_bare(*arguments)
        assert result.returncode == code, result.stderr
        said = result.stdout + result.stderr
        first = "stellar-plugin" if arguments == ["--version"] else "usage: stellar"
        assert first in said and "Traceback" not in said

    def test_main__help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        for name, (_, _, purpose) in cli.COMMANDS.items():
            assert f"  {name:12}{purpose}\n" in said

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (
                ["pretrian", "--help"],
                "stellar: There is no command 'pretrian'. Did you mean 'pretrain'?\n"
                "`stellar --help` lists the options.\n",
            ),
            (
                ["concepts", "--model", "a"],
                "stellar: There is no command 'concepts'. Did you mean 'atlas'?\n"
                "`stellar --help` lists the options.\n",
            ),
            (
                ["retrieval", "--model", "a"],
                "stellar: There is no command 'retrieval'. "
                "Did you mean 'evaluate retrieval'?\n"
                "`stellar --help` lists the options.\n",
            ),
            (
                ["knnn", "--model", "a"],
                "stellar: There is no command 'knnn'. Did you mean 'evaluate knn'?\n"
                "`stellar --help` lists the options.\n",
            ),
            (
                ["evaluate", "knnn", "--model", "a"],
                "stellar evaluate: There is no task 'knnn'. Did you mean 'knn'?\n"
                "`stellar evaluate --help` lists the options.\n",
            ),
            (
                ["evaluate", "xyz"],
                "stellar evaluate: There is no task 'xyz'.\n"
                "`stellar evaluate --help` lists the options.\n",
            ),
        ],
    )
    def test_main__mistyped(
        self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr() == ("", said)

    @pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
    def test_main__tasks_of_evaluate(
        self, argv: list[str], code: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", *argv])
        assert ended.value.code == code
        said = capsys.readouterr()
        assert said.out.startswith("usage: stellar evaluate TASK --model SOURCE ...")
        lines = said.out.splitlines()
        purposes = [
            next(line for line in lines if line.startswith(f"  {task} ")).index(what)
            for task, (_, what) in TASKS.items()
        ]
        assert set(purposes) == {2 + len("unsupervised-segmentation") + 1}
        assert "`stellar evaluate TASK --help` lists the options" in said.out
        assert said.err == ""

    @pytest.mark.parametrize(
        "arguments, module, passed_on",
        [
            (["pretrain", "--config", "a"], "pretrain", [["--config", "a"]]),
            (["evaluate", "knn", "--data", "a"], "evaluate", [["knn", "--data", "a"]]),
            (["report", "runs"], "evaluate", [["report", "runs"], "stellar report"]),
            (["pretrain", "--help-all"], "pretrain", [["--help"]]),
            (["pretrain", "--debug", "--help_all"], "pretrain", [["--help"]]),
        ],
    )
    def test_main__passes_arguments_on(
        self,
        arguments: list[str],
        module: str,
        passed_on: list[object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        given: list[tuple[str, list[object]]] = []

        def imported(name: str) -> Mock:
            return Mock(main=lambda *passed: given.append((name, [*passed])))

        monkeypatch.setattr(cli.importlib, "import_module", imported)
        cli.main(arguments)
        assert given == [(f"lightly_ext.{module}.cli", passed_on)]

    @pytest.mark.parametrize(
        "command, extra", [("pretrain", "pretrain"), ("report", "eval")]
    )
    def test_main__names_the_missing_extra(
        self, command: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str) -> None:
            raise ModuleNotFoundError(name="pytorch_lightning")

        monkeypatch.setattr(cli.importlib, "import_module", refuse)
        with pytest.raises(SystemExit, match=rf"stellar-plugin\[{extra}\]"):
            cli.main([command])


def test_main__no_bars_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As notebooks set it for the commands of their cells.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")  # and as it was before, afterwards
    monkeypatch.delenv("TTY_INTERACTIVE")
    assert Console().is_interactive
    cli.main(["configs"])
    assert Console().is_terminal and not Console().is_interactive
