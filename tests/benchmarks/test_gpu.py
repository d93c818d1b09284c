from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call, patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.__main__ import PARTS, Part, _run_apart, main
from benchmarks.gpu.flops import (
    PEAK_BF16,
    block_flops_of_step,
    mfu,
    step_flops,
    total_flops,
)
from benchmarks.gpu.measure import host_syncs
from benchmarks.gpu.results import Report, Results
from benchmarks.gpu.sizes import TINY
from benchmarks.step import BASE, BareBlocks, Step
from tests.distributed import FORKSERVER, print_to

ROOT = Path(__file__).parents[2]
BATCH = 3


def counted(step: Any, *arguments: Any) -> int:
    """Operations by torch's own counter; it counts fused attention's scores twice."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(*arguments)
    return counter.get_total_flops()


class TestFlops:
    def test_total_flops__as_torch_counts(self) -> None:
        step = Step(TINY, BATCH, "cpu")
        # Ours beside the plain loss: q W, and the gradient of W.
        rows = BATCH * (TINY.queries + 1)
        contraction = 2 * 2 * rows * TINY.embedding * TINY.prototypes
        assert counted(step) == total_flops(TINY, BATCH) + contraction

    def test_block_flops_of_step__as_torch_counts(self) -> None:
        bare = BareBlocks(TINY, "cpu")
        assert counted(bare.step, BATCH) == block_flops_of_step(TINY, BATCH)

    def test_step_flops__stellar_b(self) -> None:
        flops = step_flops(BASE, 128)
        # ViT-B has 85 million weights in blocks: 6 operations for each and token, and
        # attention beside them.
        tokens = 128 * (213 + 8 * 56 + 8 * 53)
        products = 6 * 12 * 12 * 768**2 * tokens
        encoders = sum(v for k, v in flops.items() if k.startswith("encode"))
        assert products < encoders < 1.05 * products
        assert sum(flops.values()) == pytest.approx(76.37e12, rel=1e-3)

    def test_mfu__one_second_at_the_peak(self) -> None:
        assert mfu(PEAK_BF16, 1000) == pytest.approx(100)


class TestHostSyncs:
    def test_host_syncs__counts_by_line(self) -> None:
        values = torch.ones(3)
        with host_syncs("cpu") as found:
            values.sum().item()
            bool(values[0])
            values.tolist()
            values.cpu()
            values.numpy()
            values[values > 0]
            values.masked_fill(values > 0, 2.0)
            values[torch.arange(2)]
            torch.where(values > 0)
            values[values > 0] = values[0]
        assert sorted(found.values()) == [1] * 8
        assert all(line.startswith("tests/benchmarks/test_gpu.py:") for line in found)

    def test_host_syncs__none_in_a_step(self) -> None:
        step = Step(TINY, BATCH, "cpu")
        with host_syncs("cpu") as found:
            step()
        assert not found


class TestReport:
    def test_section__keeps_what_was_there(self, tmp_path: Path) -> None:
        report = Report(Results(tmp_path), "b")
        report.values(plain_ms=2.0)
        with report.section("compiled"):
            raise torch.OutOfMemoryError("no memory")
        report.values(later_ms=3.0)
        part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["b"]
        assert part["values"] == {"plain_ms": 2.0, "later_ms": 3.0}
        assert part["failures"] == {"compiled": "OutOfMemoryError: no memory"}
        assert "FAILED compiled" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_run__of_every_part(part: Part) -> None:
    assert callable(importlib.import_module(f"benchmarks.gpu.{part.module}").run)


class TestRunApart:
    @pytest.mark.parametrize(
        ("waits", "status"),
        [
            ([0, 0], "done"),
            ([3, 3], "ended with code 3"),
            ([subprocess.TimeoutExpired("", 1), -9], "out of time"),
        ],
    )
    def test_run_apart__how_it_ended(
        self,
        waits: list[Any],
        status: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        process, killed = Mock(pid=17, wait=Mock(side_effect=waits)), []
        monkeypatch.setattr(subprocess, "Popen", Mock(return_value=process))
        monkeypatch.setattr(os, "killpg", lambda *args: killed.append(args))
        results = Results(tmp_path)
        _run_apart("c", "cuda", results, time.monotonic() + 1000)
        part = results.read()["parts"]["c"]
        assert (part["status"], part["limit"]) == (status, PARTS["c"].limit)
        assert process.wait.call_args_list == [call(PARTS["c"].limit), call()]
        assert killed == [(17, signal.SIGKILL)]


def run_benchmark(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", f"--output={output}", *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(output)},
        capture_output=True,
        text=True,
    )


def forked(command: list[str], start_new_session: bool) -> Any:
    """In the place of `subprocess.Popen`: a fork, which need not import anything."""
    assert command[1:3] == ["-m", "benchmarks.gpu"] and start_new_session
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_part, args=(command[2:],))
    process.start()

    def wait(limit: float | None = None) -> int | None:
        process.join(limit)
        return process.exitcode

    return Mock(pid=process.pid, wait=wait)


def run_part(arguments: list[str]) -> None:
    os.setsid()
    sys.argv = arguments
    main()


def run_forked(arguments: list[str], log: Path) -> None:
    """Runs the benchmark in a process of its own, and its parts in forks of it."""
    print_to(log, log)
    for part in PARTS.values():
        importlib.import_module(f"benchmarks.gpu.{part.module}")
    sys.argv = ["benchmarks.gpu", *arguments]
    processes = Mock(Popen=forked, TimeoutExpired=subprocess.TimeoutExpired)
    with patch("benchmarks.gpu.__main__.subprocess", processes):
        main()


def check_step(parts: dict[str, Any]) -> None:
    step = parts["b"]["values"]
    assert step["host_syncs"] == 0
    assert step["graph_breaks"] == 0
    # The three passes of the encoder and the decoder.
    # Three passes of the encoder and the decoder; six operations of the colours, of
    # which some or all images are chosen.
    assert 4 + 6 <= step["graphs"] <= 4 + 2 * 6
    assert step["compiled_loss_difference"] < 1e-2
    for name in ("plain", "compiled"):
        ms = step[f"{name}_ms"]
        assert step[f"{name}_images_per_s"] == pytest.approx(4000 / ms)
        flops = ms / 1000 * step[f"{name}_mfu_percent"] / 100 * PEAK_BF16
        assert flops == pytest.approx(total_flops(TINY, 4))
        assert step[f"{name}_x_bare"] == pytest.approx(ms / step[f"bare_{name}_ms"])
        assert step[f"{name}_kernels"] > 1000
    assert step["teacher_ema_ms"] > 0
    shares = next(
        table["rows"]
        for table in parts["b"]["tables"]
        if table["title"].startswith("Parts of the plain step")
    )
    assert sum(row[2] for row in shares) == pytest.approx(100)
    assert [row[0] for row in shares][:3] == [
        "colours",
        "encode target",
        "encode masked",
    ]


def check_other_parts(parts: dict[str, Any]) -> None:
    values = {letter: part["values"] for letter, part in parts.items()}
    assert values["a"]["skipped"] + values["a"]["passed"] >= 5
    assert values["a"]["failed"] == 0
    for row in parts["c"]["tables"][0]["rows"]:
        assert row[-1] < 1e-5  # every form gives the same loss
    assert values["d"]["colours_ms"] > 0
    assert 0 < values["d"]["percent_of_plain_step"] < 100
    assert values["e"]["hungarian_ms"] > 0
    assert values["f"]["compiled_ms"] > 0
    assert values["g"]["features_images_per_s"] > 0
    assert values["g"]["knn_rows_at_once"] == 1024
    per_token = [row[4] for row in parts["i"]["tables"][0]["rows"]]
    assert len(per_token) == 3 and min(per_token) > 0
    trials = {row[0]: row[1:] for row in parts["j"]["tables"][0]["rows"]}
    assert all(trial[7] == 0 for trial in trials.values())  # graph breaks
    assert trials["as trained"][-1] == trials["whole passes"][-1] == 0
    assert 0 < trials["bf16 stream"][-1] < 1e-2
    training = values["h"]
    assert training["steps"] == 4
    assert 0 <= training["loader_wait_percent"] <= 100
    assert training["images_per_s"] == pytest.approx(4000 / training["step_ms"])


@pytest.mark.slow
class TestMain:
    # One test, for workers that share tests would each run the benchmark.
    def test_main__every_part(self, tmp_path: Path) -> None:
        output = tmp_path / "gpu"
        output.mkdir()
        arguments = ["--tiny", "--device=cpu", "--seconds=60", "--limit=1200"]
        arguments += [f"--parts={','.join(PARTS)}", f"--output={output}"]
        log = tmp_path / "log.txt"
        process = FORKSERVER.Process(target=run_forked, args=(arguments, log))
        process.start()
        process.join()
        said = log.read_text()
        assert process.exitcode == 0, said
        assert "real training with its loader | done" in said
        assert sorted(path.name for path in output.glob("gpu.*")) == [
            "gpu.json",
            "gpu.md",
        ]
        content = json.loads((output / "gpu.json").read_text())
        assert content["machine"]["device"] == "CPU"
        parts = dict(content["parts"])
        assert "".join(parts) == "bacdefghij"
        for part in parts.values():
            assert part["status"] == "done"
            assert part["headline"]
            assert "failures" not in part
            assert 0 < part["seconds"] < part["limit"]
        check_step(parts)
        check_other_parts(parts)

    def test_main__in_processes(self, tmp_path: Path) -> None:
        process = run_benchmark(tmp_path, "--tiny", "--device=cpu", "--parts=e")
        assert process.returncode == 0, process.stdout + process.stderr
        assert "clustering and matching | done" in process.stdout
        parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert list(parts) == ["e"]
        assert parts["e"]["values"]["hungarian_ms"] > 0

    def test_main__time_runs_out(self, tmp_path: Path) -> None:
        arguments = ("--tiny", "--device=cpu", "--parts=c,d", "--limit=4")
        process = run_benchmark(tmp_path, *arguments)
        assert process.returncode == 1
        parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert [parts[x]["status"] for x in "cd"] == ["no time left"] * 2
