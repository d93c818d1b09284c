from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lightly_ext.data.streams import Source, find_source, open_shards
from lightly_ext.data.streams.columns import image_column
from lightly_ext.data.streams.shards import ArrowShard, ParquetShard, Shard, TarShard
from tests.lightly_ext.data.streams.shard_files import (
    encoded_images,
    image_table,
    write_arrow,
    write_parquet,
    write_tar,
)


def shards_of(text: str) -> tuple[Shard, ...]:
    source = find_source(text)
    assert source is not None
    return open_shards(source)


class TestTarShard:
    def test_read__one_image_of_a_sample(self, tmp_path: Path) -> None:
        files = {
            "c/1.cls": b"3",
            "c/1.png": b"png",
            "c/1.seg.png": b"mask",
            "c/1.JPG": b"jpg",  # comes before .png
            "c/2.webp": b"webp",
            "c/3.PNG": b"first of two",
            "c/3.png": b"second",
            "c/\udcff\u00fc.png": b"any bytes",
            # No WebDataset: files whose names have dots.
            "d/IMG.01.jpg": b"first",
            "d/IMG.02.jpg": b"second",
            "d/._3.jpg": b"hidden",
            "e.f/4.png": b"folder with a dot",
            "D/5.png": b"upper",
            "d/5.png": b"lower",
            "long/" + "x" * 150 + ".png": b"long name",
        }
        shard = TarShard(str(write_tar(tmp_path / "a.tar", files)))
        names = ["c/1.JPG", "c/2.webp", "c/3.PNG", "c/\udcff\u00fc.png"]
        names += ["d/IMG.01.jpg", "d/IMG.02.jpg", "e.f/4.png"]
        names += ["D/5.png", "d/5.png", "long/" + "x" * 150 + ".png"]
        assert [shard.name(i) for i in range(len(shard))] == names
        assert [shard.read(i) for i in range(len(shard))] == [files[n] for n in names]
        assert list(shard.read_from(8)) == [b"lower", b"long name"]
        assert shard.num_bytes == (tmp_path / "a.tar").stat().st_size

    def test_open_shards__says_which_samples_have_no_image(
        self, tmp_path: Path
    ) -> None:
        write_tar(tmp_path / "0.tar", {"1.jpg": b"", "1.txt": b"", "2.txt": b""})
        write_tar(tmp_path / "1.tar", {"3.json": b"", "4.txt": b""})
        message = (
            r"^3 samples of .* have no image and are left out: .*0.tar/2.txt, \.\.\."
        )
        with pytest.warns(UserWarning, match=message):
            shards = shards_of(str(tmp_path))
        assert [len(shard) for shard in shards] == [1]

    @pytest.mark.filterwarnings("error")
    def test_open_shards__images_before_what_belongs_to_them(
        self, tmp_path: Path
    ) -> None:
        names = ("1.jpg", "2.jpg", "1.cls", "2.cls")
        path = write_tar(tmp_path / "0.tar", dict.fromkeys(names, b"0"))
        (shard,) = shards_of(str(path))
        assert [shard.name(i) for i in range(len(shard))] == ["1.jpg", "2.jpg"]

    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            (0, "empty file"),
            (300, "truncated header"),
            (512 + 100, "unexpected end of data"),  # within a file
            (512 * 3, "cut off or broken behind 1.jpg"),  # between two
            (512 * 3 + 80, "cut off or broken behind 1.jpg"),
        ],
    )
    def test_init__cut_off(self, kept: int, message: str, tmp_path: Path) -> None:
        files = {"1.jpg": bytes(1000), "2.jpg": bytes(1000)}
        path = write_tar(tmp_path / "a.tar", files)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(OSError, match=f"a.tar cannot be read: .*{message}"):
            shards_of(str(path))

    def test_init__broken_header_within(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", {"1.jpg": b"1", "2.jpg": b"2"})
        data = bytearray(path.read_bytes())
        data[1024 + 150] ^= 1  # the checksum of the second header
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"cut off or broken behind 1.jpg"):
            TarShard(str(path))

    def test_init__several_joined_and_compressed(self, tmp_path: Path) -> None:
        first = write_tar(tmp_path / "a.tar", {"1.jpg": b"1"}).read_bytes()
        second = write_tar(tmp_path / "b.tar", {"2.jpg": b"2"}).read_bytes()
        (tmp_path / "a.tar").write_bytes(first + second)
        with pytest.raises(OSError, match=r"a.tar cannot .* behind its end, at 1.jpg"):
            TarShard(str(tmp_path / "a.tar"))
        (tmp_path / "b.tar").write_bytes(gzip.compress(second))
        with pytest.raises(OSError, match=r"b.tar cannot .* compressed: unpack it"):
            TarShard(str(tmp_path / "b.tar"))

    def test_init__links_are_told(self, tmp_path: Path) -> None:
        folder = tmp_path / "x"
        folder.mkdir()
        (folder / "1.jpg").write_bytes(b"1")
        os.link(folder / "1.jpg", folder / "2.jpg")
        (folder / "3.jpg").symlink_to("1.jpg")
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for number in (1, 2, 3):
                tar.add(folder / f"{number}.jpg", f"{number}.jpg")
        shard = TarShard(str(tmp_path / "a.tar"))
        assert list(shard.read_from(0)) == [b"1", b"", b""]

    def test_read__cut_off_or_gone_in_the_run(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "a.tar", {"1.jpg": bytes(1000)})
        shard = TarShard(str(path))
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(OSError, match=r"a.tar cannot be read: .*Copy it again"):
            shard.read(0)
        path.unlink()
        with pytest.raises(OSError, match=r"a.tar cannot be read: .*No such file"):
            shard.read(0)


class TestParquetShard:
    def test_read__across_row_groups(self, tmp_path: Path) -> None:
        images = encoded_images(100, size=(4, 4))
        shard = ParquetShard(str(write_parquet(tmp_path / "a.parquet", images, 30)))
        assert len(shard) == 100
        for number in (0, 1, 29, 30, 77, 99):
            assert shard.read(number) == images[number]
            assert list(shard.read_from(number)) == images[number:]
        assert shard.name(7) == "row 7"

    def test_read__nothing_and_files(self, tmp_path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        rows = [None, {"bytes": None, "path": None}, {"bytes": None, "path": "/x.jpg"}]
        table = pa.table({"image": rows}).cast(image_table([]).schema)
        parquet.write_table(table, tmp_path / "a.parquet")
        shard = ParquetShard(str(tmp_path / "a.parquet"))
        assert list(shard.read_from(0)) == [b"", b"", Path("/x.jpg")]

    def test_read__by_fsspec(self, tmp_path: Path) -> None:
        fsspec = pytest.importorskip("fsspec")
        images = encoded_images(10, size=(4, 4))
        path = write_parquet(tmp_path / "a.parquet", images)
        fsspec.filesystem("memory").pipe("/a.parquet", path.read_bytes())
        (shard,) = open_shards(Source("hf:x", "parquet", ("memory://a.parquet",)))
        assert list(shard.read_from(4)) == images[4:]
        assert shard.num_bytes == path.stat().st_size

    def test_init__cut_off(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", encoded_images(4))
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(OSError, match=r"a.parquet cannot be read: .*Parquet"):
            shards_of(str(path))

    def test_read__broken_within(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", encoded_images(4))
        shard = ParquetShard(str(path))
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(2000) + data[2004:])
        with pytest.raises(OSError, match=r"a.parquet cannot be read: "):
            list(shard.read_from(0))


class TestArrowShard:
    @pytest.mark.parametrize("kind", ["stream", "file"])
    def test_read__both_formats(self, kind: str, tmp_path: Path) -> None:
        images = encoded_images(10, size=(4, 4))
        path = tmp_path / "a.arrow"
        if kind == "stream":
            write_arrow(path, images)
        else:
            import pyarrow as pa

            table = image_table(images)
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table, 3)
        shard = ArrowShard(str(path))
        assert [shard.read(i) for i in range(len(shard))] == images
        assert list(shard.read_from(7)) == images[7:]

    def test_init__no_arrow_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.arrow").write_bytes(b"ARROW?" * 10)
        with pytest.raises(OSError, match=r"a.arrow cannot be read: "):
            ArrowShard(str(tmp_path / "a.arrow"))


class TestOpenShards:
    @pytest.mark.parametrize(
        ("builder", "file", "message"),
        [
            ("webdataset", "hf://d/a.tar", "hf://d/a.tar would have to be read as a"),
            ("arrow", "hf://d/a.arrow", "would have to be read as a whole"),
            ("imagefolder", "hf://d/a.zip", "it is stored as imagefolder, which is no"),
        ],
    )
    def test_open_shards__not_to_be_streamed(
        self, builder: str, file: str, message: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"{message}.*hf download org/x --repo"):
            open_shards(Source("hf:org/x", builder, (file,), "org/x", None, "train"))

    def test_open_shards__folder_of_images(self, tmp_path: Path) -> None:
        source = Source("hf:x", "imagefolder", ("x/1.png",), str(tmp_path), None, "a")
        with pytest.raises(ValueError, match=rf"give the folder as it is: {tmp_path}"):
            open_shards(source)

    @pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
    def test_open_shards__no_file(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "a.tar"
        if kind == "pipe":  # to open it would wait for ever
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("gone.tar")
        with pytest.raises(FileNotFoundError, match=r"a.tar is no file, or a link to"):
            open_shards(Source("x", "webdataset", (str(path),)))

    def test_open_shards__no_image_at_all(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", [])
        with pytest.raises(ValueError, match=r"There is no image in .*a\.parquet"):
            shards_of(str(path))

    def test_open_shards__counts_are_said_where_it_takes_long(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("lightly_ext.data.streams.shards._PATIENCE", -1)
        for number in (0, 1):
            write_tar(tmp_path / f"{number}.tar", {"1.jpg": b"", "2.jpg": b""})
        shards_of(str(tmp_path))
        assert f"Looked into 2 of 2 files of {tmp_path}: 4 images." in (
            capsys.readouterr().out
        )


class TestImageColumn:
    def _schema(self, noted: dict[str, Any] | None = None, **columns: Any) -> Any:
        import json

        import pyarrow as pa

        features = {name: {"_type": kind} for name, kind in (noted or {}).items()}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        return pa.schema(columns, meta if noted else None)

    def test_image_column__noted_then_struct_then_bytes(self) -> None:
        import pyarrow as pa

        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        many = {"a": image, "b": image, "raw": pa.binary(), "n": pa.int64()}
        noted = self._schema({"b": "Image", "n": "Value"}, **many)
        assert image_column(noted, "x") == "b"
        one = {"a": image, "raw": pa.large_binary(), "n": pa.int64()}
        assert image_column(self._schema(**one), "x") == "a"
        for kind in (pa.large_binary(), pa.binary_view()):
            assert image_column(self._schema(raw=kind), "x") == "raw"
        with pytest.raises(ValueError, match=r"x .*: a, b\. .*_columns\(\['b'\]\)`"):
            image_column(self._schema(**many), "x")
        with pytest.raises(ValueError, match=r"x has no column .* are: n \(int64\)"):
            image_column(self._schema(n=pa.int64()), "x")


@pytest.mark.slow
def test_open_shards__as_datasets_writes_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = encoded_images(10)
    rows = {"photo": [{"bytes": data, "path": None} for data in images]}
    made = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    made.save_to_disk(tmp_path / "disk", num_shards=3)
    pair = datasets.DatasetDict({"train": made, "test": made.select([1])})
    pair.save_to_disk(tmp_path / "pair")
    shutil.copytree(tmp_path / "parquet", tmp_path / "copy")
    for text in ("parquet", "disk", "pair/train"):
        shards = shards_of(str(tmp_path / text))
        assert [data for shard in shards for data in shard.read_from(0)] == images
    for text, expected in (("copy:train", images), ("pair:test", images[1:2])):
        shards = shards_of(f"hf:{tmp_path / text}")
        assert [data for shard in shards for data in shard.read_from(0)] == expected
