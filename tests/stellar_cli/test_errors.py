from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import jsonargparse
import pytest

from stellar_cli import errors
from stellar_cli.errors import OptionError, did_you_mean, raise_errors, shown


def shown_for(error: Exception, debug: bool = False) -> None:
    with shown("stellar x", debug):
        raise error


class TestDidYouMean:
    @pytest.mark.parametrize(
        ("name", "question"),
        [("vit_bas", " Did you mean 'vit_base'?"), ("zzz", "")],
    )
    def test_did_you_mean(self, name: str, question: str) -> None:
        assert did_you_mean(name, ["vit_large", "vit_base"]) == question


class TestShown:
    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            (OptionError("No such thing."), 2, "`stellar x --help` lists the options."),
            (ValueError("No such thing."), 1, "`--debug` shows where it happened."),
            (OSError("No such\n  thing."), 1, "`--debug` shows where it happened."),
            (
                RuntimeError(
                    "Caught ValueError in DataLoader worker process 0.\n"
                    'Original Traceback (most recent call last):\n  File "a.py"\n'
                    "No such thing.\n"
                ),
                1,
                "`--debug` shows where it happened.",
            ),
        ],
    )
    def test_shown__errors_of_users(
        self,
        error: Exception,
        status: int,
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            shown_for(error)
        assert ended.value.code == status
        assert capsys.readouterr() == ("", f"stellar x: No such thing.\n{said}\n")
        with pytest.raises(type(error)):
            shown_for(error, debug=True)

    def test_shown__without_a_temporary_folder(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TMPDIR", "/nowhere")
        with pytest.raises(SystemExit):
            shown_for(ValueError("No such thing."))
        assert capsys.readouterr().err.startswith("stellar x: No such thing.")

    def test_shown__long_and_empty_messages(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for error in (ValueError("a" * 5000), ValueError()):
            with pytest.raises(SystemExit):
                shown_for(error)
        long, _, empty, _ = capsys.readouterr().err.splitlines()
        assert long == f"stellar x: {'a' * 1000} ..."
        assert empty == "stellar x: ValueError"

    @pytest.mark.parametrize(
        "error",
        [
            *(TypeError, KeyError, IndexError, AttributeError, AssertionError),
            *(NotImplementedError, RecursionError, ZeroDivisionError, NameError),
        ],
    )
    def test_shown__mistakes_in_the_code(
        self, error: type[Exception], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(error, match="inside"):
            shown_for(error("inside"))
        assert "please report" in capsys.readouterr().err

    def test_shown__notes(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = RuntimeError("Bad.")
        vars(error)["__notes__"] = ["Go on."]  # as add_note of Python 3.11 does
        with pytest.raises(SystemExit):
            shown_for(error)
        said = "stellar x: Bad.\nGo on.\n`--debug` shows where it happened.\n"
        assert capsys.readouterr().err == said

    def test_shown__ctrl_c(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended, shown("stellar x", debug=False):
            raise KeyboardInterrupt
        assert ended.value.code == 130
        assert capsys.readouterr().err == "\nstellar x: stopped.\n"

    def test_shown__one_message_of_all_processes(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(errors, "PATIENCE", 0.0)

        def of_another() -> None:
            with monkeypatch.context() as patch:
                patch.setenv("LOCAL_RANK", "1")
                with pytest.raises(SystemExit):
                    shown_for(ValueError("Bad there."))

        with shown("stellar x", debug=False):
            of_another()
            of_another()
            said = "stellar x: Bad there.\n"
            assert capsys.readouterr().err.startswith(said)
        with pytest.raises(SystemExit), shown("stellar x", debug=False):
            of_another()
            raise ValueError("Bad here, in consequence.")
        assert capsys.readouterr().err.count("Bad") == 1

    @pytest.mark.parametrize("launcher", ["RANK", "SLURM_PROCID"])
    def test_shown__one_message_of_all_that_a_launcher_starts(
        self,
        launcher: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        # torchrun and Slurm start them side by side: nothing is inherited.
        monkeypatch.delenv(errors.SHOWN, raising=False)
        monkeypatch.setenv("TMPDIR", str(tmp_path))

        def said(rank: int, attempt: int) -> int:
            monkeypatch.setenv(launcher, str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
            with pytest.raises(SystemExit):
                shown_for(ValueError("Bad."))
            return capsys.readouterr().err.count("Bad.")

        assert [said(rank, 0) for rank in (1, 0, 2)] == [1, 0, 0]
        assert [said(rank, 1) for rank in (0, 1)] == [1, 0]
        # Another command that the same parent starts later.
        first, _ = sorted(tmp_path.iterdir())
        os.utime(first, (0, 0))
        assert [said(rank, 0) for rank in (0, 1)] == [1, 0]

    def test_shown__a_process_that_is_late_says_nothing_again(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(errors.SHOWN, "")  # as before, afterwards
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("WORLD_SIZE", "2")  # Lightning has started another
        with pytest.raises(SystemExit):
            shown_for(ValueError("Bad."))
        assert capsys.readouterr().err.count("Bad.") == 1
        # The first one is gone by now; the variable is inherited.
        monkeypatch.setenv("LOCAL_RANK", "1")
        parents = iter([7, 1])
        monkeypatch.setattr("os.getppid", lambda: next(parents))
        with pytest.raises(SystemExit):
            shown_for(ValueError("Bad."))
        assert "Bad." not in capsys.readouterr().err

    def test_shown__a_process_lets_the_first_one_end_by_itself(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # Lightning kills all where another ends before it.
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setenv(errors.SHOWN, str(tmp_path / "shown"))
        parents, waits = iter([7, 7, 7, 1]), []
        monkeypatch.setattr("os.getppid", lambda: next(parents))
        monkeypatch.setattr("time.sleep", waits.append)
        with pytest.raises(SystemExit):
            shown_for(ValueError("Bad."))
        assert len(waits) == 2
        assert (tmp_path / "shown").exists()


@pytest.mark.parametrize("kind", [argparse.ArgumentParser, jsonargparse.ArgumentParser])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sise=1"], "There is no option --sise. Did you mean '--size'?"),
        (["--sise", "1"], "There is no option --sise. Did you mean '--size'?"),
        (["--size", "1", "a"], "The argument 'a' belongs to no option."),
        (
            ["--size"],
            "--size needs a value; one that begins with - is joined to it: "
            "--size=VALUE.",
        ),
        ([], "Missing: --size."),
        (["--size", "x"], "--size: expected int, got 'x'."),
        (
            ["--data.path"],
            "--data.path needs a value; one that begins with - is joined to it: "
            "--data.path=VALUE.",
        ),
        (
            ["--config"],
            "--config needs a value; one that begins with - is joined to it: "
            "--config=VALUE.",
        ),
    ],
)
def test_raise_errors(kind: type, arguments: list[str], said: str) -> None:
    parser = kind(prog="x", allow_abbrev=False)
    raise_errors(parser)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--data.path")
    parser.add_argument("-c", "--config")
    if kind is jsonargparse.ArgumentParser:
        parser = pickle.loads(pickle.dumps(parser))  # as for a process that is spawned
    # Unknown options are looked at after the required ones.
    known = ["--size=2"] if said.startswith("There is no") else []
    with pytest.raises(OptionError) as error:
        parser.parse_args([*known, *arguments])
    assert str(error.value) == said
