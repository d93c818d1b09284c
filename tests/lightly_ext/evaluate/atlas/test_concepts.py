from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.atlas import concepts as module
from lightly_ext.evaluate.atlas import part_table as table_module
from lightly_ext.evaluate.atlas.codes import Codes, found_share, part_codes
from lightly_ext.evaluate.atlas.concepts import (
    NO_CONCEPT,
    Concepts,
    cluster_concepts,
    prototype_concepts,
)
from lightly_ext.evaluate.atlas.k_means import k_means
from lightly_ext.evaluate.atlas.part_table import PartTable, quantised
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.parts import Parts
from lightly_ext.modules import STELLARProjectionHead


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0)


def _table(vectors: Tensor, maps: Tensor, names: list[str] | None = None) -> PartTable:
    """Parts of vectors (images, parts, dim) and maps (images, parts, patches)."""
    parts = Parts(vectors, maps, maps.mean(dim=2), (1, maps.shape[2]))
    stored = quantised(parts)
    return PartTable(
        ImageFiles(Path("photos"), names or [f"{i}.png" for i in range(len(maps))]),
        np.arange(len(maps)),
        stored["units"].numpy(),
        stored["norms"],
        stored["maps"].numpy(),
        stored["peaks"],
        stored["masses"],
        (1, maps.shape[2]),
    )


def _random_table(images: int = 37, parts: int = 3, dim: int = 8) -> PartTable:
    torch.manual_seed(0)
    maps = torch.randn(images, 6, parts).mul(2).softmax(dim=2).mT
    return _table(torch.randn(images, parts, dim), maps)


class TestPartTable:
    def test_quantised__error_bounds(self) -> None:
        torch.manual_seed(0)
        vectors, maps = 30 * torch.randn(4, 3, 8), torch.rand(4, 6, 3).softmax(dim=2).mT
        table = _table(vectors, maps)
        images = np.arange(4)
        units = F.normalize(vectors, dim=2)
        assert (table.units_of(images) - units).abs().max() <= 2**-10
        torch.testing.assert_close(table.norms, vectors.norm(dim=2))
        bound = table.peaks[..., None] / 255 / 2 + 1e-6
        assert ((table.maps_of(images) - maps).abs() <= bound).all()
        torch.testing.assert_close(table.masses.sum(dim=1), torch.ones(4))

    def test_present__half_a_patch(self) -> None:
        maps = torch.tensor([[[0.4, 0.09], [0.6, 0.91]], [[0.41, 0.09], [0.59, 0.91]]])
        assert _table(torch.ones(2, 2, 3), maps).present.tolist() == [
            [False, True],
            [True, True],
        ]


class TestKMeans:
    def test_k_means__directions_that_are_there(self) -> None:
        torch.manual_seed(0)
        true = torch.eye(4)[:3]
        points = F.normalize(
            true.repeat_interleave(20, 0) + 0.05 * torch.randn(60, 4), dim=1
        )
        centres = k_means(points, 3, seed=0)
        assert (centres @ true.mT).amax(dim=0).min() > 0.99
        means = F.normalize(points.view(3, 20, 4).mean(dim=1), dim=1)
        order = (means @ centres.mT).argmax(dim=1)
        torch.testing.assert_close(centres[order], means)

    def test_k_means__fewer_points_than_clusters(self) -> None:
        points = torch.eye(3)[[0, 1, 1, 2, 0]]
        centres = k_means(points, 10, seed=0)
        assert sorted(centres.tolist(), reverse=True) == torch.eye(3).tolist()

    def test_k_means__seed(self) -> None:
        torch.manual_seed(0)
        points = F.normalize(torch.randn(50, 8), dim=1)
        first, again, other = (k_means(points, 5, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)


class TestConcepts:
    def test_cluster_concepts__two_kinds_of_parts(self, devices: Devices) -> None:
        # e0 has 3 of 4 patches, e1 one; an absent part in between decides nothing.
        vectors = torch.eye(3)[[0, 1, 2]].expand(5, 3, 3)
        maps = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0.6], [0, 0, 0, 0.4]])
        table = _table(vectors, maps.expand(5, 3, 4))
        found = cluster_concepts(table, 2, devices)
        assert found.of_part[:, :2].tolist() == [[0, 1]] * 5
        torch.testing.assert_close(found.centres, torch.eye(3)[:2])
        assert found.coverage.sum().item() == pytest.approx(1)
        assert found.coverage[0].item() in (pytest.approx(0.75), pytest.approx(0.85))
        assert found.numbers is None

    def test_cluster_concepts__blocks_change_nothing(
        self, devices: Devices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = _random_table()
        whole = cluster_concepts(table, 5, devices)
        monkeypatch.setattr(table_module, "BLOCK_BYTES", 4 * 3 * 8 * 4)
        assert [len(b) for b in table.blocks(8)] == [4] * 9 + [1]
        parts = cluster_concepts(table, 5, devices)
        assert torch.equal(whole.of_part, parts.of_part)
        torch.testing.assert_close(whole.mean_maps(table), parts.mean_maps(table))

    def test_cluster_concepts__by_loops(self, devices: Devices) -> None:
        table = _random_table()
        found = cluster_concepts(table, 5, devices)
        assert (found.coverage.diff() <= 0).all()
        units, maps = table.units_of(np.arange(37)), table.maps_of(np.arange(37))
        cosines = units @ found.centres.mT
        assert torch.equal(found.of_part, cosines.argmax(dim=2))
        images, parts = found.occurrences(table.present)
        means = found.mean_maps(table)
        for concept in range(5):
            area, heat, here = 0.0, torch.zeros(6), {}
            for i in range(37):
                for j in range(3):
                    if found.of_part[i, j] != concept:
                        continue
                    area += table.masses[i, j].item() / 37
                    heat += maps[i, j] / 37
                    if table.present[i, j]:
                        here.setdefault(i, []).append(cosines[i, j, concept].item())
            assert found.coverage[concept].item() == pytest.approx(area, rel=1e-5)
            torch.testing.assert_close(means[concept].float(), heat)
            assert means[concept].mean().item() == pytest.approx(area, abs=2e-3)
            assert images[concept] == len(here)
            assert parts[concept] == sum(map(len, here.values()))
            nearest = sorted(here, key=lambda i: -max(here[i]))[: module.NUM_EXAMPLES]
            examples = found.examples(table.present)[concept]
            assert [image for image, _ in examples] == nearest
            for image, part in examples:
                similarity = cosines[image, part, concept].item()
                assert similarity == pytest.approx(max(here[image]), abs=1e-6)

    def test_cluster_concepts__nothing_is_anywhere(self, devices: Devices) -> None:
        table = _table(torch.eye(8).expand(2, 8, 8), torch.full((2, 8, 2), 1 / 8))
        with pytest.raises(ValueError, match="No part of an image of 'photos'"):
            cluster_concepts(table, 2, devices)

    @pytest.mark.slow
    def test_cluster_concepts__memory(
        self, devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # 20 000 images x 16 parts x 64 numbers: 41 MB on disk, 82 MB as float32.
        monkeypatch.setattr(table_module, "BLOCK_BYTES", 2**21)
        shape = (20_000, 16, 64)
        units = np.lib.format.open_memmap(
            tmp_path / "units.npy", mode="w+", dtype=np.float16, shape=shape
        )
        rng = np.random.default_rng(0)
        for rows in np.split(np.arange(shape[0]), 20):
            units[rows] = rng.normal(size=(len(rows), *shape[1:]))
        units.flush()
        watched = _Watched(np.load(tmp_path / "units.npy", mmap_mode="r"))
        masses = torch.full(shape[:2], 1 / 16)
        maps = np.full((*shape[:2], 16), 255, np.uint8)
        files = ImageFiles(tmp_path, [str(i) for i in range(shape[0])])
        table = PartTable(
            *(files, np.arange(shape[0]), watched, masses, maps, masses, masses, (4, 4))
        )
        before = _anonymous_memory()
        found = cluster_concepts(table, 4, devices)
        assert found.coverage.sum().item() == pytest.approx(1, rel=1e-5)
        assert watched.rows == 2 * shape[0]  # to draw some, and to assign all
        assert watched.largest == 2**21 // (4 * 16 * 64)
        assert watched.peak - before < 40 * 2**20

    def test_neighbours__by_cosine(self) -> None:
        angles = torch.deg2rad(torch.tensor([0.0, 90, 10, 40]))
        centres = torch.stack([angles.cos(), angles.sin()], dim=1)
        unused = torch.zeros(1, 1)
        found = Concepts(unused.long(), unused, centres, torch.zeros(4))
        first = found.neighbours()[0]
        assert [number for number, _ in first] == [2, 3, 1]
        cosines = [cosine for _, cosine in first]
        assert cosines == pytest.approx(np.cos(np.deg2rad([10, 40, 90])), abs=1e-6)

    def test_folder_shares__by_loops(self, devices: Devices) -> None:
        table = _random_table()
        found = cluster_concepts(table, 4, devices)
        labels = torch.arange(37) % 3
        shares, lifts = found.folder_shares(table.masses, labels, 3)
        for concept in range(4):
            areas = [0.0, 0.0, 0.0]
            for i in range(37):
                for j in range(3):
                    if found.of_part[i, j] == concept:
                        areas[i % 3] += table.masses[i, j].item()
            for folder, count in enumerate((13, 12, 12)):
                share = areas[folder] / sum(areas)
                assert shares[concept, folder].item() == pytest.approx(share, rel=1e-5)
                lift = share / (count / 37)
                assert lifts[concept, folder].item() == pytest.approx(lift, rel=1e-5)

    def test_prototype_concepts__those_that_cover_most(self, devices: Devices) -> None:
        table = _random_table()
        head = STELLARProjectionHead(8, 16, 4, 6).requires_grad_(False)
        found = prototype_concepts(table, head, 3, devices)
        vectors = table.units_of(np.arange(37)) * table.norms[..., None]
        logits = head.prototypes(head(vectors))
        winners = logits.argmax(dim=2)
        areas = [table.masses[winners == k].sum().item() / 37 for k in range(6)]
        order = sorted(range(6), key=lambda k: -areas[k])[:3]
        assert found.numbers == order
        assert found.coverage.tolist() == pytest.approx([areas[k] for k in order])
        for rank, k in enumerate(order):
            assert torch.equal(found.of_part == rank, winners == k)
        others = ~torch.isin(winners, torch.tensor(order))
        assert others.any() and torch.equal(found.of_part == NO_CONCEPT, others)
        torch.testing.assert_close(found.similarity, logits.amax(dim=2))


class TestCodes:
    def test_part_codes__products_are_cosines(self) -> None:
        table = _random_table(dim=48)
        codes = part_codes(table)
        assert codes.values.dtype == torch.int8 and codes.values.shape == (37, 3, 32)
        units = table.units_of(np.arange(37))
        exact = torch.einsum("d,ird->ir", units[5, 1], units)
        place, every = (torch.tensor([5]), torch.tensor([1])), np.arange(37)
        found = codes.cosines(*place, every)[0]
        error = (found - exact).abs()
        assert error.max() < 0.4 and error.mean() < 0.08  # 32 of 48 random directions
        narrow = _random_table(dim=8)
        units = narrow.units_of(np.arange(37))
        found = part_codes(narrow).cosines(*place, every)[0]
        torch.testing.assert_close(found, units @ units[5, 1], atol=0.02, rtol=0)

    def test_found_share__all_and_none(self) -> None:
        table = _random_table(images=300)
        assert found_share(table, part_codes(table), 0) > 0.95
        codes = part_codes(table)
        opposite = Codes(codes.values, -codes.weights)
        assert found_share(table, opposite, 0) < 0.2

    def test_found_share__one_image(self) -> None:
        table = _random_table(images=1)
        assert found_share(table, part_codes(table), 0) == 1


class _Watched:
    """An array that notes what is read of it, and the memory meanwhile."""

    def __init__(self, array: NDArray[np.float16]) -> None:
        self.array = array
        self.shape = array.shape
        self.rows = self.largest = self.peak = 0

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.float16]:
        self.rows += len(rows)
        self.largest = max(self.largest, len(rows))
        self.peak = max(self.peak, _anonymous_memory())
        return self.array[rows]


def _anonymous_memory() -> int:
    """Bytes of this process that are no mapped file."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
