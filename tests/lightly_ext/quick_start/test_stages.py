from __future__ import annotations

from pathlib import Path

import pytest

from lightly_ext.quick_start.stages import Progress
from stellar_cli.__main__ import main
from tests.lightly_ext.evaluate.small import write_images


class TestProgress:
    def test_start__same_try_that_was_stopped_goes_on(self, tmp_path: Path) -> None:
        first = Progress(tmp_path / "new", "a")
        first.start()
        first.finish("prior", 12.5)
        (tmp_path / "new" / "index.html").touch()
        (tmp_path / "new" / "prior" / "model").mkdir(parents=True)
        again = Progress(tmp_path / "new", "a")
        again.start()
        assert again.seconds == {"prior": 12.5}
        assert not (tmp_path / "new" / "index.html").exists()
        (tmp_path / "new" / "prior" / "model").rmdir()  # by somebody
        gone = Progress(tmp_path / "new", "a")
        gone.start()
        assert gone.seconds == {}
        assert (tmp_path / "new" / "prior").is_dir()

    def test_start__another_or_a_finished_one_starts_anew(self, tmp_path: Path) -> None:
        first = Progress(tmp_path, "a")
        first.start()
        first.finish("prior", 1.0)
        other = Progress(tmp_path, "b")
        other.start()
        assert other.seconds == {}
        other.finish("prior", 1.0)
        other.complete()
        same = Progress(tmp_path, "b")
        same.start()
        assert same.seconds == {}

    def test_main__others_folders_stay(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "work"
        # Names that a try has for folders of its own.
        kept = [output / name / "mine.png" for name in ("photos", "stellar", "model")]
        for path in kept:
            path.parent.mkdir(parents=True)
            path.touch()
        photos = write_images(tmp_path / "data", 250)
        with pytest.raises(SystemExit) as ended:
            main(["try", str(photos), "--output", str(output)])
        assert ended.value.code == 1
        assert "not empty and not of a try" in capsys.readouterr().err
        assert all(path.is_file() for path in kept)
        names = {path.name for path in output.iterdir()}
        assert names == {"photos", "stellar", "model"}
