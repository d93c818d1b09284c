from __future__ import annotations

from pathlib import Path

import pytest

from stellar_cli.__main__ import main
from tests.lightly_ext.evaluate.small import write_images


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["x", "--minutes", "0"], 2, "--minutes must be above 0, got 0."),
        (["x", "--minutes", "inf"], 2, "must be above 0, got inf."),
        (["x", "--seed", "-1"], 2, "--seed must be in 0 to 2**32 - 1, got -1."),
        ([], 2, "Missing: FOLDER."),
        (["nowhere"], 1, "'nowhere' does not exist: name a folder of photos."),
        (["few"], 1, "`stellar visualize --model stellar-b16 --data few`"),
        (["few", "--output", "few/out"], 1, "lie in one another"),
    ],
)
def test_main__errors(
    arguments: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "few", 18, (8, 8))
    with pytest.raises(SystemExit) as ended:
        main(["try", *arguments])
    assert ended.value.code == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
