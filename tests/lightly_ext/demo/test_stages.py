from __future__ import annotations

from pathlib import Path

import pytest

from lightly_ext.demo.stages import start_output
from stellar_cli.__main__ import main


class TestStartOutput:
    def test_start_output__of_earlier_demos(self, tmp_path: Path) -> None:
        start_output(tmp_path / "new")
        (tmp_path / "new" / "photos").mkdir()  # of one that was stopped
        (tmp_path / "new" / "index.html").touch()
        start_output(tmp_path / "new")
        found = {path.name for path in (tmp_path / "new").iterdir()}
        assert found == {".stellar_demo", "photos"}

    def test_main__others_folders_stay(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "work"
        # Names that the demo has for folders of their own.
        kept = [output / name / "mine.png" for name in ("photos", "stellar", "ade20k")]
        for path in kept:
            path.parent.mkdir(parents=True)
            path.touch()
        with pytest.raises(SystemExit):
            main(["demo", "--output", str(output)])
        assert "not empty and not of a demo" in capsys.readouterr().err
        assert all(path.is_file() for path in kept)
        assert {path.name for path in output.iterdir()} == {
            "photos",
            "stellar",
            "ade20k",
        }
