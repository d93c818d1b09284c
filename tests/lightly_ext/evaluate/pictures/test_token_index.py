from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lightly_ext.data import read_image
from lightly_ext.evaluate.images import centre_crop, folder_images
from lightly_ext.evaluate.pictures import token_index
from lightly_ext.evaluate.pictures.token_index import (
    TokenIndex,
    index_tokens,
    most_distinct,
    nearest_tokens,
    prototype_usage,
    quantised,
    unit_length,
)
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import CONCEPTS
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    NUM_QUERIES,
    SIZES,
    make_given,
    write_images,
    write_model,
)


def _index(
    units: NDArray[np.floating], readable: list[int] | None = None
) -> TokenIndex:
    num, tokens = units.shape[:2]
    return TokenIndex(
        units.astype(np.float16),
        np.ones((num, tokens), np.float32),
        np.zeros((num, tokens, 4), np.uint8),
        np.zeros((num, tokens), np.float32),
        torch.tensor(list(range(num)) if readable is None else readable),
        (2, 2),
    )


def _random_index(num: int = 37, tokens: int = 3, dim: int = 8) -> TokenIndex:
    rng = np.random.default_rng(0)
    units = rng.normal(size=(num, tokens, dim))
    return _index(units / np.linalg.norm(units, axis=-1, keepdims=True))


def _blocks_of(monkeypatch: pytest.MonkeyPatch, images: int, index: TokenIndex) -> None:
    width = index.units.shape[2]
    block = 4 * index.num_tokens * width * images
    monkeypatch.setattr(token_index, "BLOCK_BYTES", block)


class TestNearestTokens:
    def test_nearest_tokens__planted(self) -> None:
        # Image 0 asks with its token 1 = e0. Cosines to e0, by image and token:
        cosines = np.array([[0.9, 1.0], [0.5, 0.6], [0.8, 0.1], [0.0, 0.7]])
        units = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=-1)
        index, query = _index(units), torch.tensor([[1.0, 0.0]])
        found = nearest_tokens(index, query, unit_length, 3, torch.tensor([0]))
        assert found.images.tolist() == [[2, 3, 1]]
        assert found.tokens.tolist() == [[0, 1, 1]]
        torch.testing.assert_close(
            found.similarity, torch.tensor([[0.8, 0.7, 0.6]]), atol=1e-3, rtol=0
        )
        every = nearest_tokens(
            index, query, unit_length, 5, torch.tensor([0]), one_per_image=False
        )
        assert every.images.tolist() == [[2, 3, 1, 1, 2]]
        assert every.tokens.tolist() == [[0, 1, 1, 0, 1]]
        own = nearest_tokens(index, query, unit_length, 1)
        assert (own.images.item(), own.tokens.item()) == (0, 1)

    @pytest.mark.parametrize("images_per_block", [1, 2, 5, 36, 37, 100])
    @pytest.mark.parametrize("one_per_image", [True, False])
    def test_nearest_tokens__brute_force(
        self,
        monkeypatch: pytest.MonkeyPatch,
        images_per_block: int,
        one_per_image: bool,
    ) -> None:
        index = _random_index()
        _blocks_of(monkeypatch, images_per_block, index)
        tokens = unit_length(index.tokens(index.readable)).double()
        queries, own = tokens[:4, 1].float(), torch.arange(4)
        found = nearest_tokens(index, queries, unit_length, 6, own, one_per_image)
        for i in range(4):
            cosine = tokens @ tokens[i, 1]
            cosine[i] = -torch.inf
            if one_per_image:
                cosine[cosine < cosine.amax(dim=1, keepdim=True)] = -torch.inf
            expected, order = cosine.flatten().sort(descending=True)
            places = found.images[i] * 3 + found.tokens[i]
            assert places.tolist() == order[:6].tolist()
            torch.testing.assert_close(found.similarity[i], expected[:6].float())

    @pytest.mark.parametrize("images_per_block", [1, 2, 3, 7])
    def test_nearest_tokens__ties_in_order(
        self, monkeypatch: pytest.MonkeyPatch, images_per_block: int
    ) -> None:
        index = _index(np.tile(np.eye(2)[:1], (7, 2, 1)))  # all tokens are e0
        _blocks_of(monkeypatch, images_per_block, index)
        query = torch.tensor([[1.0, 0.0]])
        found = nearest_tokens(index, query, unit_length, 4, torch.tensor([1]))
        assert found.images.tolist() == [[0, 2, 3, 4]]
        assert found.tokens.tolist() == [[0, 0, 0, 0]]
        every = nearest_tokens(index, query, unit_length, 5, one_per_image=False)
        assert every.images.tolist() == [[0, 0, 1, 1, 2]]
        assert every.tokens.tolist() == [[0, 1, 0, 1, 0]]

    def test_nearest_tokens__unreadable_images_are_not_there(self) -> None:
        units = np.tile(np.eye(2)[:1], (4, 1, 1))
        found = nearest_tokens(
            _index(units, readable=[0, 3]), torch.eye(2)[:1], unit_length, 4
        )
        assert found.images.tolist() == [[0, 3]]

    def test_nearest_tokens__norms_count_where_embedded(self) -> None:
        index = _random_index(num=5)
        index.norms[:] = np.arange(1, 6, dtype=np.float32)[:, None]  # type: ignore[index]
        query = torch.from_numpy(np.array(index.units[0, 0])).float()[None]  # type: ignore[index]
        found = nearest_tokens(index, query, lambda tokens: tokens, 5)
        tokens = index.tokens(index.readable)
        torch.testing.assert_close(
            tokens.norm(dim=-1),
            torch.arange(1.0, 6)[:, None].expand(5, 3),
            rtol=1e-3,
            atol=0,
        )
        expected = (tokens @ query[0]).amax(dim=1).sort(descending=True)
        torch.testing.assert_close(found.similarity[0], expected.values)
        assert found.images[0].tolist() == expected.indices.tolist()

    @pytest.mark.slow
    def test_nearest_tokens__memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # 20 000 images x 16 tokens x 64 numbers: 41 MB on disk, 82 MB as float32.
        monkeypatch.setattr(token_index, "BLOCK_BYTES", 2**21)
        shape = (20_000, 16, 64)
        units = np.lib.format.open_memmap(
            tmp_path / "units.npy", mode="w+", dtype=np.float16, shape=shape
        )
        rng = np.random.default_rng(0)
        for rows in np.split(np.arange(shape[0]), 20):
            units[rows] = rng.normal(size=(len(rows), *shape[1:]))
        units.flush()
        planted = {(3, 5), (19_999, 15), (10_000, 0)}
        for image, token in planted:
            units[image, token] = 50 * np.eye(1, 64)[0]
        norms = np.ones(shape[:2], np.float32)
        watched = _Watched(np.load(tmp_path / "units.npy", mmap_mode="r"))
        everything = torch.arange(shape[0])
        index = TokenIndex(watched, norms, norms, norms, everything, (1, 1))
        before = _anonymous_memory()

        def embed(tokens: torch.Tensor) -> torch.Tensor:
            watched.look()
            return unit_length(tokens)

        found = nearest_tokens(index, torch.eye(64)[:1], embed, 3)
        pairs = zip(found.images[0].tolist(), found.tokens[0].tolist(), strict=True)
        assert set(pairs) == planted
        block = 2**21 // (4 * 16 * 64)
        assert watched.rows == shape[0]
        assert watched.largest == block
        assert watched.peak - before < 30 * 2**20


class _Watched:
    """An array that notes what is read of it, and the memory meanwhile."""

    def __init__(self, array: NDArray[np.float16]) -> None:
        self.array = array
        self.shape = array.shape
        self.rows = self.largest = self.peak = 0

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.float16]:
        self.rows += len(rows)
        self.largest = max(self.largest, len(rows))
        self.look()
        return self.array[rows]

    def look(self) -> None:
        self.peak = max(self.peak, _anonymous_memory())


def _anonymous_memory() -> int:
    """Bytes of this process that are no mapped file."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class TestPrototypeUsage:
    @pytest.mark.parametrize("images_per_block", [1, 4, 37])
    def test_prototype_usage__brute_force(
        self, monkeypatch: pytest.MonkeyPatch, images_per_block: int
    ) -> None:
        torch.manual_seed(0)
        index = _random_index()
        monkeypatch.setattr(token_index, "BLOCK_BYTES", 4 * 3 * 16 * images_per_block)
        head = STELLARProjectionHead(8, 16, 4, 5).requires_grad_(False)
        usage = prototype_usage(index, head.prototypes.weight, head, 16)
        logits = head.prototypes(head(index.tokens(index.readable))).flatten(0, 1)
        assert usage.tolist() == logits.argmax(dim=1).bincount(minlength=5).tolist()
        assert usage.sum() == 37 * 3


class TestMostDistinct:
    def test_most_distinct__directions_of_a_circle(self) -> None:
        angles = torch.deg2rad(torch.tensor([0.0, 10.0, 170.0, 95.0, 91.0, 270.0]))
        units = torch.stack([angles.cos(), angles.sin()], dim=1)
        # 170 is farthest from 0; 270 is 90 and 100 degrees away, 95 and 91 less.
        assert most_distinct(units, 3) == [0, 2, 5]
        assert most_distinct(units, 4) == [0, 2, 5, 4]

    def test_most_distinct__each_once(self) -> None:
        units = F.normalize(torch.ones(4, 3), dim=1)  # all the same
        assert sorted(most_distinct(units, 9)) == [0, 1, 2, 3]


class TestIndexTokens:
    def test_quantised__error_bounds(self) -> None:
        torch.manual_seed(0)
        tokens, maps = 30 * torch.randn(2, 3, 8), torch.rand(2, 6, 3).softmax(dim=-1)
        result = Factorization(
            None, tokens, torch.rand(2, 6, 8), (2, 3), lambda u, s: maps
        )
        stored = quantised(result)
        assert {name: values.dtype for name, values in stored.items()} == {
            "units": torch.float16,
            "norms": torch.float32,
            "maps": torch.uint8,
            "masses": torch.float32,
        }
        index = TokenIndex(
            stored["units"].numpy(),
            stored["norms"].numpy(),
            stored["maps"].numpy(),
            stored["masses"].numpy(),
            torch.arange(2),
            (2, 3),
        )
        # Half precision has 11 bits: entries are off by 2^-11 of the length at most.
        error = (index.tokens(torch.arange(2)) - tokens).abs() / tokens.norm(
            dim=-1, keepdim=True
        )
        assert error.max() <= 2**-11
        for image in range(2):
            for token in range(3):
                expected = maps[image, :, token].view(2, 3)
                assert index.mass(image, token) == pytest.approx(
                    float(expected.mean()), abs=1e-6
                )
                found = index.token_map(image, token)
                assert (found - expected).abs().max() <= 0.5 / 255 + 1e-6

    def test_index_tokens__what_the_model_gives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = write_model(tmp_path / "model")
        folder = write_images(tmp_path / "images", 21)
        (folder / "0004.png").write_bytes(b"no image")
        given = make_given(tmp_path, source, **SIZES)
        files, protocol = (
            folder_images(folder),
            given.results.protocol(given.model, CONCEPTS),
        )
        index, cached = index_tokens(given.cache, files, protocol)
        assert cached.num_unreadable == 1
        assert index.readable.tolist() == [i for i in range(21) if i != 4]
        assert index.grid_size == (2, 2)
        assert index.units.shape == (21, NUM_QUERIES, EMBED_DIM)
        cut = centre_crop(protocol, "bicubic")
        result = given.model(cut(read_image(folder / "0007.png"))[None])
        tokens = index.tokens(torch.tensor([7]))
        torch.testing.assert_close(tokens, result.sparse, atol=5e-3, rtol=0)
        token_map = index.token_map(7, 2).flatten()
        expected = result.localization[0, :, 2]
        torch.testing.assert_close(token_map, expected, atol=3e-3, rtol=0)
        # Again: read from disk, the model sees no image but the one that gives shapes.
        seen = []
        forward = given.model.forward
        monkeypatch.setattr(
            given.model, "forward", lambda x: seen.append(len(x)) or forward(x)
        )
        again, _ = index_tokens(given.cache, files, protocol)
        assert sum(seen) == 1
        np.testing.assert_array_equal(again.units, index.units)
