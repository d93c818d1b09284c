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

EXAMPLES = Path(lightly_ext.__file__).parent / "examples"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        image = torch.randint(256, (3, 60 + i, 80), generator=generator)
        write_png(image.to(torch.uint8), str(folder / f"{i}.png"))
    return folder


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
    result = subprocess.run(
        [
            *(sys.executable, EXAMPLES / flavour / "stellar.py", images),
            *("--num_prototypes=8", *options, *extra),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    if flavour == "pytorch":
        loss = float(re.search(r"loss: ([\d.]+)", result.stdout).group(1))
        assert 0 < loss < 100
    model = Stellar.from_pretrained(tmp_path / "stellar")
    decoded = model.reconstruct(torch.zeros(1, 3, 32, 48))
    assert decoded.shape == (1, 3, 32, 48)


@pytest.mark.slow
def test_example__fewer_photos_than_a_batch(images: Path, tmp_path: Path) -> None:
    photo = tmp_path / "one"
    photo.mkdir()
    shutil.copy(images / "0.png", photo)
    result = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "pytorch" / "stellar.py", photo, "--epochs=1"),
            *("--num_workers=0", "--num_views=1", "--num_prototypes=8"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    loss = float(re.search(r"loss: ([\d.]+)", result.stdout).group(1))
    assert 0 < loss < 100


@pytest.mark.slow
def test_example__language_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / "language_model" / "stellar.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "tokens (2, 16, 192), geometry (2, 16, 5)" in result.stdout
    assert "prefix of the sentence: (2, 16, 96)" in result.stdout
    gradients = re.findall(r"gradient of the \w+: (\S+)", result.stdout)
    assert len(gradients) == 2 and all(float(g) > 0 for g in gradients)
    change = re.search(r"largest change in another order: (\S+)", result.stdout)
    assert change is not None and float(change.group(1)) < 1e-5
