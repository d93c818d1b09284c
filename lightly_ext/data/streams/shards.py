"""Encoded images of a shard, by their numbers: a tar, a parquet or an arrow file."""

from __future__ import annotations

import bisect
import itertools
import os
import posixpath
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.data.listing import EXTENSIONS, printable
from lightly_ext.data.streams.columns import image_column
from lightly_ext.data.streams.sources import Source
from stellar_plugin.wording import counted

# Files that are opened at once to count images, and images between two looks.
_THREADS, _ROWS_AT_ONCE = 16, 16
# Seconds between two words on the counting.
_PATIENCE = 5.0
# Its zero byte is the mark of the end of a tar.
_TAR_BLOCK = 512
# What follows the key of a sample in the names of files with its class.
CLASS_SUFFIXES = (".cls", ".json")


class Shard(ABC):
    """A file with images, each of them readable by its number.

    Attributes:
        path:
            The file, or an address that `fsspec` opens.
        num_bytes:
            Size of the file.
        without_image:
            Names of samples that have no image and are left out.
    """

    path: str
    num_bytes: int
    without_image: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abstractmethod
    def read(self, number: int) -> bytes | Path:
        """Reads an encoded image; the file where the shard only names one.

        Raises:
            OSError: If the shard cannot be read.
        """

    def read_from(self, number: int) -> Iterator[bytes | Path]:
        """Yields the images from one on."""
        return map(self.read, range(number, len(self)))

    @abstractmethod
    def name(self, number: int) -> str:
        """Returns the name of an image within the shard."""


class TarShard(Shard):
    """A tar as WebDataset writes it: the files of a sample share a name.

    Of a sample `KEY.jpg`, or what comes first in `EXTENSIONS`, is read; where no file
    is called so (`KEY.left.jpg`), every image is one of its own.

    Args:
        path:
            The file.
        named:
            Whether names are kept, and where the files of classes are. Else all
            headers are read again when one is wanted: there may be millions.
    """

    def __init__(self, path: str, named: bool = False) -> None:
        self.path = path
        self.num_bytes = os.stat(path).st_size
        listing = _list_tar(path)
        self.without_image = listing.without_image
        self._starts, self._sizes = listing.images.starts, listing.images.sizes
        self._listing = listing if named else None

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, number: int) -> bytes:
        """Reads an encoded image; see :class:`Shard`."""
        size = int(self._sizes[number])
        with _named(self.path), open(self.path, "rb") as file:
            file.seek(int(self._starts[number]))
            data = file.read(size)
            if len(data) < size:
                raise OSError(f"it ends within {self.name(number)}")
        return data

    def name(self, number: int) -> str:
        """Returns the name of the file in the tar."""
        return self.listing.images[number].name

    @property
    def listing(self) -> TarListing:
        """The images with their names, and the files of classes."""
        return self._listing or _listed_again(self.path)


class ParquetShard(Shard):
    """A parquet file with one column of images; it is read forward.

    Attributes:
        schema:
            Its `pyarrow.Schema`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with _named(path), _opened(path) as file:
            self.num_bytes = file.seek(0, os.SEEK_END)
            found = _parquet_file(file)
            meta, self.schema = found.metadata, found.schema_arrow
            groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._column = image_column(self.schema, path)
        # The first row of every row group, and the end.
        self._groups = [0, *itertools.accumulate(groups)]

    def __len__(self) -> int:
        return self._groups[-1]

    def read(self, number: int) -> bytes | Path:
        """Reads an encoded image, which takes reading what lies before it."""
        return next(self.read_from(number))

    def read_from(self, number: int) -> Iterator[bytes | Path]:
        """Yields the images from one on; few of them are in memory at a time."""
        group = bisect.bisect_right(self._groups, number) - 1
        skipped = number - self._groups[group]
        with _named(self.path), _opened(self.path) as file:
            batches = _parquet_file(file).iter_batches(
                _ROWS_AT_ONCE,
                row_groups=range(group, len(self._groups) - 1),
                columns=[self._column],
                use_threads=False,
            )
            for batch in batches:
                if skipped < len(batch):
                    yield from map(_encoded, batch.column(0)[skipped:])
                skipped = max(0, skipped - len(batch))

    def name(self, number: int) -> str:
        """Returns which row it is, from 0 on."""
        return f"row {number}"


class ArrowShard(Shard):
    """A local arrow file, as `save_to_disk` and the caches of `datasets` have them."""

    def __init__(self, path: str) -> None:
        self.path = path
        with _named(path):
            self.num_bytes = os.stat(path).st_size
            table = _arrow_table(path)
        self._len = len(table)
        self._column = image_column(table.schema, path)

    @property
    def table(self) -> Any:
        """The `pyarrow.Table`, which lies in the memory of no process."""
        return _arrow_table(self.path)

    def paths(self) -> list[str | None]:
        """Returns the names that the table has of its images."""
        from pyarrow import compute, types

        images = self.table[self._column]
        if types.is_struct(images.type) and images.type.get_field_index("path") >= 0:
            return compute.struct_field(images, "path").to_pylist()
        return [None] * len(self)

    def __len__(self) -> int:
        return self._len

    def read(self, number: int) -> bytes | Path:
        """Reads an encoded image; see :class:`Shard`."""
        with _named(self.path):
            return _encoded(_arrow_table(self.path)[self._column][number])

    def name(self, number: int) -> str:
        """Returns which row it is, from 0 on."""
        return f"row {number}"


KINDS: dict[str, type[Shard]] = {
    "webdataset": TarShard,
    "parquet": ParquetShard,
    "arrow": ArrowShard,
}


@lru_cache(maxsize=4)
def open_shards(source: Source, named: bool = False) -> tuple[Shard, ...]:
    """Looks into all shards, for the number of their images.

    Of tars every header is read, of others little but the last bytes.

    Args:
        source:
            The shards.
        named:
            Whether names of all images in tars will be wanted, see `TarShard`.

    Returns:
        Those that hold an image, in the order of their files.

    Raises:
        ValueError: If images of this kind, or from afar, cannot be told apart without
            reading all of them, if a column does not tell that it holds images, or if
            there is no image.
        OSError: If a shard is broken or cannot be read.
        ImportError: If the extra [stream] is needed and missing.
    """
    _check_kind(source)
    _check_files(source)
    kind: Callable[[str], Shard] = KINDS[source.builder]
    if kind is TarShard:
        kind = partial(TarShard, named=named)
    shards = list[Shard]()
    with ThreadPoolExecutor(_THREADS, "count") as pool:
        said = time.monotonic()
        for shard in pool.map(kind, source.files):
            shards.append(shard)
            if time.monotonic() > said + _PATIENCE:
                said = time.monotonic()
                rank_zero_only(print)(
                    f"Looked into {len(shards)} of "
                    f"{counted(len(source.files), 'file')} of {printable(source.name)}"
                    f": {counted(sum(map(len, shards)), 'image')}.",
                    flush=True,
                )
    _warn_of_samples_without_image(source, shards)
    if not any(map(len, shards)):
        raise ValueError(f"There is no image in {printable(source.name)}.")
    return tuple(shard for shard in shards if len(shard))


def _check_kind(source: Source) -> None:
    name, first = printable(source.name), printable(source.files[0])
    afar = "://" in source.files[0]
    if source.builder in KINDS and not (afar and source.builder != "parquet"):
        return
    if source.builder in KINDS:
        reason = f"{first} would have to be read as a whole to find its images"
    else:
        reason = f"it is stored as {source.builder}, which is no shard of images"
    dataset = printable(source.dataset or "NAME")
    if os.path.isdir(dataset):
        raise ValueError(
            f"{name} cannot be streamed: {reason}. To read files of images, give the "
            f"folder as it is: {dataset}."
        )
    fetch = f"hf download {dataset} --repo-type dataset"
    raise ValueError(
        f"{name} cannot be streamed: {reason}. Download it ({fetch} --local-dir FOLDER)"
        " and give the folder, or store it as parquet, which can."
    )


def _check_files(source: Source) -> None:
    for file in source.files:
        if "://" not in file and not os.path.isfile(file):
            raise FileNotFoundError(
                f"{printable(file)} is no file, or a link to one that is gone. Copy it "
                "again, or leave it out."
            )


def _warn_of_samples_without_image(source: Source, shards: list[Shard]) -> None:
    found = [(shard, name) for shard in shards for name in shard.without_image]
    if not found:
        return
    shard, name = found[0]
    rank_zero_warn(
        f"{len(found)} samples of {printable(source.name)} have no image and are left "
        f"out: {printable(f'{shard.path}/{name}')}{', ...' if found[1:] else ''}."
    )


class TarFile(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    start: int
    num_bytes: int


class TarFiles:
    """Files in a tar, in 24 bytes and a name each: there may be millions."""

    def __init__(self, files: Sequence[TarFile]) -> None:
        # Names may have any characters, whatever the system encodes.
        names = [file.name.encode("utf-8", "surrogatepass") for file in files]
        self.starts = np.array([file.start for file in files], np.int64)
        self.sizes = np.array([file.num_bytes for file in files], np.int64)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._names = b"".join(names)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> TarFile:
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index else 0
        name = self._names[start:end].decode("utf-8", "surrogatepass")
        return TarFile(name, int(self.starts[index]), int(self.sizes[index]))

    def __iter__(self) -> Iterator[TarFile]:
        return map(self.__getitem__, range(len(self)))


class TarListing(NamedTuple):
    """What the headers of a tar tell.

    Attributes:
        images: The images, in their order.
        classes: Files with a suffix of `CLASS_SUFFIXES`, in lower or upper case.
        without_image: Names of samples without an image.
    """

    images: TarFiles
    classes: TarFiles
    without_image: list[str]


def _list_tar(path: str) -> TarListing:
    images, classes = list[TarFile](), list[TarFile]()
    without = dict[str, str]()
    for key, group in itertools.groupby(
        _tar_files(path), lambda file: sample_key(file.name)
    ):
        files = [(file.name[len(key) :].lower(), file) for file in group]
        found = [file for _, file in files if _suffix(file.name) in EXTENSIONS]
        plain = [(EXTENSIONS.index(s), file) for s, file in files if s in EXTENSIONS]
        images += [min(plain, key=itemgetter(0))[1]] if plain else found
        classes += [file for suffix, file in files if suffix in CLASS_SUFFIXES]
        if not found:
            without[key] = files[0][1].name
    if without:  # images may lie elsewhere than what belongs to them
        for image in images:
            without.pop(sample_key(image.name), None)
    return TarListing(TarFiles(images), TarFiles(classes), list(without.values()))


_listed_again = lru_cache(maxsize=64)(_list_tar)


def sample_key(name: str) -> str:
    """What the files of a sample share: all up to the first dot."""
    folder, file = posixpath.split(name)
    return posixpath.join(folder, file.split(".", 1)[0])


def _suffix(name: str) -> str:
    return posixpath.splitext(name.lower())[1]


def _tar_files(path: str) -> Iterator[TarFile]:
    """Files of a tar but hidden ones; their contents are passed over."""
    with _named(path), _open_tar(path) as tar:
        member, last = tar.next(), "its start"
        while member is not None:
            last = member.name
            is_link = member.islnk() or member.issym()
            if (member.isreg() or is_link) and not _is_hidden(last):
                # Links are empty files, so that images that are links are told.
                yield TarFile(last, member.offset_data, 0 if is_link else member.size)
            tar.members = []  # type: ignore[attr-defined] # it would keep all headers
            member = tar.next()
        _check_end(path, tar.offset, last)


def _open_tar(path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.ReadError:
        if os.path.getsize(path) and tarfile.is_tarfile(path):
            raise OSError("it is compressed: unpack it to a plain .tar") from None
        raise


def _is_hidden(name: str) -> bool:
    return posixpath.basename(name).startswith(".")


def _check_end(path: str, offset: int, last: str) -> None:
    """Refuses a tar that does not end where its headers do.

    Broken headers end a tar in silence, and so does the end of the first of several.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise OSError(f"it is cut off or broken behind {last}")
        while block := file.read(2**20):
            if block.strip(b"\0"):
                raise OSError(
                    f"it goes on behind its end, at {last}, as tars do that `cat` "
                    "joined: `tar --concatenate` joins them"
                )


def _parquet_file(file: Any) -> Any:
    """An open parquet file of which little is in memory, whatever its row groups."""
    _, parquet = _pyarrow()
    return parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)


@lru_cache(maxsize=256)
def _arrow_table(path: str) -> Any:
    """An arrow file as a table that lies in the memory of no process."""
    pa, _ = _pyarrow()
    try:
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def _encoded(value: Any) -> bytes | Path:
    """Bytes of an image, or the file with them; none where there is no image."""
    image = value.as_py()
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        return Path(path) if data is None and path else data or b""
    return image or b""


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    if "://" not in path:
        with open(path, "rb") as file:
            yield file
        return
    import fsspec

    with fsspec.open(path, "rb") as file:
        yield file


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Tells of all errors in which shard they are."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and str(error).startswith(printable(path)):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"{printable(path)} cannot be read: {reason}. Copy it again, or leave it "
            "out."
        ) from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet and arrow files need the library `datasets`: "
            "pip install 'stellar-plugin[stream]'."
        ) from error
    return pyarrow, pyarrow.parquet
