from __future__ import annotations

import importlib
import os
import time

import pytest

from benchmarks import mutated_images
from benchmarks.mutated_images import read_all, table
from benchmarks.mutations import mutated, originals
from lightly_ext.data import reading


class TestMutated:
    def test_mutated__the_same_again(self) -> None:
        files = originals()
        first, again, other = (
            [mutated(files, seed, number) for number in range(200)]
            for seed in (0, 0, 1)
        )
        assert first == again != other
        whole = sum(data == files[name] for name, _, data in first)
        assert whole < 20  # a flipped bit may be flipped back


class TestReadAll:
    @pytest.mark.slow
    def test_read_all__reads_or_skips(self) -> None:
        importlib.reload(reading)  # tests forget the filters of imports
        outcomes = list(read_all(seed=1, count=400))
        assert [o for o in outcomes if not o.right] == []
        read = [o for o in outcomes if o.result == "read"]
        assert 80 < len(read) < 320
        assert "| all | 400 | 400 |" in table(outcomes)

    @pytest.mark.parametrize(
        ("end", "said"),
        [
            ("os._exit(7)", "WRONG: exit 7"),
            ("time.sleep(9)", "WRONG: no end in 0.5 s"),
            ("b'x' * 3 * 10**8", "WRONG: took"),
            ("{}[1]", "WRONG: exit 1"),
        ],
    )
    @pytest.mark.slow
    def test_read_all__notices(
        self, end: str, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(dataset: object) -> str:
            eval(end, {"os": os, "time": time})
            return "read"

        monkeypatch.setattr(mutated_images, "_read", read)
        if "sleep" in end:
            monkeypatch.setattr(mutated_images, "SECONDS", 0.5)
        monkeypatch.setattr(mutated_images, "MEGABYTES", 200.0)
        for outcome in read_all(seed=0, count=2):
            assert outcome.result.startswith(said) and not outcome.right
