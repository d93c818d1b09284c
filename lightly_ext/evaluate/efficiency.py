"""How long does each part take? The paper's Table 10, on the machine at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.benchmark import Timer

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.efficiency_parts import (
    Part,
    encoder_part,
    model_parts,
)
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.loading import load_stellar
from lightly_ext.evaluate.plots import save_line_plot
from lightly_ext.evaluate.result import Result, markdown_table
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin import Stellar
from stellar_plugin.checkpoints.files import TIMM_PREFIX
from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.protocols import (
    EFFICIENCY,
    EFFICIENCY_ENCODER,
    EfficiencyProtocol,
)

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class Time(NamedTuple):
    """Time of one part at one batch size.

    Attributes:
        median: Milliseconds.
        iqr: Interquartile range in milliseconds, None where it ran only once.
    """

    median: float
    iqr: float | None


Times = dict[str, dict[int, Time]]


def check_efficiency(
    results: Results, batch_sizes: Sequence[int], max_seconds: float
) -> None:
    """Checks the options; see `Results.required`."""
    if results.devices.world_size > 1:
        raise ValueError("Times are those of one device: leave --devices at 1.")
    if results.limit is not None:
        raise ValueError("Random images are timed: leave --limit out.")
    if results.sizes["resize"] is not None:
        raise ValueError(
            "Random images are timed, which nothing that --resize could change: name "
            "their side with --crop."
        )
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be 1 or more, got {list(batch_sizes)}.")
    if max_seconds <= 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds:g}.")


@evaluation
def run_efficiency(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64),
    memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    max_seconds: float = 10.0,
) -> Result:
    """Times the parts of STELLAR on random images, without gradients.

    Of any other model the encoder alone.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        batch_sizes:
            Numbers of images.
        memory_format:
            How images and convolution weights lie in memory.
        max_seconds:
            Longest time to measure a part at a batch size. A part stops, and says so,
            where one run alone is expected to take longer.

    Raises:
        ValueError: If an option is impossible, or a STELLAR model has no decoder.
    """
    results.required(check_efficiency)
    form = MEMORY_FORMATS[memory_format]
    stellar = _stellar(model)
    timed = stellar or model.backbone
    timed.to(memory_format=form)
    card = EFFICIENCY if stellar else EFFICIENCY_ENCODER
    protocol = _protocol(model, results, card, batch_sizes, memory_format)
    results.announce(model, protocol)
    side = protocol.crop
    times: Times = {}
    for batch_size in sorted(set(batch_sizes)):
        images = torch.randn(batch_size, 3, side, side, device=devices.device)
        images = images.contiguous(memory_format=form)
        parts = (
            model_parts(devices, stellar, images, form)
            if stellar
            else encoder_part(devices, model.backbone, images)
        )
        for name, part in parts.items():
            time_part(devices, times, name, part, batch_size, max_seconds)
    encoder = stellar.encoder if stellar else model.backbone
    result = results.result(
        model,
        "efficiency",
        protocol.data,
        protocol,
        _scores(times),
        {},
        num_tokens=stellar.encoder.num_queries if stellar else model.num_queries,
        num_parameters=sum(p.numel() for p in encoder.parameters()),
    )
    _write(devices, results, result, times)
    return result


def time_part(
    devices: Devices,
    times: Times,
    name: str,
    part: Part,
    batch_size: int,
    max_seconds: float,
) -> None:
    """Times a part and adds it to `times`, or says why not.

    Args:
        devices:
            Where it runs.
        times:
            What smaller batches took: tells what to expect.
        name:
            Name of the part.
        part:
            The part at this batch size.
        batch_size:
            Number of images.
        max_seconds:
            See `run_efficiency`.
    """
    known = times.setdefault(name, {})
    if known:
        last = max(known)
        expected = known[last].median / 1000 * batch_size / last
        if expected > max_seconds:
            devices.say(
                f"{name} at batch {batch_size} is left out: it would take about "
                f"{expected:.3g} s, more than max_seconds {max_seconds:g}."
            )
            return
    # Finding the number of runs also warms up; the timer waits for the GPU.
    timer = Timer("part()", globals={"part": part}, num_threads=torch.get_num_threads())
    measured = timer.adaptive_autorange(max_run_time=max_seconds)
    iqr = 1000 * measured.iqr if len(measured.times) > 1 else None
    known[batch_size] = Time(1000 * measured.median, iqr)


def _stellar(model: FrozenModel) -> Stellar | None:
    """The whole model, None if it is another one.

    Times need no weights, so the name of a ViT of timm will do.
    """
    source = model.origin.source
    is_vit = isinstance(model.backbone, StellarEncoder)
    if is_vit and model.origin.untrained and source.startswith(TIMM_PREFIX):
        stellar = Stellar(source.removeprefix(TIMM_PREFIX)).requires_grad_(False)
        return stellar.eval().to(model.mean.device)
    if not model.origin.is_stellar:
        return None
    stellar = load_stellar(model)
    if stellar.decoder is None:
        raise ValueError(f"'{source}' has no decoder that could be timed.")
    return stellar


def _protocol(
    model: FrozenModel,
    results: Results,
    card: EfficiencyProtocol,
    batch_sizes: Sequence[int],
    memory_format: str,
) -> EfficiencyProtocol:
    """The card with the machine on it, so that two machines never share a column."""
    device = results.devices.device
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return results.protocol(
        model,
        card,
        data=machine,
        batch_sizes=tuple(sorted(set(batch_sizes))),
        inference=f"without gradients, {results.devices.precision}, {memory_format}",
    )


def _cpu_name() -> str:
    """Name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else "CPU"


def _scores(times: Times) -> dict[str, Any]:
    """Times by part and batch size, and as multiples of the encoder's."""
    scores: dict[str, Any] = {}
    for name, known in times.items():
        scores[f"{name}_ms"] = {str(b): t.median for b, t in known.items()}
        scores[f"{name}_iqr_ms"] = {str(b): t.iqr for b, t in known.items()}
        ratios = _relative(times, name)
        scores[f"{name}_x_encoder"] = {str(b): r for b, r in ratios.items()}
    return scores


def _relative(times: Times, name: str) -> dict[int, float]:
    """A part as multiples of the encoder, because machines differ."""
    encoder = times["encoder"]
    return {
        b: t.median / encoder[b].median for b, t in times[name].items() if b in encoder
    }


def table_rows(times: Times) -> list[list[str]]:
    """Table 10 as text, the head first: median and IQR, then multiples of the encoder.

    Args:
        times:
            Times by part and batch size.
    """
    sizes = sorted({b for known in times.values() for b in known})
    rows = [["batch size", *map(str, sizes)]]
    for name, known in times.items():
        rows.append([f"{_words(name)}, ms", *(_shown(known.get(b)) for b in sizes)])
    for name in times:
        ratios = _relative(times, name)
        cells = [f"{ratios[b]:.3g}" if b in ratios else "-" for b in sizes]
        rows.append([f"{_words(name)}, x encoder", *cells])
    return rows


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(time: Time | None) -> str:
    if time is None:
        return "-"
    spread = "once" if time.iqr is None else f"{time.iqr:.3g}"
    return f"{time.median:.4g} ({spread})"


def _write(devices: Devices, results: Results, result: Result, times: Times) -> None:
    """Prints the table and writes it beside the result, with a plot."""
    rows = table_rows(times)
    title = f"Median (IQR), {result.data}"
    devices.say(title)
    folder = results.save(result, control=False, curves=rows)
    replace_text(folder / "efficiency.md", f"{title}\n\n{markdown_table(rows)}\n")
    medians = {
        _words(name): {float(b): time.median for b, time in known.items()}
        for name, known in times.items()
    }
    save_line_plot(
        folder / "efficiency.png",
        medians,
        "batch size",
        "median time, ms",
        title=result.data,
        log=True,
    )
