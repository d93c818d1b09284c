"""Every notebook, run as its reader runs it, but for less time."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import lightly_ext
from stellar_plugin import Stellar

FOLDER = Path(lightly_ext.__file__).parent / "examples" / "notebooks"
NAMES = ("evaluation", "lightly", "own_photos", "segmentation", "timm", "transformers")
# What is done less of, and what tests of its own run.
SHORTER = {
    "lightly": [("steps, history = 60, []", "steps, history = 2, []")],
    "own_photos": [("stellar try photos --minutes 10", "stellar try --help")],
    "segmentation": [
        ("max_iters=60, val_interval=60", "max_iters=2, val_interval=2"),
        ("iter_60.pth", "iter_2.pth"),
    ],
}
MAX_BYTES = 600_000


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def write_photos(folder: Path) -> None:
    """Forty photos of two colours, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 90, (80, 90, 3))
        pixels[..., number % 2] += 150
        file = folder / ("red", "green")[number % 2] / f"{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)


def write_model(folder: Path) -> None:
    """What `stellar try` leaves, one block deep."""
    torch.manual_seed(0)
    encoder = {"img_size": 128, "num_heads": 3}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    model = Stellar(
        "stellar_vit_tiny_patch16_224", num_queries=8, depth=1, **encoder, **decoder
    )
    model.save_pretrained(folder)


def test_all__are_known_here() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestNotebook:
    def test_stored__ran_to_its_end_and_is_small(self, name: str) -> None:
        assert (FOLDER / f"{name}.ipynb").stat().st_size < MAX_BYTES
        cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
        counts = [cell.execution_count for cell in cells]
        assert counts == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [x for x in outputs if x.output_type == "error"]
        # What was run shows something, and no folder of whoever ran it.
        assert outputs and "site-packages" not in json.dumps(outputs)
        for output in outputs:
            for picture in (output.get("data") or {}).get("image/jpeg", "").split():
                assert len(base64.b64decode(picture)) > 1000

    @pytest.mark.slow
    def test_run__as_its_reader_does(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_photos(tmp_path / "photos")
        write_model(tmp_path / "runs" / "try" / "model")
        notebook = read(name)
        for old, new in SHORTER.get(name, []):
            found = [cell for cell in notebook.cells if old in cell.source]
            assert found, f"{name}.ipynb has no {old!r} any more"
            for cell in found:
                cell.source = cell.source.replace(old, new)
        root = Path(lightly_ext.__file__).parents[1]
        monkeypatch.setenv("PYTHONPATH", str(root))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", programs)
        place = {"metadata": {"path": str(tmp_path)}}
        # Raises where a cell does.
        NotebookClient(notebook, timeout=300, resources=place).execute()
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert "Traceback" not in output.get("text", "")
