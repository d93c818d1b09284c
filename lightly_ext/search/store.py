"""Rows of images in a table of LanceDB: written as a whole or not at all."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLE = "images"
KEY, FILE = "key", "file"
ROWS_AT_ONCE = 1024
Columns = Mapping[str, NDArray[Any]]


def key_of(file: str) -> str:
    """What a row is found by: names of files may hold quotes, or be no text."""
    return hashlib.sha256(os.fsencode(file)).hexdigest()[:32]


class LanceStore:
    """A table with a row per image.

    A change is there as a whole or not at all, whenever the process is killed: each is
    a new version of the table.

    Args:
        folder:
            Folder of the table, which is made with the first rows.

    Raises:
        ModuleNotFoundError: If LanceDB is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import lancedb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"An index needs the package '{error.name}': "
                "pip install 'stellar-plugin[search]'",
                name=error.name,
            ) from error
        self._database = lancedb.connect(folder)
        there = TABLE in self._database.list_tables().tables
        self._table: Any = self._database.open_table(TABLE) if there else None

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows()

    def put(self, files: Sequence[str], columns: Columns) -> None:
        """Adds rows, in the place of those that the files have already.

        Args:
            files:
                Names of files, each once.
            columns:
                Arrays with a row per file: numbers, or vectors with shape (len(files),
                size). Names and sizes are always the same.
        """
        import pyarrow

        arrays = {
            KEY: pyarrow.array([key_of(file) for file in files]),
            FILE: pyarrow.array([os.fsencode(file) for file in files]),
            **{name: _to_arrow(values) for name, values in columns.items()},
        }
        rows = pyarrow.table(arrays)
        if self._table is None:
            self._table = self._database.create_table(TABLE, schema=rows.schema)
        # By key also where all is new: a second process may have been as far.
        merge = self._table.merge_insert(KEY).when_matched_update_all()
        merge.when_not_matched_insert_all().execute(rows)

    def drop(self, files: Sequence[str]) -> None:
        """Removes the rows of files."""
        for start in range(0, len(files), ROWS_AT_ONCE):
            keys = [f"'{key_of(file)}'" for file in files[start : start + ROWS_AT_ONCE]]
            self._table.delete(f"{KEY} IN ({', '.join(keys)})")

    def tidy(self) -> None:
        """Joins what many changes left in many files, and removes what is replaced.

        A reader that opened the table within the last hour keeps its version.
        """
        if self._table is not None:
            self._table.optimize(cleanup_older_than=datetime.timedelta(hours=1))

    def files(self) -> tuple[list[str], NDArray[np.int64]]:
        """Names of the files in sorted order, and the numbers of their rows."""
        if self._table is None:
            return [], np.empty(0, np.int64)
        found = self._table.search().select([FILE]).with_row_id(True).to_arrow()
        names = [os.fsdecode(name) for name in found[FILE].to_pylist()]
        order = sorted(range(len(names)), key=names.__getitem__)
        numbers = found["_rowid"].to_numpy().astype(np.int64)
        return [names[i] for i in order], numbers[order]

    def rows(
        self, numbers: NDArray[np.int64], names: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Columns of some rows, in the order of their numbers.

        Args:
            numbers:
                Numbers of rows, as `files` gives them.
            names:
                Names of the columns.
        """
        query = self._table.take_row_ids(numbers.tolist()).select([KEY, *names])
        found = query.with_row_id().to_arrow()
        # The table may answer in another order than asked for.
        place = {int(n): i for i, n in enumerate(found["_rowid"].to_numpy())}
        order = np.array([place[int(n)] for n in numbers], np.int64)
        return {name: _to_numpy(found[name])[order] for name in names}

    def blocks(
        self, numbers: NDArray[np.int64], names: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns of rows, some rows at a time, as `rows` has them."""
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            yield self.rows(numbers[start : start + ROWS_AT_ONCE], names)


def _to_arrow(values: NDArray[Any]) -> Any:
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _to_numpy(column: Any) -> NDArray[Any]:
    import pyarrow

    column = column.combine_chunks()
    if not pyarrow.types.is_fixed_size_list(column.type):
        return column.to_numpy(zero_copy_only=False)
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
