"""Every example script, run as a user runs it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

import lightly_ext
from stellar_plugin import Stellar
from tests.distributed import run_script

EXAMPLES = Path(lightly_ext.__file__).parent / "examples"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        image = torch.randint(256, (3, 60 + i, 80), generator=generator)
        write_png(image.to(torch.uint8), str(folder / f"{i}.png"))
    return folder


def run_as_typed(script: Path, arguments: list[str], folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def loss_of(said: str) -> float:
    found = re.search(r"loss: ([\d.]+)", said)
    assert found is not None
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flavour, extra",
    [
        ("pytorch", []),
        ("pytorch_lightning", []),
        ("pytorch_lightning_distributed", ["--devices=2"]),
    ],
)
def test_example__trains_and_saves(
    flavour: str, extra: list[str], images: Path, tmp_path: Path
) -> None:
    options = ["--epochs=1", "--batch_size=2", "--num_workers=0", "--num_views=1"]
    script = EXAMPLES / flavour / "stellar.py"
    arguments = [str(images), "--num_prototypes=8", *options, *extra]
    if flavour == "pytorch_lightning_distributed":  # which starts itself anew
        run_as_typed(script, arguments, tmp_path)
    else:
        said = run_script(script, arguments, tmp_path)
    if flavour == "pytorch":
        assert 0 < loss_of(said) < 100
    model = Stellar.from_pretrained(tmp_path / "stellar")
    decoded = model.reconstruct(torch.zeros(1, 3, 32, 48))
    assert decoded.shape == (1, 3, 32, 48)


@pytest.mark.slow
def test_example__fewer_photos_than_a_batch(images: Path, tmp_path: Path) -> None:
    photo = tmp_path / "one"
    photo.mkdir()
    shutil.copy(images / "0.png", photo)
    arguments = [str(photo), "--epochs=1", "--num_workers=0", "--num_views=1"]
    script = EXAMPLES / "pytorch" / "stellar.py"
    said = run_script(script, [*arguments, "--num_prototypes=8"], tmp_path)
    assert 0 < loss_of(said) < 100


@pytest.mark.slow
def test_example__language_model(tmp_path: Path) -> None:
    said = run_script(EXAMPLES / "language_model" / "stellar.py", [], tmp_path)
    assert "tokens (2, 16, 192), geometry (2, 16, 5)" in said
    assert "prefix of the sentence: (2, 16, 96)" in said
    gradients = re.findall(r"gradient of the \w+: (\S+)", said)
    assert len(gradients) == 2 and all(float(g) > 0 for g in gradients)
    change = re.search(r"largest change in another order: (\S+)", said)
    assert change is not None and float(change.group(1)) < 1e-5
