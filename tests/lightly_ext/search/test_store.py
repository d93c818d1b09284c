from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightly_ext.search import store as store_module
from lightly_ext.search.store import LanceStore


def _put(store: LanceStore, files: list[str], value: int) -> None:
    columns = {"value": np.full(len(files), value), "vector": np.eye(len(files), 3)}
    store.put(files, columns)


def _values(store: LanceStore) -> dict[str, int]:
    files, numbers = store.files()
    if not files:
        return {}
    return dict(zip(files, store.rows(numbers)["value"].tolist(), strict=True))


def _data(folder: Path) -> set[Path]:
    return {*folder.glob("images.lance/data/*")}


class TestLanceStore:
    def test_put_and_drop__leave_other_files_alone(self, tmp_path: Path) -> None:
        store = LanceStore(tmp_path)
        _put(store, ["a'b", "c\udcff", "d"], 1)
        before = _data(tmp_path)
        _put(store, ["c\udcff", "e"], 2)
        store.drop(["d"])
        assert before < _data(tmp_path)
        assert len(_data(tmp_path)) == 2
        assert _values(store) == {"a'b": 1, "c\udcff": 2, "e": 2}
        assert _values(LanceStore(tmp_path)) == _values(store)

    def test_put__two_make_the_table(self, tmp_path: Path) -> None:
        stores = [LanceStore(tmp_path), LanceStore(tmp_path)]
        _put(stores[0], ["a", "b"], 1)
        _put(stores[1], ["b", "c"], 2)
        values = _values(stores[0])
        assert values.pop("b") in (1, 2)
        assert values == {"a": 1, "c": 2}
        _put(stores[0], ["b"], 3)
        assert _values(stores[1]) == {"a": 1, "b": 3, "c": 2}
        assert len(stores[0]) == 3

    def test_tidy__many_small_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_module, "MANY_FILES", 3)
        store = LanceStore(tmp_path)
        for i in range(4):
            _put(store, [f"{i}"], i)
            store.tidy()
        reader = LanceStore(tmp_path)
        _put(store, ["0"], 9)
        assert len(_data(tmp_path)) == 6
        store.tidy()
        assert len(_data(tmp_path)) == 6
        assert _values(store) == {"0": 9, "1": 1, "2": 2, "3": 3}
        _, numbers = reader.files()
        store.drop(["0", "1", "2"])
        # A reader has the rows that it has seen.
        assert sorted(reader.rows(numbers, ["value"])["value"]) == [1, 2, 3, 9]

    @pytest.mark.parametrize("broken", ["manifest", "data", "foreign"])
    def test_open__broken(self, tmp_path: Path, broken: str) -> None:
        _put(LanceStore(tmp_path), ["a"], 1)
        if broken == "foreign":
            database = store_module.import_lancedb().connect(tmp_path)
            database.create_table("images", [{"vector": 1}], mode="overwrite")
        else:
            for path in tmp_path.rglob(
                "*.manifest" if broken == "manifest" else "*.lance"
            ):
                if path.is_file():
                    path.write_bytes(b"broken")
        with pytest.raises(ValueError, match=f"The table in '{tmp_path}' ") as error:
            LanceStore(tmp_path).files()
        assert ".rs:" not in str(error.value)  # where in the source of Lance
