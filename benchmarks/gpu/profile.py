"""Where the time of a step goes: by part, and by kernel."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measure import Mark
from benchmarks.step import Step

# Runtime calls that make the host wait, or may.
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
# The first kind of which a word is in the name: attention has "cutlass" in it, too.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "addmm", "aten::mm", "bmm"),
    "convolutions": ("conv", "cudnn"),
    "copies": ("memcpy", "memset", "aten::copy_"),
    "compiled by Inductor": ("triton",),
    "optimiser": ("multi_tensor", "adam"),
}


class Profile(NamedTuple):
    """What the profiler saw in a step, on average.

    Attributes:
        busy_ms: Milliseconds in which the device computes.
        kernels: Number of kernels.
        top: The longest: name, milliseconds, number.
        kinds: Milliseconds by kind of kernel.
        waits: Runtime calls that make the host wait, and copies to the host.
    """

    busy_ms: float
    kernels: float
    top: list[tuple[str, float, float]]
    kinds: dict[str, float]
    waits: dict[str, float]


def profile_step(step: Callable[[], object], device: str, rounds: int = 2) -> Profile:
    """Profiles some steps; on a CPU its operations stand for kernels."""
    step()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(rounds):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    ms: dict[str, float] = defaultdict(float)
    number: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for name, milliseconds, on_device in _events(profiler, device):
        if on_device:
            ms[name] += milliseconds / rounds
            number[name] += 1
        if name in WAITS or "DtoH" in name:
            waits[name] += 1
    longest = sorted(ms, key=lambda name: -ms[name])
    kinds: dict[str, float] = defaultdict(float)
    for name in longest:
        kinds[_kind(name)] += ms[name]
    return Profile(
        sum(ms.values()),
        number.total() / rounds,
        [(name, ms[name], number[name] / rounds) for name in longest[:15]],
        dict(sorted(kinds.items(), key=lambda item: -item[1])),
        # One wait is the profiler's own, at its end.
        {name: count / rounds for name, count in waits.items()},
    )


def _events(profiler: Any, device: str) -> Iterator[tuple[str, float, bool]]:
    """Name, own milliseconds, and whether the device was at work."""
    for event in profiler.events():
        if device == "cpu":
            yield event.name, event.self_cpu_time_total / 1000, True
        elif event.device_type == DeviceType.CUDA:
            if not getattr(event, "is_user_annotation", False):
                yield event.name, event.time_range.elapsed_us() / 1000, True
        else:
            yield event.name, 0.0, False


def _kind(name: str) -> str:
    lower = name.lower()
    for kind, words in KINDS.items():
        if any(word in lower for word in words):
            return kind
    return "elementwise, norms, reductions"


def parts_of_step(step: Step, rounds: int) -> dict[str, float]:
    """Mean milliseconds of each part of a step, between marks in the device's work."""
    total: dict[str, float] = defaultdict(float)
    for _ in range(rounds):
        with _watched(step) as calls:
            start = Mark(step.device)
            loss = step.loss()
            forward = Mark(step.device)
            step.optimizer.zero_grad()
            loss.backward()
            backward = Mark(step.device)
            nn.utils.clip_grad_norm_(step.parameters, 3.0)
            clipped = Mark(step.device)
            step.optimizer.step()
            end = Mark(step.device)
        parts: dict[str, float] = defaultdict(float)
        for name, before, after in calls:
            parts[name] += after.ms_since(before)
        parts["losses, localization, masks"] = forward.ms_since(start) - sum(
            parts.values()
        )
        parts["backward"] = backward.ms_since(forward)
        parts["clipping"] = clipped.ms_since(backward)
        parts["AdamW"] = end.ms_since(clipped)
        for name, ms in parts.items():
            total[name] += ms / rounds
    return dict(total)


@contextmanager
def _watched(step: Step) -> Iterator[list[tuple[str, Mark, Mark]]]:
    """Marks before and after every call of the modules of a step."""
    module, calls = step.module, []
    open_calls: list[Mark] = []

    def before(_: nn.Module, __: Any) -> None:
        open_calls.append(Mark(step.device))

    def after(part: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        name = names[part]
        if part is module.model.encoder:
            name = f"encode {_pass_of(step, arguments)}"
        calls.append((name, open_calls.pop(), Mark(step.device)))

    names: dict[nn.Module | None, str] = {
        module.augment: "colours",
        module.model.encoder: "encode",
        module.model.decoder: "decode",
        module.sparse_head: "heads",
        module.cls_head: "heads",
    }
    watched = [part for part in names if part is not None]
    handles = [part.register_forward_pre_hook(before) for part in watched]
    handles += [part.register_forward_hook(after) for part in watched]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _pass_of(step: Step, arguments: tuple[Any, ...]) -> str:
    images: Tensor = arguments[0]
    if len(arguments) > 1 and arguments[1] is not None:
        return "masked"
    return "target" if images.shape[-1] == step.sizes.image else "local"
