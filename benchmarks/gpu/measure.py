"""Times, memory and host synchronisations, on a GPU or, for trials, a CPU."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
# Not the place of a synchronisation, but what it goes through.
TORCH = str(Path(torch.__file__).parent)
THROUGH = (TORCH, warnings.__file__)
HERE = (__file__, torch.overrides.__file__, str(Path(TORCH, "_")))
OPTIMISERS = str(Path(TORCH, "optim"))
# What reads values on the CPU, on a GPU as well: seeds, draws of the colours, copies of
# what was found two steps ago.
CPU_ONLY = ("/randomness.py", "/transforms/color_", "/pretrain/nonfinite.py")


class Mark:
    """A point in the work of the device: a CUDA event, or the time on a CPU."""

    def __init__(self, device: str) -> None:
        self.event: Any = None
        self.time = 0.0
        if device == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.time = time.perf_counter()

    def ms_since(self, start: Mark) -> float:
        """Milliseconds from another mark to this one; waits for the device."""
        if self.event is None:
            return 1000 * (self.time - start.time)
        self.event.synchronize()
        ms: float = start.event.elapsed_time(self.event)
        return ms


def median_ms(
    function: Callable[[], object], device: str, rounds: int, warm_up: int = 2
) -> float:
    """Median milliseconds between the starts of calls that follow one another.

    The host runs ahead of the device, as in training.
    """
    for _ in range(warm_up):
        function()
    marks = [Mark(device)]
    for _ in range(rounds):
        function()
        marks.append(Mark(device))
    pairs = itertools.pairwise(marks)
    return statistics.median(after.ms_since(before) for before, after in pairs)


def extra_gib(function: Callable[[], object], device: str) -> float | None:
    """GiB that a call takes at its peak beyond what is there before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def peak_gib() -> float | None:
    """Largest GiB in use since the last `reset_peak_memory_stats`; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated() / 2**30


@contextlib.contextmanager
def host_syncs(device: str) -> Iterator[Counter[str]]:
    """Counts what makes the host wait for the device, by the line that does it.

    On a GPU, torch warns of it. On a CPU, operations are counted that would wait on a
    GPU.
    """
    found: Counter[str] = Counter()
    if device == "cpu":
        with _WouldWait(found), _WouldRead(found):
            yield found
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = partial(_count_sync, found)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _count_sync(found: Counter[str], message: object, *_: Any) -> None:
    if "synchronizing CUDA operation" in str(message):
        found[_place(traceback.extract_stack())] += 1


class _WouldWait(TorchDispatchMode):
    """Counts operations whose result, or whose size, the host has to wait for.

    A tensor made of Python numbers is copied to the device, for which the host waits.
    """

    NAMES = (
        *("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"),
        *("lift_fresh", "unique_dim", "unique_consecutive", "bincount"),
    )
    MASKED = ("index", "index_put", "index_put_", "_unsafe_index")

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked = name in self.MASKED and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in self.NAMES:
            _count_read(self.found)
        return func(*args, **(kwargs or {}))


class _WouldRead(TorchFunctionMode):
    """Counts what copies values to the host, which on a CPU is no operation."""

    NAMES = ("cpu", "tolist", "numpy", "__array__")

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            _count_read(self.found)
        return func(*args, **(kwargs or {}))


def _count_read(found: Counter[str]) -> None:
    stack = traceback.extract_stack()
    callers = [frame.filename for frame in stack]
    callers = [name for name in callers if not name.startswith(HERE)]
    if OPTIMISERS in callers[-1]:  # a GPU's keep their count of steps there
        return
    if not any(word in name for name in callers for word in CPU_ONLY):
        found[_place(stack)] += 1


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line outside torch and this file."""
    through = (*THROUGH, __file__)
    frame = next(f for f in reversed(stack) if not f.filename.startswith(through))
    # Path inside the project or, of a package, inside its place of installation.
    path = frame.filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
    return f"{path}:{frame.lineno} {frame.name}"


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def random_tokens(*shape: int, device: str) -> Tensor:
    """Random unit vectors, float32."""
    return torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=-1)


def copy_rate(device: str, tiny: bool) -> float:
    """GB/s of a copy in the device's memory, bytes read and written."""
    source = torch.empty(2**20 if tiny else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device, 5)
    return 2 * source.numel() / ms / 1e6


def product_rate(device: str, tiny: bool) -> float:
    """TFLOP/s of a large bf16 matrix product on random numbers."""
    size = 256 if tiny else 8192
    x = torch.randn(size, size, device=device).bfloat16()
    ms = median_ms(lambda: x @ x, device, 10)
    return 2 * size**3 / ms / 1e9
