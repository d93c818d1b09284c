"""What a wheel holds, as setuptools would put it together."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[1]
PACKAGES = ("stellar_plugin", "lightly_ext", "stellar_cli", "mm_configs")


def test_wheel__has_every_file_of_the_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["setup.cfg"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    outputs = command.get_outputs(include_bytecode=False)
    built = {str(Path(output).relative_to(command.build_lib)) for output in outputs}
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.*")
        if "__pycache__" not in path.parts
    }
    assert built == files
    # Else the rest would hold of nothing.
    assert "mm_configs/_base_/backbones/mae.py" in files
    assert "lightly_ext/recipes/ablations/queries_8.yaml" in files
