from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lightly_ext.data import ImageFolderDataset, StellarDataModule, ViewBatch
from lightly_ext.data.streams import StreamDataset, find_source, open_shards
from lightly_ext.data.streams.order import plan_epoch
from lightly_ext.data.streams.read_ahead import BlockReader, in_thread
from lightly_ext.transforms import STELLARTransform
from tests.lightly_ext.data.streams.shard_files import encoded_images, write_shards

SMALL = STELLARTransform(2, 1, global_crop_size=24, local_crop_size=12)
KINDS = ("tar", "parquet", "arrow")
# Of four shards; images of the first lie in more than one row group.
COUNTS = (7, 3, 4, 2)


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return encoded_images(sum(COUNTS))


def write(folder: Path, kind: str, images: list[bytes]) -> str:
    left = iter(images)
    return write_shards(folder, kind, [[next(left) for _ in range(n)] for n in COUNTS])


def dataset(pattern: str, **options: object) -> StreamDataset:
    open_shards.cache_clear()  # files are rewritten
    source = find_source(pattern)
    assert source is not None
    return StreamDataset(source, **options)


def batches(pattern: str, size: int, workers: int = 0, **options: object) -> list:
    data = StellarDataModule(pattern, None, None, size, workers, SMALL, **options)
    return list(data.train_dataloader())


def assert_equal_batches(ours: list[ViewBatch], expected: list[ViewBatch]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", KINDS)
class TestStreamDataset:
    def test_getitem__as_files_of_a_folder(
        self, kind: str, images: list[bytes], tmp_path: Path
    ) -> None:
        for number, data in enumerate(images):
            path = tmp_path / "folder" / f"{number:03}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        folder = ImageFolderDataset(tmp_path / "folder")
        stream = dataset(write(tmp_path / "shards", kind, images))
        assert len(stream) == len(folder) == 16
        for number in range(16):
            image, index = stream[number]
            assert torch.equal(image, folder[number][0])
            assert index == number
        name = "000.png" if kind == "tar" else "row 0"
        assert stream.file(7) == tmp_path / "shards" / f"001.{kind}" / name
        with pytest.raises(IndexError, match="There is no image 16 among 16"):
            stream[16]

    def test_getitem__next_image_takes_the_place_of_a_broken_one(
        self, kind: str, images: list[bytes], tmp_path: Path
    ) -> None:
        broken = [*images[:6], b"no image", *images[7:]]
        stream = dataset(write(tmp_path, kind, broken))
        name = "006.png" if kind == "tar" else "row 6"
        with pytest.warns(UserWarning, match=rf"unreadable .*000\.{kind}/{name} "):
            image, index = stream[6]
        assert index == 7
        assert torch.equal(image, stream[7][0])
        assert stream.unreadable_files() == [stream.file(6)]
        # Known by now, and what is read ahead is not looked at.
        assert stream.read(6, b"no image")[1] == 7

    def test_fingerprint__tells_changes_but_not_places(
        self, kind: str, images: list[bytes], tmp_path: Path
    ) -> None:
        one = dataset(write(tmp_path / "a", kind, images)).fingerprint
        assert one.startswith("16 images in 4 files (")
        assert dataset(write(tmp_path / "b", kind, images)).fingerprint == one
        larger = [images[0] + bytes(20_000), *images[1:]]
        assert dataset(write(tmp_path / "c", kind, larger)).fingerprint != one

    def test_spread__evenly_and_in_a_row(
        self, kind: str, images: list[bytes], tmp_path: Path
    ) -> None:
        many = images * 5
        stream = dataset(write_shards(tmp_path, kind, [many[:50], many[50:]]))
        found = list(stream.spread(40))
        assert found == many[:20] + many[40:60]
        assert list(stream.spread(1000)) == many

    @pytest.mark.parametrize("buffer", [1, 6, 4096])
    def test_train_dataloader__order_processes_and_resume(
        self, kind: str, buffer: int, images: list[bytes], tmp_path: Path
    ) -> None:
        pattern = write(tmp_path, kind, images)
        whole = batches(pattern, 4, shuffle_buffer=buffer)
        order = plan_epoch(COUNTS, 0, 0, buffer).order.tolist()
        seen = torch.cat([batch.indices for batch in whole]).tolist()
        assert seen == order
        # Views are those of the image's number, read directly.
        stream = dataset(pattern)
        for processes in (2, 4):
            dealt = []
            for rank in range(processes):
                data = StellarDataModule(
                    pattern, None, None, 4 // processes, 0, SMALL, shuffle_buffer=buffer
                )
                data.trainer = Mock(global_rank=rank, world_size=processes)
                data.continue_from(epoch=0, num_images=8)
                dealt.append(list(data.train_dataloader()))
            for batch, *parts in zip(whole[2:], *dealt, strict=True):
                for expected, *shares in zip(batch, *parts, strict=True):
                    turns = torch.stack(shares, dim=1).flatten(0, 1)
                    assert torch.equal(turns, expected)
        assert stream.num_unreadable == 0

    def test_train_dataloader__workers_change_nothing(
        self, kind: str, images: list[bytes], tmp_path: Path
    ) -> None:
        # With an image that is broken.
        pattern = write(tmp_path, kind, [*images[:8], b"", *images[9:]])
        with pytest.warns(UserWarning, match="unreadable"):
            one = batches(pattern, 4)
        assert_equal_batches(batches(pattern, 4, workers=2), one)


class TestBlockReader:
    @pytest.mark.parametrize("processes", [1, 2, 3, 4])
    def test_read__forward_and_bounded(self, processes: int) -> None:
        counts = (40, 25, 31, 60, 44, 50, 17, 33)
        plan = plan_epoch(counts, 0, 0, 80)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        for rank in range(processes):
            opened: list[int] = []

            def read_from(number: int, opened: list[int] = opened) -> object:
                opened.append(number)
                end = next(end for end in ends if end > number)
                return map(str.encode, map(str, range(number, end)))

            reader = BlockReader(plan, read_from, ends)
            numbers = plan.order[rank::processes].tolist()
            held = 0
            for number, data in zip(numbers, reader.read(numbers), strict=True):
                assert data == str(number).encode()
                held = max(held, len(reader.held))
            # Blocks of ten of each of eight lanes, that end one after the other.
            assert held <= 80 // processes
            assert not reader.held
            if processes in (1, 2, 4):
                # Every shard is opened once, by one process until lanes run dry.
                assert len(opened) == len(set(opened))

    def test_read__goes_on_at_the_block(self) -> None:
        plan = plan_epoch((100, 100), 0, 0, 20)
        opened: list[int] = []

        def read_from(number: int) -> object:
            opened.append(number)
            return iter(
                [str(n).encode() for n in range(number, number // 100 * 100 + 100)]
            )

        numbers = plan.order[120:].tolist()
        reader = BlockReader(plan, read_from, [100, 200])
        assert list(reader.read(numbers)) == [str(n).encode() for n in numbers]
        # Sixty images of each lane are behind: at most a block of ten is read again.
        assert all(50 <= number % 100 <= 60 for number in opened)
        assert len(opened) == 2


class TestInThread:
    def test_in_thread__bounded_and_in_order(self) -> None:
        threads, taken = set(threading.enumerate()), list[int]()

        def count() -> object:
            for number in range(10_000):
                taken.append(number)
                yield number

        items = in_thread(count())
        for expected in range(1000):
            assert next(items) == expected
            assert len(taken) <= expected + 257 + 32
        items.close()
        self._wait_for_others(threads)

    def test_in_thread__error_behind_what_came_before(self) -> None:
        threads = set(threading.enumerate())

        def fail() -> object:
            yield from range(40)
            raise OSError("shard 3 is gone")

        *before, error = in_thread(fail())
        assert before == list(range(40))
        assert isinstance(error, OSError)
        self._wait_for_others(threads)

    def _wait_for_others(self, threads: set[threading.Thread]) -> None:
        for thread in set(threading.enumerate()) - threads:
            thread.join(5)
            assert not thread.is_alive()
