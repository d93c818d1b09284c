"""The commands of docs/multi_node.md, on two machines and under Slurm."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.exact_resume import write_classes
from tests.pretraining import TINY_OPTIONS
from tests.two_machines import LINK, two_machines

ROOT = Path(__file__).parents[3]
SLURM = ROOT / "lightly_ext" / "recipes" / "slurm.sbatch"
PYTHON = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def options(folder: Path, output: str, batch_size: int) -> list[str]:
    views = {"global_crop_size": 32, "local_crop_size": 16}
    return [
        *TINY_OPTIONS,
        f"--data.path={folder / 'images'}",
        f"--data.transform={{class_path: STELLARTransform, init_args: {views}}}",
        f"--data.batch_size={batch_size}",
        "--data.num_workers=0",
        f"--output={folder / output}",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.max_steps=4",
        "--trainer.log_every_n_steps=1",
    ]


def losses(run: Path) -> list[float]:
    lines = (run / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss")
    return [float(x) for x in (line.split(",")[column] for line in lines[1:]) if x]


@pytest.mark.slow
def test_torchrun__two_machines_like_one_process(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", 16)
    one = [sys.executable, "-m", "stellar_cli", "pretrain"]
    alone = subprocess.Popen(
        [*one, *options(tmp_path, "one", 8)],
        cwd=ROOT,
        env={**os.environ, **PYTHON},
        stdout=subprocess.DEVNULL,
    )
    with two_machines(tmp_path) as machines, socket.create_server(("", 0)) as server:
        first, port = machines[0], server.getsockname()[1]
        server.close()
        started = []
        for number, machine in enumerate(machines):
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            launcher += ["--nnodes=2", "--nproc_per_node=2", f"--node_rank={number}"]
            launcher += [f"--master_addr={first.address}", f"--master_port={port}"]
            given = ["-m", "stellar_cli", "pretrain", *options(tmp_path, "four", 2)]
            given += ["--trainer.num_nodes=2", "--trainer.devices=2"]
            link = {"GLOO_SOCKET_IFNAME": LINK if machine.prefix else "lo"}
            started.append(machine.start([*launcher, *given], **PYTHON, **link))
        codes = [process.wait(150) for process in started]
        said = [(machine.folder / "output.txt").read_text() for machine in machines]
    assert codes == [0, 0], said
    assert alone.wait() == 0
    four, expected = tmp_path / "four", tmp_path / "one"
    assert len(losses(expected)) == 4
    assert losses(four) == pytest.approx(losses(expected), abs=1e-5, rel=1e-5)
    weights = [
        load_file(run / "model" / "model.safetensors") for run in (four, expected)
    ]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-5, rtol=1e-5)
    # The first process alone prints and writes, into the shared folder alone.
    assert ["Global batch 8" in text for text in said] == [True, False]
    assert "Step 4 of 4" in said[0] and "Step" not in said[1]
    for machine in machines:
        assert [path.name for path in machine.folder.iterdir()] == ["output.txt"]
    (session,) = json.loads((four / "run.json").read_text())["sessions"]
    assert session["device"].startswith("4 x cpu")
    if machines[0].prefix:
        assert session["host"] == ", ".join(m.folder.name for m in machines)
        (first_launch, second) = (four / ".launch").read_text().splitlines()
        assert machines[0].folder.name in first_launch
        assert machines[1].folder.name in second


class TestSlurm:
    def test_script__what_it_starts(self, tmp_path: Path) -> None:
        calls = tmp_path / "calls"
        srun = tmp_path / "srun"
        srun.write_text(
            f'#!/bin/sh\nenv > {calls}.env\nprintf "%s\\n" "$@" > {calls}\n'
        )
        srun.chmod(0o755)
        slurm = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
        slurm |= {"SLURM_CPUS_PER_TASK": "12", "SLURM_JOB_ID": "77"}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(SLURM), "--config", "vit_base", "--output", "a b"]
        subprocess.run(command, env={**os.environ, **slurm, "PATH": path}, check=True)
        started = calls.read_text().splitlines()
        assert started[: started.index("stellar")] == [
            "--cpus-per-task=12",
            "--kill-on-bad-exit=1",
        ]
        assert started[started.index("stellar") :] == [
            *("stellar", "pretrain", "--config", "vit_base", "--output", "a b"),
            *("--trainer.num_nodes", "2", "--trainer.devices", "8"),
        ]
        environment = Path(f"{calls}.env").read_text().splitlines()
        assert "OMP_NUM_THREADS=1" in environment

    def test_script__ends_as_the_run_does(self, tmp_path: Path) -> None:
        srun = tmp_path / "srun"
        srun.write_text("#!/bin/sh\nexit 138\n")
        srun.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        slurm = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
        environment = {**os.environ, **slurm, "PATH": path, "SLURM_CPUS_PER_TASK": "1"}
        result = subprocess.run(["bash", str(SLURM)], env=environment)
        assert result.returncode == 138

    def test_script__asks_for_signal_and_requeue(self) -> None:
        asked = dict(
            re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", SLURM.read_text(), re.M)
        )
        # To the tasks alone: a shell that gets SIGUSR1 ends, and so would the job.
        assert re.fullmatch(r"SIGUSR1@\d+", asked["signal"])
        assert "requeue" in asked and asked["open-mode"] == "append"
