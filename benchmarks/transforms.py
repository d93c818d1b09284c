"""How long do the views of one image take, beside torchvision's transforms?

Prints a Markdown table of milliseconds per image for decoding a photo, cutting 8 global
and 8 local views out of it, and colouring them. The rival is torchvision's v2, applied
view by view as usual. Run with `python benchmarks/transforms.py`.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2 as T

from lightly_ext.data import read_image
from lightly_ext.transforms import STELLARColorAugment, STELLARTransform

BICUBIC = T.InterpolationMode.BICUBIC


def photo(height: int = 375, width: int = 500) -> Tensor:
    """Returns a smooth picture with some noise, uint8 (3, height, width)."""
    smooth = T.functional.resize(torch.rand(3, 24, 32), [height, width])
    noisy = smooth * 255 + 8 * torch.randn(3, height, width)
    return noisy.clamp(0, 255).to(torch.uint8)


def compare(
    ours: Callable[[], object], rival: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Returns the fastest milliseconds of both: other programs only slow down."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, list_ in zip((ours, rival), times, strict=True):
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            list_.append(1000 * (time.perf_counter() - start))
    return min(times[0]), min(times[1])


def compare_decoding(rounds: int) -> tuple[float, float]:
    """Returns milliseconds of read_image and of Pillow for a JPEG photo."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        T.functional.to_pil_image(photo()).save(path, quality=90)

        def rival() -> Tensor:
            with Image.open(path) as image:
                return T.functional.pil_to_tensor(image.convert("RGB"))

        return compare(lambda: read_image(path), rival, rounds)


def compare_crops(rounds: int, as_pil: bool) -> tuple[float, float]:
    """Returns milliseconds of the 16 crops from a tensor or a PIL image."""
    image = T.functional.to_pil_image(photo()) if as_pil else photo()
    transform = STELLARTransform()
    crops = [
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
    return compare(
        lambda: transform(image), lambda: [crop(image) for crop in crops], rounds
    )


def compare_colours(
    rounds: int, batch: int, device: torch.device
) -> tuple[float, float]:
    """Returns milliseconds per image of colouring and normalising the 16 views."""
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
    parser.add_argument("--batch", type=int, default=4, help="images coloured at once")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu", help="where colours are changed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rounds = arguments.rounds
    rows = {
        "decode a JPEG of 500 x 375 pixels": compare_decoding(rounds),
        "8 + 8 crops of a uint8 tensor": compare_crops(rounds, as_pil=False),
        "8 + 8 crops of a PIL image": compare_crops(rounds, as_pil=True),
        f"colours of 8 + 8 views, {device.type}": compare_colours(
            rounds, arguments.batch, device
        ),
    }
    print(f"Fastest of {rounds} rounds on {machine(device)}.\n")
    print("| step | ours, ms per image | torchvision v2 / Pillow | ratio |")
    print("|---|---|---|---|")
    for name, (ours, rival) in rows.items():
        print(f"| {name} | {ours:.1f} | {rival:.1f} | {rival / ours:.1f} x |")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
