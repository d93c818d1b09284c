"""What is built and installed: files, metadata, extras in bare environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from setuptools import Distribution

import stellar_plugin
from tests.bare import closure, link
from tests.bare_stages import STAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("stellar_plugin", "lightly_ext", "stellar_cli", "mm_configs")
# Of each kind of file beside the modules one.
WANTED = (
    "mm_configs/_base_/backbones/mae.py",
    "lightly_ext/recipes/photos.yaml",
    "lightly_ext/recipes/ablations/queries_8.yaml",
    "lightly_ext/recipes/slurm.sbatch",
    "lightly_ext/pretrain/run.html",
    "lightly_ext/examples/pytorch/stellar.py",
    "lightly_ext/py.typed",
    "stellar_plugin/py.typed",
)
LARGEST = 2_000_000  # bytes of a file
# What a checkout has beside the packages.
BESIDE = (
    *("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"),
    *("CHANGELOG.md", "CITATION.cff", "constraints.txt"),
)


def files_of_packages() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.*")
        if path.is_file() and "__pycache__" not in path.parts
    }


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
    files = files_of_packages()
    assert built == files
    # Else the rest would hold of nothing.
    assert files >= {*WANTED}


def test_version__is_the_same_everywhere() -> None:
    version = stellar_plugin.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [version]
    assert re.findall(r"^## (\S+)", changes, re.M)[0] == version


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sdist, the wheel that is built of it, and the wheel of a checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "fixtures", "_build")
    for name in (*PACKAGES, "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in BESIDE:
        shutil.copy(ROOT / name, source)
    for name, options in {"sdist": [], "checkout": ["--wheel"]}.items():
        subprocess.run(
            [
                *(sys.executable, "-m", "build", "--no-isolation", *options),
                *("--outdir", folder / name, source),
            ],
            check=True,
            capture_output=True,
        )
    return {
        "sdist": next((folder / "sdist").glob("*.tar.gz")),
        "wheel": next((folder / "sdist").glob("*.whl")),
        "checkout": next((folder / "checkout").glob("*.whl")),
    }


def content(wheel: Path) -> dict[str, int]:
    """Checksum of each file."""
    with zipfile.ZipFile(wheel) as archive:
        assert max(file.file_size for file in archive.infolist()) < LARGEST
        return {file.filename: file.CRC for file in archive.infolist()}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
def test_build__files(built: dict[str, Path]) -> None:
    files = content(built["wheel"])
    assert files == content(built["checkout"])
    assert {name for name in files if ".dist-info/" not in name} == files_of_packages()
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*BESIDE, *files_of_packages()}
    outside = {name.split("/")[0] for name in names} - {*BESIDE, *PACKAGES, ""}
    assert outside == {"PKG-INFO", "stellar_plugin.egg-info"}


@pytest.mark.slow
def test_build__metadata(built: dict[str, Path]) -> None:
    told = metadata(built["wheel"])
    assert told["Name"] == "stellar-plugin"
    assert told["Version"] == stellar_plugin.__version__
    assert told["Requires-Python"] == "<3.13,>=3.10"
    assert told["License-Expression"] == "MIT" or told["License"] == "MIT"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text()
    assert {*told.get_all("Provides-Extra", ())} == {*STAGES, "dev"} - {"core"}


@pytest.mark.slow
def test_extras__declare_what_they_need(built: dict[str, Path], tmp_path: Path) -> None:
    """Each extra runs where nothing can be imported but what it declares."""
    modules, work = tmp_path / "modules", tmp_path / "work"
    modules.mkdir()
    work.mkdir()
    installed = tmp_path / "installed"
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(installed)
    package = PathDistribution(next(installed.glob("*.dist-info")))
    declared: dict[str, set[str]] = {}
    for extra, (_, parent) in STAGES.items():
        there = declared.get(parent, set()) if parent else set()
        declared[extra] = there | closure(package, "" if extra == "core" else extra)
        link(declared[extra] - there, modules / extra)
    for path in installed.iterdir():
        (modules / "core" / path.name).symlink_to(path)
    result = subprocess.run(
        # Without the site-packages of this environment.
        [sys.executable, "-S", ROOT / "tests" / "bare_stages.py", modules],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for extra in STAGES:
        assert f"{extra}: runs\n" in result.stderr
