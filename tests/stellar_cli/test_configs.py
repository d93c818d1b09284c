from __future__ import annotations

from pathlib import Path

import pytest

from stellar_cli import __main__ as cli

CONFIGS = Path(__file__).parents[2] / "mm_configs"


class TestConfigs:
    def test_list__one_line_each(self, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["configs"])
        lines = capsys.readouterr().out.splitlines()
        shown = dict(line.split(maxsplit=1) for line in lines)
        assert len(shown) == len(lines)
        assert shown.keys() == {path.stem for path in CONFIGS.glob("[!_]*.py")}
        purpose = "Linear probe of STELLAR-B on ADE20K, 150 classes"
        assert shown["stellar_ade20k"] == purpose
        assert shown["mae_voc_paper"] == "stellar_voc_paper.py with the ViT-B of MAE"

    @pytest.mark.parametrize("name", ["stellar_ade20k", "stellar_ade20k.py"])
    def test_name__the_file(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cli.main(["configs", name])
        assert capsys.readouterr().out == f"{CONFIGS / 'stellar_ade20k.py'}\n"

    def test_name__mistyped(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["configs", "stelar_ade20k"])
        assert ended.value.code == 2
        assert capsys.readouterr() == (
            "",
            "stellar configs: There is no config 'stelar_ade20k'. Did you mean "
            "'stellar_ade20k'? `stellar configs` lists them.\n"
            "`stellar configs --help` lists the options.\n",
        )
