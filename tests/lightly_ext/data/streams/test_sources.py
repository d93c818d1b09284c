from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightly_ext.data.streams import Source, find_source


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [str(folder / name) for name in names]


class TestFindSource:
    @pytest.mark.parametrize(
        ("suffix", "builder"),
        [(".tar", "webdataset"), (".parquet", "parquet"), (".arrow", "arrow")],
    )
    def test_find_source__file_pattern_braces_and_folder(
        self, suffix: str, builder: str, tmp_path: Path
    ) -> None:
        # Written in another order than they are read in.
        names = [f"s/{number}{suffix}" for number in ("010", "009", "008")]
        files = tuple(sorted(touch(tmp_path, *names)))
        touch(tmp_path, "s/.hidden.tar", "s/notes.txt")
        for text, expected in (
            (files[0], files[:1]),
            (f"{tmp_path}/s/*{suffix}", files),
            (f"{tmp_path}/**/*{suffix}", files),
            (f"{tmp_path}/s/{{008..010}}{suffix}", files),
            (f"{tmp_path}/s/{{010..008}}{suffix}", files),
            (f"{tmp_path}/s/0{{08,10}}{suffix}", (files[0], files[2])),
            (f"{tmp_path}/s", files),
            (str(tmp_path), files),
        ):
            assert find_source(text) == Source(text, builder, expected)

    def test_find_source__folders_of_images_and_nothing(self, tmp_path: Path) -> None:
        touch(tmp_path, "a/x.tar", "a/deep/y.JPG", "b/c.txt")
        # Images win; `list_images` says that the tar is left out.
        for text in ("a", "b", "missing"):
            assert find_source(tmp_path / text) is None

    def test_find_source__links_in_circles(self, tmp_path: Path) -> None:
        files = touch(tmp_path, "a/1.tar", "b/2.tar")
        for number in range(5):
            (tmp_path / "a" / f"{number}").symlink_to(tmp_path)
        source = find_source(tmp_path)
        assert source is not None
        assert source.files == tuple(files)

    def test_find_source__name_that_looks_like_a_pattern(self, tmp_path: Path) -> None:
        files = touch(tmp_path, "x[1].tar")
        source = find_source(files[0])
        assert source is not None
        assert source.files == (files[0],)

    def test_find_source__save_to_disk(self, tmp_path: Path) -> None:
        files = touch(tmp_path, *(f"{s}/data-{i}.arrow" for s in "ab" for i in "01"))
        touch(tmp_path, "a/cache-123.arrow")
        for split in "ab":
            listed = [{"filename": f"data-{i}.arrow"} for i in "01"]
            state = json.dumps({"_data_files": listed})
            (tmp_path / split / "state.json").write_text(state)
        source = find_source(tmp_path / "a")
        assert source is not None
        assert source.files == tuple(files[:2])
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["b", "a"]}')
        with pytest.raises(ValueError, match=f"splits b, a: name one, {tmp_path}/b"):
            find_source(tmp_path)
        source = find_source(f"hf:{tmp_path}:b")
        assert source is not None
        assert source.files == tuple(files[2:])
        with pytest.raises(ValueError, match=r"no split c. There are: a, b\."):
            find_source(f"hf:{tmp_path}:c")
        with pytest.raises(ValueError, match="more than one split"):
            find_source(f"hf:{tmp_path}")

    @pytest.mark.slow  # the import of `datasets`
    def test_find_source__splits_of_a_folder_for_datasets(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets")
        train, test = touch(tmp_path, "train-0.parquet", "test-0.parquet")
        with pytest.raises(ValueError, match="splits test, train: name one, hf:"):
            find_source(tmp_path)
        name = str(tmp_path)
        for text, split, file in (
            (f"hf:{name}", "train", train),
            (f"hf:{name}:test", "test", test),
        ):
            expected = Source(text, "parquet", (file,), name, None, split)
            assert find_source(text) == expected
        with pytest.raises(ValueError, match=r"no split val. There are: test, train\."):
            find_source(f"hf:{name}:val")
        with pytest.raises(ValueError, match="'tiny' not found"):
            find_source(f"hf:{name}:tiny:train")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("gone.tar", r"There is no file .*gone\.tar"),
            ("*.tar", r"No file matches .*\*\.tar\. .* in quotes"),
            ("{0..3}.parquet", "3 of the 4 files .* are missing: .*0.parquet, "),
            ("mixed/*", r"one kind.* names 1 \.parquet .*, 1 \.tar"),
            ("mixed", r"one kind.* names 1 \.parquet .*, 1 \.tar"),
            ("*.zip", r"must name tars .*; it names 1 \.zip"),
            ("z.tar.gz", "is compressed.*Unpack it to a plain .tar"),
            ("both", r"both/b.tar.gz is compressed.*Unpack it to a plain .tar"),
            ("parts", r"test, train: name one, hf:.*:train, .*/train-0.tar'"),
        ],
    )
    def test_find_source__errors(self, text: str, message: str, tmp_path: Path) -> None:
        touch(tmp_path, "1.parquet", "mixed/a.tar", "mixed/b.parquet", "c.zip")
        touch(tmp_path, "z.tar.gz", "both/a.tar", "both/b.tar.gz")
        touch(tmp_path, "parts/test-0.tar", "parts/train-0.tar")
        with pytest.raises(ValueError, match=message):
            find_source(tmp_path / text)

    @pytest.mark.parametrize("text", ["hf:", "hf:a:b:c:d", "hf:a::b"])
    def test_find_source__hub_names(self, text: str) -> None:
        with pytest.raises(ValueError, match="should be hf:NAME, hf:NAME:SPLIT or"):
            find_source(text)
