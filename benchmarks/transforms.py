"""How long do the views of one image take, beside Pillow and torchvision's transforms?

Prints a Markdown table of milliseconds of CPU time per image, for photos of several
sizes: decoding by each decoder that is installed, cutting 8 global and 8 local views,
both together from the file on, and, for a batch, collating and colouring the views. The
rival is torchvision's v2, applied view by view as usual; for decoding Pillow; for
collating PyTorch's own. Ours and the rival take turns. Run with
`python benchmarks/transforms.py`.
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2 as T

from lightly_ext.data import collate_views, read_image
from lightly_ext.data.jpeg import DECODERS, jpeg_decoder
from lightly_ext.transforms import STELLARColorAugment, STELLARTransform

BICUBIC = T.InterpolationMode.BICUBIC
SIZES = ("500x375", "1024x1024", "4000x3000", "64x64")

# The time of crops is that of their areas.
DRAWS = 8

Times = tuple[float, float]


def photo(height: int = 375, width: int = 500) -> Tensor:
    """Returns a smooth picture with some noise, uint8 (3, height, width)."""
    smooth = T.functional.resize(torch.rand(3, 24, 32), [height, width])
    noisy = smooth * 255 + 8 * torch.randn(3, height, width)
    return noisy.clamp(0, 255).to(torch.uint8)


def compare(
    ours: Callable[[], object],
    rival: Callable[[], object],
    rounds: int,
    device: torch.device | None = None,
    draws: int = 1,
) -> Times:
    """Returns the fewest milliseconds of both: other programs only slow down.

    Of the process, of all its threads; on another device than the CPU, of the clock.
    The mean of so many random draws, the same in every round.
    """
    on_cpu = device is None or device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for function, list_ in zip((ours, rival), times, strict=True):
            _synchronize(device)
            start = clock()
            for seed in range(draws):
                torch.default_generator.manual_seed(seed)
                function()
            _synchronize(device)
            list_.append(1000 * (clock() - start) / draws)
    return min(times[0][1:]), min(times[1][1:])  # without the first, which warms up


def compare_photo(width: int, height: int, rounds: int) -> dict[str, Times]:
    """Times of decoding a JPEG photo and of cutting its views, by what is done."""
    file = io.BytesIO()
    T.functional.to_pil_image(photo(height, width)).save(file, "JPEG", quality=90)
    data = file.getvalue()
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pillow = partial(_by_pillow, data)
    rows = {
        f"decode by {decoder}": compare(partial(decoder.decode, values), pillow, rounds)
        for decoder in DECODERS
        if decoder.decode is not None and decoder.works()
    }
    rows["read_image"] = compare(partial(read_image, data), pillow, rounds)
    image, transform, crops = read_image(data), STELLARTransform(), _rival_crops()
    rows["8 + 8 crops"] = compare(
        lambda: transform(image),
        lambda: [crop(image) for crop in crops],
        rounds,
        draws=DRAWS,
    )

    def usual() -> list[Tensor]:
        with Image.open(io.BytesIO(data)) as opened:
            pil = opened.convert("RGB")
        return [crop(pil) for crop in crops]

    rows["read_image and crops"] = compare(
        lambda: transform(read_image(data)), usual, rounds, draws=DRAWS
    )
    return {f"{width} x {height}: {name}": times for name, times in rows.items()}


def compare_collating(rounds: int, batch: int) -> Times:
    """Times per image of making a batch of views."""
    views = STELLARTransform()(photo())
    samples = [([view.clone() for view in views], index) for index in range(batch)]
    ours, rival = compare(
        lambda: collate_views(samples, 8), lambda: default_collate(samples), rounds
    )
    return ours / batch, rival / batch


def compare_colours(rounds: int, batch: int, device: torch.device) -> Times:
    """Times per image of colouring and normalising the 16 views."""
    shapes = [(batch, 8, 3, size, size) for size in (224, 96)]
    global_views, local_views = (
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for shape in shapes
    )
    augment = STELLARColorAugment().to(device)
    rival = T.Compose(
        [
            T.ToDtype(torch.float32, scale=True),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=0.5),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    views = [*global_views.flatten(0, 1), *local_views.flatten(0, 1)]
    times = compare(
        lambda: augment(global_views, local_views),
        lambda: [rival(view) for view in views],
        rounds,
        device,
    )
    return times[0] / batch, times[1] / batch


def machine(device: torch.device) -> str:
    """Returns what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1] for x in lines if x.startswith("model name")), cpu)
    name = cpu.strip()
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device)}"
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="of the photos")
    parser.add_argument("--batch", type=int, default=4, help="images coloured at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu", help="where colours are changed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rounds, batch = arguments.rounds, arguments.batch
    print(f"Fewest of {rounds} rounds on {machine(device)}; {jpeg_decoder()}.\n")
    print("| photo and step | ours, ms of CPU per image | rival | ratio |")
    print("|---|---|---|---|")
    for size in arguments.sizes:
        width, height = map(int, size.split("x"))
        for name, times in compare_photo(width, height, rounds).items():
            _print_row(name, times)
    _print_row("collate 8 + 8 views", compare_collating(rounds, batch))
    colours = compare_colours(rounds, batch, device)
    _print_row(f"colours of 8 + 8 views, {device.type}", colours)


def _rival_crops() -> list[T.Compose]:
    return [
        T.Compose(
            [
                T.RandomResizedCrop(size, scale=scale, interpolation=BICUBIC),
                T.RandomHorizontalFlip(),
                T.ToImage(),
            ]
        )
        for size, scale in ((224, (0.36, 1.0)), (96, (0.06, 0.36)))
        for _ in range(8)
    ]


def _by_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return T.functional.pil_to_tensor(image.convert("RGB"))


def _print_row(name: str, times: Times) -> None:
    ours, rival = times
    print(f"| {name} | {ours:.2f} | {rival:.2f} | {rival / ours:.1f} |", flush=True)


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
