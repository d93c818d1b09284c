from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightly_ext.evaluate import cli, efficiency
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.session import Session


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

    def test_main__names_the_tasks(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["unknown"])
        said = capsys.readouterr().out
        assert all(f"  {task} " in said for task in cli.TASKS)
