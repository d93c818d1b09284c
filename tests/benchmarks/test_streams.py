from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import streams


@pytest.mark.slow  # the import of `datasets`
def test_main__all_ways_read_all(capsys: pytest.CaptureFixture[str]) -> None:
    streams.main(["--count=20", "--bytes=1000", "--shards=2", "--rounds=1"])
    rows = capsys.readouterr().out.splitlines()[-4:]
    kinds = ("folder", "tar", "parquet", "arrow")
    for row, kind in zip(rows, kinds, strict=True):
        name, *times = row.strip("| ").split(" | ")
        assert name == kind
        assert len(times) == 3
        assert all(float(t) > 0 for t in times if t != "-")
        assert (times[-1] == "-") == (kind == "folder")


@pytest.mark.slow
def test_compare__all_ways_read_the_same_bytes(tmp_path: Path) -> None:
    streams.write(tmp_path, [bytes(size) for size in range(1, 250)], num_shards=2)
    for kind in ("folder", *streams.BUILDERS):
        assert streams.read(streams.opened(tmp_path, kind)) == sum(range(1, 250))
        if kind != "folder":
            assert streams.streamed(tmp_path, kind)() == sum(range(1, 250))
