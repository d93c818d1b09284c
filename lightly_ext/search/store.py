"""Rows of images in a table of LanceDB: written as a whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLE = "images"
FILE = "file"
ROWS_AT_ONCE = 1024
# Files on disk are joined when they are more than so many, and more than one for so
# many rows: each time all rows are written anew.
MANY_FILES, FEW_ROWS = 64, 512
# A reader that opened the table within this time keeps its version.
READERS_KEEP = datetime.timedelta(hours=1)
Columns = Mapping[str, NDArray[Any]]


def import_lancedb() -> Any:
    """LanceDB, which not everybody needs.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import lancedb
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"An index needs the package '{error.name}': "
            "pip install 'stellar-plugin[search]'",
            name=error.name,
        ) from error
    return lancedb


class LanceStore:
    """A table with a row per image.

    A change is there as a whole or not at all, whenever the process is killed: each is
    a new version of the table. Several processes may add rows of different files at
    once.

    Args:
        folder:
            Folder of the table, which is made with the first rows.

    Raises:
        ModuleNotFoundError: If LanceDB is not installed.
        ValueError: If the table cannot be read, or is no table of images.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = import_lancedb().connect(folder)
        self._table: Any = None
        self._present: set[str] = set()
        if TABLE in self._database.list_tables().tables:
            with self._readable():
                self._table = self._database.open_table(TABLE)
            if FILE not in self._table.schema.names:
                raise ValueError(
                    f"The table in '{folder}' is of something else than images: name "
                    "another folder."
                )

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows()

    def check(self, widths: Mapping[str, int]) -> None:
        """Checks that the table, if there is one, has certain columns.

        Args:
            widths:
                Numbers that a row has in each of them.

        Raises:
            ValueError: If it has others.
        """
        if self._table is None:
            return
        kinds = {column.name: column.type for column in self._table.schema}
        found = {n: getattr(k, "list_size", 1) for n, k in kinds.items() if n != FILE}
        for name in sorted({*found, *widths}):
            if found.get(name) != widths.get(name):
                raise ValueError(
                    f"The table in '{self._folder}' is not of its card: {name} has "
                    f"{found.get(name, 0)} numbers of an image there, "
                    f"{widths.get(name, 0)} by the card. Put the right file in the "
                    "place of the wrong one, or make the index anew, in another folder."
                )

    @property
    def num_bytes(self) -> int:
        """Bytes of the table on disk, with those of replaced rows and versions."""
        paths = (self._folder / f"{TABLE}.lance").rglob("*")
        return sum(path.stat().st_size for path in paths if path.is_file())

    def put(self, files: Sequence[str], columns: Columns) -> None:
        """Adds rows, in the place of those that the files have already.

        After a kill in between, replaced rows may be missing.

        Args:
            files:
                Names of files, each once.
            columns:
                Arrays with a row per file: numbers, or vectors with shape (len(files),
                size). Names and sizes are always the same.

        Raises:
            OSError: If they cannot be written.
        """
        import pyarrow

        arrays = {
            FILE: pyarrow.array([os.fsencode(file) for file in files]),
            **{name: _to_arrow(values) for name, values in columns.items()},
        }
        rows = pyarrow.table(arrays)
        self.drop([file for file in files if file in self._present])
        with self._writable():
            if self._table is None:
                # Another process may make it at the same time.
                self._table = self._database.create_table(
                    TABLE, schema=rows.schema, exist_ok=True
                )
            self._table.add(rows)
        self._present.update(files)

    def drop(self, files: Sequence[str]) -> None:
        """Removes the rows of files.

        Raises:
            OSError: If that cannot be written.
        """
        for start in range(0, len(files), ROWS_AT_ONCE):
            # Not as text: names of files may hold quotes, or be none.
            names = [f"X'{os.fsencode(f).hex()}'" for f in files[start:][:ROWS_AT_ONCE]]
            with self._writable():
                self._table.delete(f"{FILE} IN ({', '.join(names)})")
        self._present.difference_update(files)

    def tidy(self) -> None:
        """Joins what many changes left in many files, and removes what is replaced.

        Raises:
            OSError: If that cannot be written.
        """
        if self._table is None:
            return
        num_files = self._table.stats()["fragment_stats"]["num_fragments"]
        if num_files > max(MANY_FILES, len(self) / FEW_ROWS):
            with self._writable():
                self._table.optimize(cleanup_older_than=READERS_KEEP)

    def files(self) -> tuple[list[str], NDArray[np.int64]]:
        """Names of the files in sorted order, and the numbers of their rows."""
        if self._table is None:
            return [], np.empty(0, np.int64)
        with self._readable():
            self._table.checkout_latest()
            query = self._table.search().select([FILE]).with_row_id(True)
            found = query.to_arrow()
        names = [os.fsdecode(name) for name in found[FILE].to_pylist()]
        numbers = found["_rowid"].to_numpy().astype(np.int64)
        # One row of each, should two processes have added the same file.
        number_of = dict(zip(names, numbers.tolist(), strict=True))
        names = sorted(number_of)
        self._present = set(names)
        return names, np.array([number_of[name] for name in names], np.int64)

    def rows(
        self, numbers: NDArray[np.int64], names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Columns of some rows, in the order of their numbers.

        Args:
            numbers:
                Numbers of rows, as `files` gives them.
            names:
                Names of the columns. None takes all but that of the files.

        Raises:
            ValueError: If a row is no longer there, or the table cannot be read.
        """
        if names is None:
            names = [name for name in self._table.schema.names if name != FILE]
        with self._readable():
            query = self._table.take_row_ids(numbers.tolist()).select([*names])
            found = query.with_row_id().to_arrow()
        # The table may answer in another order than asked for.
        place = {int(n): i for i, n in enumerate(found["_rowid"].to_numpy())}
        self._check_found(len(place), len({*numbers.tolist()}))
        order = np.array([place[int(n)] for n in numbers], np.int64)
        return {name: _to_numpy(found[name])[order] for name in names}

    def blocks(
        self, numbers: NDArray[np.int64], names: Sequence[str]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns of rows, some rows at a time, as `rows` has them."""
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            yield self.rows(numbers[start : start + ROWS_AT_ONCE], names)

    def scan(
        self, numbers: NDArray[np.int64], names: Sequence[str]
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """Columns of many rows, some at a time, in the order of the table.

        Args:
            numbers:
                Numbers of rows, as `files` gives them.
            names:
                Names of the columns.

        Returns:
            Iterator over places in `numbers`, and the columns of these rows.

        Raises:
            ValueError: At the end, if a row is no longer there; at any time, if the
                table cannot be read.
        """
        import pyarrow

        order = np.argsort(numbers)
        known, count = numbers[order], 0
        with self._readable():
            query = self._table.search().select([*names]).with_row_id(True)
            for batch in query.to_batches(batch_size=ROWS_AT_ONCE):
                rows = pyarrow.Table.from_batches([batch])
                found = rows["_rowid"].to_numpy().astype(np.int64)
                places = np.searchsorted(known, found).clip(max=len(known) - 1)
                wanted = known[places] == found
                columns = {name: _to_numpy(rows[name])[wanted] for name in names}
                count += int(wanted.sum())
                yield order[places[wanted]], columns
        self._check_found(count, len(numbers))

    def _check_found(self, found: int, wanted: int) -> None:
        if found < wanted:
            raise ValueError(
                f"{wanted - found} of {wanted} images in '{self._folder}' have been "
                "replaced or dropped since they were listed: `refresh` the index."
            )

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"The table in '{self._folder}' cannot be read: {_first_line(error)} "
                "If it was tidied meanwhile, open it again; if it is damaged, make the "
                "index anew, in another folder."
            ) from error

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"'{self._folder}' cannot be written: {_first_line(error)} What was "
                "written before stays. Make room, and run the same command again."
            ) from error


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    line = re.sub(r", /\S+\.rs:\d+:\d+", "", line)  # where in Lance it happened
    return line if line.endswith(".") else f"{line}."


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
