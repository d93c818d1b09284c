"""How long does an answer of a large index take, and is it the exact one?

Prints a Markdown table: seconds of the first answer of a process and of the following
ones, the share of the exact first ten that is found, memory and bytes per image. Run
with `python -m benchmarks.search ask --images 100000`.

The images are made up, but not at random: they show things of some thousand concepts,
as they go together in scenes, with noise of each image and of each token, and most of
an image is few tokens. Queries are other images of the same kind.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.metrics.late_interaction import maxsim
from lightly_ext.search import Entries, IndexCard, TokenIndex

NUM_TOKENS, DIM, GRID = 16, 768, (14, 14)
CONCEPTS, SCENES, CONCEPTS_OF_SCENE = 4000, 200, 40
IMAGE_NOISE, TOKEN_NOISE = 0.3, 0.6
ROWS = 4096
K = 10


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("benchmarks.search ask", description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the index here, or use it")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = options.folder or Path(folder, "index")
        if not path.exists():
            make_index(path, options.images)
        for name, value in measured(path, options.queries).items():
            print(f"| {name} | {value} |", flush=True)


def made_up(num: int, seed: int) -> Iterator[Entries]:
    """Images, some at a time."""
    world = torch.Generator().manual_seed(0)
    spectrum = (torch.arange(DIM) + 1.0).rsqrt()
    concepts = torch.randn(CONCEPTS, DIM, generator=world) * spectrum
    scenes = torch.randint(CONCEPTS, (SCENES, CONCEPTS_OF_SCENE), generator=world)
    draw = torch.Generator().manual_seed(seed)
    for start in range(0, num, ROWS):
        count = min(ROWS, num - start)
        scene = scenes[torch.randint(SCENES, (count,), generator=draw)]
        places = torch.randint(CONCEPTS_OF_SCENE, (count, NUM_TOKENS), generator=draw)
        tokens = concepts[scene.gather(1, places)]
        image = torch.randn(count, 1, DIM, generator=draw) * spectrum
        own = torch.randn(count, NUM_TOKENS, DIM, generator=draw) * spectrum
        tokens = tokens + IMAGE_NOISE * image + TOKEN_NOISE * own
        masses = torch.rand(count, NUM_TOKENS, generator=draw) ** 2
        masses = masses / masses.sum(dim=1, keepdim=True)
        maps = masses[..., None].expand(-1, -1, GRID[0] * GRID[1])
        yield Entries(
            [f"{start + i:07d}.jpg" for i in range(count)],
            F.normalize(tokens, dim=-1),
            masses,
            maps,
            tokens.mean(dim=1),
            tokens.mean(dim=1),
            torch.full((count, 2), 224),
            torch.zeros(count, 3, dtype=torch.int64),
            torch.zeros(count, 32, dtype=torch.uint8),
        )


def make_index(folder: Path, num: int) -> None:
    """Puts made-up images into an index."""
    card = IndexCard(NUM_TOKENS, DIM, DIM, GRID, 224, 224, {}, str(folder), {})
    index = TokenIndex.create(folder, card)
    for entries in made_up(num, seed=1):
        index.put(entries)
    index.tidy()


def measured(folder: Path, num_queries: int) -> dict[str, str]:
    """Asks the index, in the way of a process that stays."""
    (queries,) = made_up(num_queries, seed=2)
    before = held_memory()
    start = time.perf_counter()
    index = TokenIndex.open(folder)
    opened = time.perf_counter() - start
    times, found = [], []
    for tokens, weights in zip(queries.tokens, queries.masses, strict=True):
        start = time.perf_counter()
        found.append({one.file for one in index.search(tokens, K, weights)})
        times.append(time.perf_counter() - start)
    memory = held_memory() - before
    following = times[1:]
    asked = zip(queries.tokens, queries.masses, strict=True)
    exact = [exact_files(index, tokens, weights) for tokens, weights in asked]
    recall = [len(a & b) / len(b) for a, b in zip(found, exact, strict=True)]
    whole = zip(found, float_files(len(index), queries), strict=True)
    of_floats = [len(a & b) / len(b) for a, b in whole]
    return {
        "images": f"{len(index)}",
        "opening, s": f"{opened:.2f}",
        "first answer, s": f"{times[0]:.2f}",
        "following answers, median s": f"{statistics.median(following):.3f}",
        "following answers, worst s": f"{max(following):.3f}",
        f"recall@{K} of the exact answer": f"{statistics.mean(recall):.4f}",
        "worst of these": f"{min(recall):.2f}",
        f"recall@{K} of float32 tokens": f"{statistics.mean(of_floats):.4f}",
        "memory, MB": f"{memory / 1e6:.0f}",
        "memory, bytes per image": f"{memory / len(index):.0f}",
        "disk, bytes per image": f"{index.num_bytes / len(index):.0f}",
    }


def exact_files(index: TokenIndex, tokens: Tensor, weights: Tensor) -> set[str]:
    """Files of the exact first answers."""
    return {one.file for one in index.search(tokens, K, weights, candidates=None)}


def float_files(num: int, queries: Entries) -> list[set[str]]:
    """Files of the first answers by the tokens before they become bytes."""
    best: list[tuple[Tensor, list[str]]] = [(torch.empty(0), [])] * len(queries)
    for entries in made_up(num, seed=1):
        for i, (scores, files) in enumerate(best):
            tokens = F.normalize(queries.tokens[i], dim=-1)
            new = maxsim(tokens, queries.masses[i], entries.tokens)
            values, rows = torch.cat([scores, new]).topk(K)
            names = [*files, *entries.files]
            best[i] = values, [names[row] for row in rows]
    return [set(files) for _, files in best]


def held_memory() -> int:
    """Bytes that the process holds; Linux tells."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
