"""The same commands with the stock OpenMMLab packages, in an environment of their own.

The environment is made once and kept in pytest's cache (.pytest_cache); making it needs
the package index. Without it this test fails: it never skips.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import pytest
from filelock import FileLock

from tests.stellar_plugin.mmseg.mmseg_sets import (
    REPOSITORY,
    WRITERS,
    mim,
    run,
    tiny_options,
    train_resume_test,
    write_checkpoint,
)

CONSTRAINTS = Path(__file__).with_name("stock-constraints.txt")
QUICK_TESTS = ("stellar_plugin/mmseg", "mm_configs")
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(request: pytest.FixtureRequest) -> Path:
    """The bin folder of the stock environment."""
    shared = shared_entries()
    listing = "\n".join([CONSTRAINTS.read_text(), *(str(path) for path in shared)])
    key = hashlib.sha256(listing.encode()).hexdigest()[:12]
    env = request.config.cache.mkdir("stock-openmmlab") / key
    with FileLock(f"{env}.lock"):  # tests run in several processes
        if not (env / "complete").exists():
            shutil.rmtree(env, ignore_errors=True)
            make_environment(env, shared)
            (env / "complete").touch()
    return env / "bin"


def pinned() -> list[str]:
    lines = CONSTRAINTS.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def shared_entries() -> list[Path]:
    """What the tests' own site-packages hold, less the fork and what is pinned."""
    own = {pin.split("==")[0] for pin in pinned()}
    hidden = {"__pycache__"}
    for distribution in distributions(path=[str(SITE_PACKAGES)]):
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if name in own or name.startswith("onedl-"):
            hidden |= {file.parts[0] for file in distribution.files or []}
    return sorted(
        path
        for path in SITE_PACKAGES.iterdir()
        if path.name not in hidden
        and path.suffix != ".pth"
        and not path.name.startswith("__editable__")
    )


def make_environment(env: Path, shared: list[Path]) -> None:
    """A virtual environment with the pinned packages and links to the shared ones.

    The links lie in a folder that a .pth file puts behind the environment's own
    packages: pip sees them as there, and would never uninstall them.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    links = env / "shared"
    links.mkdir()
    for path in shared:
        (links / path.name).symlink_to(path)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (env / "lib" / python / "site-packages/shared.pth").write_text(f"{links}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(env / "bin/python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "-r", str(CONSTRAINTS)], check=True
    )


def test_environment__pinned_versions_without_the_fork(
    stock: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(d.metadata['Name'].lower(), d.version)"
    )
    lines = run([stock / "python", "-c", code], tmp_path).splitlines()
    installed = dict(line.split() for line in lines)
    for name, version in (pin.split("==") for pin in pinned()):
        assert installed[name] == version
    assert not [name for name in installed if name.startswith("onedl")]


def test_mim__train_resume_test(stock: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "stellar")
    options = tiny_options(checkpoint, WRITERS["voc"](tmp_path / "data"))
    config = REPOSITORY / "mm_configs/stellar_voc.py"
    train_resume_test(partial(mim, stock / "mim"), config, options, tmp_path)


def test_quick_tests__pass_there_too(stock: Path, tmp_path: Path) -> None:
    """All quick tests of mmseg and of the configs, on the stock packages."""
    tests = [REPOSITORY / f"tests/{name}" for name in QUICK_TESTS]
    command = [stock / "python", "-m", "pytest", "-q", "-m", "not slow"]
    command += ["-c", REPOSITORY / "setup.cfg", "-p", "no:cacheprovider"]
    output = run([*command, *tests], tmp_path)
    assert " passed" in output
    assert " skipped" not in output
