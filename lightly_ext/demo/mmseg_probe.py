"""The real thing, small: mmsegmentation's linear probe on the exported boards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import mm_configs

CONFIG = "stellar_digit_boards"
LOG_NAME = "output.log"


def run_mmseg_probes(
    checkpoints: Mapping[str, Path],
    data_root: Path,
    work_dir: Path,
    options: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Trains one linear probe per checkpoint by `mim train mmseg`, all at once.

    Args:
        checkpoints:
            Folders that `Stellar.save_pretrained` wrote, by name.
        data_root:
            Segmentation set in ADE20K's layout.
        work_dir:
            Each probe works in the subfolder of its name, which is replaced.
        options:
            More overrides of the config, as for --cfg-options.

    Returns:
        mIoU of mmsegmentation's `IoUMetric` on the validation part by name, in 0 to 1.

    Raises:
        RuntimeError: If a probe fails.
    """
    processes = {}
    for name, checkpoint in checkpoints.items():
        shutil.rmtree(work_dir / name, ignore_errors=True)
        (work_dir / name).mkdir(parents=True)
        command = probe_command(checkpoint, data_root, work_dir / name, options or {})
        processes[name] = _start(command, work_dir / name / LOG_NAME)
    for process in processes.values():
        process.wait()
    for name, process in processes.items():
        if process.returncode:
            log = (work_dir / name / LOG_NAME).read_text()
            raise RuntimeError(
                f"The mmseg probe '{name}' failed with exit status "
                f"{process.returncode}; the end of its output:\n{log[-2000:]}"
            )
    return {name: read_miou(work_dir / name) for name in checkpoints}


def probe_command(
    checkpoint: Path, data_root: Path, work_dir: Path, options: Mapping[str, object]
) -> list[str]:
    """The command line of one probe, as a user would type it."""
    overrides: dict[str, object] = {
        f"{split}_dataloader.dataset.data_root": data_root.resolve()
        for split in ("train", "val", "test")
    }
    overrides["model.backbone.init_cfg.checkpoint"] = checkpoint.resolve()
    overrides |= options
    return [
        *(find_mim(), "train", "mmseg", mm_configs.path(CONFIG)),
        *("--gpus", "0", "--work-dir", str(work_dir.resolve())),
        "--cfg-options",
        *(f"{key}={value}" for key, value in overrides.items()),
    ]


def read_miou(work_dir: Path) -> float:
    """Reads the last mIoU that mmengine logged.

    Args:
        work_dir:
            Working folder of a run.

    Returns:
        mIoU in 0 to 1.

    Raises:
        RuntimeError: If no mIoU was logged.
    """
    for path in sorted(work_dir.glob("*/vis_data/scalars.json"), reverse=True):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        values = [entry["mIoU"] for entry in entries if "mIoU" in entry]
        if values:
            return float(values[-1]) / 100
    raise RuntimeError(
        f"No mIoU in '{work_dir}/*/vis_data/scalars.json'; the probe ended before its "
        "validation."
    )


def find_mim() -> str:
    """Finds `mim`: beside this Python, or on the path.

    Raises:
        RuntimeError: If it is missing.
    """
    beside_python = Path(sys.executable).parent / "mim"
    mim = str(beside_python) if beside_python.is_file() else shutil.which("mim")
    if mim is None:
        raise RuntimeError(
            "The demo's segmentation probe needs `mim`; install it with "
            "`pip install 'stellar-plugin[mmseg]'`."
        )
    return mim


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    # Probes run side by side: one thread each keeps them out of each other's way.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
