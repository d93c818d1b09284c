"""What does a step of STELLAR cost beside those of lightly's own methods?

One training step of each method on random images: forward, loss, backward, AdamW,
momentum teacher. All have the same ViT and images of the same size, and are timed in
turn in one process:

- STELLAR: a clean view, 8 masked views, 8 local crops, as `stellar pretrain` trains;
- DINO: 2 global and 8 local views, 65536 outputs, as lightly's benchmark of ViTs;
- CAPI: a view of which the student sees 35 %, 16384 clusters, a predictor of 12 blocks,
  as lightly's example, but with the defaults of its modules.

    python -m benchmarks.lightly_steps --batch-size 4
    python -m benchmarks.lightly_steps --device cuda --bf16 --batch-size 64 --rounds 10
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightly.loss import CAPILoss, DINOLoss
from lightly.models.modules import (
    CAPIPredictorTIMM,
    CAPIProjectionHead,
    DINOProjectionHead,
    MaskedVisionTransformerTIMM,
)
from lightly.models.utils import (
    deactivate_requires_grad,
    random_inverse_block_mask,
    update_momentum,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.gpu.measure import Mark
from benchmarks.gpu.sizes import TINY
from benchmarks.step import BASE, Sizes, Step

GLOBAL_VIEWS, LOCAL_VIEWS = 2, 8
MASK_RATIO = 0.65
MOMENTUM = 0.996


class Tokens(NamedTuple):
    """Tokens that pass the encoder for an image, those of classes and queries too.

    Attributes:
        trained: With a gradient.
        forward: Of a teacher, without.
    """

    trained: int
    forward: int

    @property
    def work(self) -> float:
        """Tokens with a gradient of as much work, of which two thirds are backward."""
        return self.trained + self.forward / 3


class Row(NamedTuple):
    """What a method takes.

    Attributes:
        method: Its name.
        tokens: Tokens of an image.
        ms: Median milliseconds of a step, for an image.
        gib: Largest GiB of weights, optimizer and a step; on a CPU of the process.
    """

    method: str
    tokens: Tokens
    ms: float
    gib: float

    @property
    def us_per_token(self) -> float:
        """Microseconds for a token with a gradient."""
        return 1000 * self.ms / self.tokens.work


class DINO(nn.Module):
    """DINO of lightly's parts, as in its benchmark `vitb16/dino.py`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        outputs = 4 * sizes.prototypes  # 65536, the default
        arguments = {"input_dim": sizes.width, "output_dim": outputs}
        self.student = MaskedVisionTransformerTIMM(_vit(sizes))
        self.student_head = DINOProjectionHead(**arguments, norm_last_layer=False)
        self.teacher = copy.deepcopy(self.student)
        self.teacher_head = DINOProjectionHead(**arguments, norm_last_layer=False)
        self.criterion = DINOLoss(output_dim=outputs)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)

    @property
    def tokens(self) -> Tokens:
        """Of an image."""
        local = self.sizes.local_image // self.sizes.patch
        views = GLOBAL_VIEWS * (1 + self.sizes.grid**2)
        return Tokens(views + LOCAL_VIEWS * (1 + local**2), views)

    def images(self, batch_size: int, device: str) -> tuple[Tensor, ...]:
        """Normalised views, global ones first."""
        return (
            _images(GLOBAL_VIEWS * batch_size, self.sizes.image, device),
            _images(LOCAL_VIEWS * batch_size, self.sizes.local_image, device),
        )

    def loss(self, global_views: Tensor, local_views: Tensor) -> Tensor:
        """Also moves the teacher."""
        update_momentum(self.student, self.teacher, m=MOMENTUM)
        update_momentum(self.student_head, self.teacher_head, m=MOMENTUM)
        with torch.no_grad():
            taught = self.teacher_head(self.teacher(global_views))
        passes = (global_views, local_views)
        found = torch.cat([self.student_head(self.student(x)) for x in passes])
        views = GLOBAL_VIEWS + LOCAL_VIEWS
        return self.criterion(taught.chunk(GLOBAL_VIEWS), found.chunk(views))


class CAPI(nn.Module):
    """CAPI of lightly's parts, as in its example `pytorch/capi.py`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        clusters = {"input_dim": sizes.width, "num_clusters": sizes.prototypes}
        self.student = MaskedVisionTransformerTIMM(_vit(sizes))
        self.student_head = CAPIProjectionHead(**clusters, weight_norm=True)
        self.predictor = CAPIPredictorTIMM(
            sizes.width, sizes.grid, depth=sizes.depth, num_heads=sizes.heads
        )
        self.teacher = copy.deepcopy(self.student)
        self.teacher_head = CAPIProjectionHead(**clusters, bias=True)
        self.criterion = CAPILoss()
        deactivate_requires_grad(self.teacher)

    @property
    def tokens(self) -> Tokens:
        """Of an image; those that the predictor makes up are none of the encoder's."""
        patches = self.sizes.grid**2
        return Tokens(1 + patches - int(MASK_RATIO * patches), 1 + patches)

    def images(self, batch_size: int, device: str) -> tuple[Tensor, ...]:
        """Normalised images."""
        return (_images(batch_size, self.sizes.image, device),)

    def loss(self, images: Tensor) -> Tensor:
        """Of student and clusters; also moves the teacher."""
        update_momentum(self.student, self.teacher, m=MOMENTUM)
        kept, masked = random_inverse_block_mask(
            (len(images), self.student.sequence_length),
            mask_ratio=MASK_RATIO,
            device=images.device,
        )
        patches = masked - 1  # without the CLS token
        visible = self.student.encode(images, idx_keep=kept)[:, 1:]
        found = self.student_head(self.predictor(visible, kept[:, 1:] - 1, patches))
        with torch.no_grad():
            features = self.teacher.encode(images)
        taught = self.teacher_head(features)[:, 1:]
        loss = self.criterion(taught, found, teacher_index=patches)
        return loss + self.criterion(taught, taught)


LIGHTLY: dict[str, type[DINO] | type[CAPI]] = {"DINO": DINO, "CAPI": CAPI}
METHODS = ("STELLAR", *LIGHTLY)


class LightlyStep:
    """A training step of one of lightly's methods on random images.

    Args:
        method: The method.
        batch_size: Images in a batch.
        device: "cpu" or "cuda".
        bf16: Whether autocast computes in bfloat16.
    """

    def __init__(
        self, method: DINO | CAPI, batch_size: int, device: str, bf16: bool
    ) -> None:
        self.method = method.to(device)
        self.device, self.bf16 = device, bf16
        self.images = method.images(batch_size, device)
        trained = [p for p in method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def __call__(self) -> Tensor:
        """Runs the step and returns the loss."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.method.loss(*self.images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss


def make_step(
    name: str, sizes: Sizes, batch_size: int, device: str, bf16: bool
) -> Callable[[], Tensor]:
    """A step of "STELLAR", "DINO" or "CAPI"."""
    torch.manual_seed(0)
    if name == "STELLAR":
        return Step(sizes, batch_size, device, bf16)
    return LightlyStep(LIGHTLY[name](sizes), batch_size, device, bf16)


def method_tokens(name: str, sizes: Sizes) -> Tokens:
    """Tokens of an image of a method."""
    if name == "STELLAR":
        prefix = 1 + sizes.queries
        trained = sum(n * (prefix + k) for n, k in sizes.passes.values())
        return Tokens(trained, 0)
    with torch.device("meta"):
        return LIGHTLY[name](sizes).tokens


def measure(
    device: str, sizes: Sizes, batch_size: int, bf16: bool, rounds: int
) -> list[Row]:
    """Times the steps of all methods, in turn.

    Args:
        device:
            "cpu" or "cuda".
        sizes:
            Sizes of ViT, images and heads.
        batch_size:
            Images in a batch.
        bf16:
            Whether autocast computes in bfloat16.
        rounds:
            Number of timed steps of each method.
    """
    steps, peaks = {}, {}
    for name in METHODS:
        asked = (name, sizes, batch_size, device, bf16)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name] = make_step(*asked)
            steps[name]()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(process_gib, asked)
            steps[name] = make_step(*asked)
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, step in steps.items():
            start = Mark(device)
            step()
            times[name].append(Mark(device).ms_since(start))
    return [
        Row(
            name,
            method_tokens(name, sizes),
            statistics.median(times[name]) / batch_size,
            peaks[name],
        )
        for name in METHODS
    ]


def process_gib(
    name: str, sizes: Sizes, batch_size: int, device: str, bf16: bool
) -> float:
    """Largest GiB of a process that takes two steps of a method."""
    step = make_step(name, sizes, batch_size, device, bf16)
    for _ in range(2):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(rows: list[Row]) -> str:
    """Rows in Markdown."""
    lines = [
        "| method | tokens with gradient | of a teacher | ms per image | us per token "
        "| GiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.method} | {row.tokens.trained} | {row.tokens.forward} | {row.ms:.4g} "
        f"| {row.us_per_token:.4g} | {row.gib:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else BASE
    batch_size, bf16 = arguments.batch_size, arguments.bf16
    print(table(measure(arguments.device, sizes, batch_size, bf16, arguments.rounds)))


def _vit(sizes: Sizes) -> VisionTransformer:
    return VisionTransformer(
        img_size=sizes.image,
        patch_size=sizes.patch,
        num_classes=0,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        dynamic_img_size=True,
    )


def _images(number: int, side: int, device: str) -> Tensor:
    return torch.randn(number, 3, side, side, device=device)


if __name__ == "__main__":
    main()
