"""`stellar index`: keeps the tokens of a folder of images, for `stellar search`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lightly_ext.data.streams import find_splits
from lightly_ext.durable import remove_partial
from lightly_ext.evaluate.command_line import command_parser, parse, take
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import unreadable_text
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, folder_images
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.options import check_positive, check_writable
from lightly_ext.evaluate.sizes import described_cut
from lightly_ext.run_lock import RunLock
from lightly_ext.search.encoding import ImageEncoder
from lightly_ext.search.entries import Entries
from lightly_ext.search.freshness import Changes, IndexedImages, find_changes
from lightly_ext.search.image_index import ImageIndex
from lightly_ext.search.index_card import CARD_NAME, IndexCard
from lightly_ext.search.places import create_index, open_index
from lightly_ext.search.store import ROWS_AT_ONCE, import_lancedb
from stellar_plugin.wording import are, counted

# What a kill costs at most, beside `ROWS_AT_ONCE` images.
SECONDS_BETWEEN_WRITES = 60.0
# Of the images of an index: as many lie in a folder that has moved.
SAME_IMAGES = 0.5


def main(argv: Sequence[str]) -> None:
    """Runs `stellar index`.

    Args:
        argv:
            Its options.

    Raises:
        OptionError: If there is no such option, or its value is of another kind.
    """
    parser = command_parser(
        "stellar index", "Keeps the tokens of a folder of images, for `stellar search`."
    )
    parser.add_function_arguments(load_frozen_model, skip={"seed"})
    parser.add_class_arguments(Devices)
    parser.add_function_arguments(run_index, skip={"model", "devices"})
    values = parse(parser, argv, run_index, load_frozen_model)
    devices = Devices(**take(values, Devices))
    model = {**take(values, load_frozen_model), "seed": devices.seed}
    run_index(model, devices, **values)


def run_index(
    model: Mapping[str, Any],
    devices: Devices,
    data: str,
    output: str,
    clusters: int | None = None,
    crop: int | None = None,
    limit: int | None = None,
    server: str | None = None,
) -> ImageIndex:
    """Makes an index of the tokens of images, or brings one up to date.

    Images that are new or have changed are computed, those that are gone are dropped,
    unreadable ones are tried again. What was written before a kill stays.

    Args:
        model:
            Arguments of `load_frozen_model`.
        devices:
            Where it runs.
        data:
            Folder of images, nested to any depth.
        output:
            Folder of the index; with --server its name.
        clusters:
            Keep so many clusters of patches of each image. None keeps the tokens of a
            model that has them, else 16 clusters.
        crop:
            Side of the square in px that an image is resized and cut to. None takes the
            model's own, else 224.
        limit:
            Compute at most so many images, spread over the folder; the next run goes on
            with the others.
        server:
            URL of a Qdrant server that keeps the index, http://host:6333. Its key, if
            it asks for one, is the environment variable QDRANT_API_KEY.

    Raises:
        ModuleNotFoundError: If LanceDB, or the client of Qdrant, is not installed.
        ValueError: If an option is impossible, there is no image, or the index is of
            other tokens or images.
        RuntimeError: If another process writes into the index, no image can be read, or
            the features of one are not finite.
        OSError: If the index cannot be written.
    """
    files = check_index(data, output, clusters, crop, limit, server)
    arguments = _anywhere(model)
    loaded = load_frozen_model(**arguments)
    devices.say(loaded.origin.reading)
    encoder = ImageEncoder.of(loaded, devices, crop, clusters, devices.seed)
    cut = described_cut(encoder.protocol)
    devices.say(f"Of each image: {encoder.cut.kind}. Images: {cut}.")
    card = encoder.card(files.root, arguments)
    with RunLock(Path(output)) if server is None else contextlib.nullcontext():
        index = _open(devices, output, server, card, files)
        update_index(index, encoder, files, limit)
        devices.fabric.barrier()
    return index


def check_index(
    data: str,
    output: str,
    clusters: int | None = None,
    crop: int | None = None,
    limit: int | None = None,
    server: str | None = None,
) -> ImageFiles:
    """Checks all that needs no model, and finds the images.

    Args: As for `run_index`.
    """
    check_positive(clusters=clusters, crop=crop, limit=limit)
    if find_splits(data) is not None:
        raise ValueError(
            f"An index is of image files, which `stellar search` looks at again, and "
            f"'{data}' has none: unpack it into a folder (tar xf) and name that."
        )
    if server is None:
        import_lancedb()
        _check_folder(Path(output), Path(data))
    else:
        with contextlib.suppress(FileNotFoundError):
            open_index(output, server)
    return folder_images(Path(data))


def _check_folder(folder: Path, root: Path) -> None:
    """Checks that the folder of an index is one, or may become one."""
    check_writable(folder)
    places = folder.resolve(), root.resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise ValueError(
            f"The index '{folder}' and the images '{root}' lie in one another: name "
            "another folder with --output, beside that of the images."
        )
    if (folder / CARD_NAME).is_file():
        IndexCard.load(folder)
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise ValueError(
            f"'{folder}' is a folder of something else than an index: name another one "
            "with --output, new or empty."
        )


class Writer:
    """Writes entries some at a time, in the background; on leaving, what is left.

    Args:
        index:
            Where they go.
    """

    def __init__(self, index: ImageIndex) -> None:
        self._index = index
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._entries: list[Entries] = []
        self._since = time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._thread:
            self._write()
            self._wait()

    def put(self, entries: Entries) -> None:
        """Takes entries.

        Raises:
            OSError: If earlier ones could not be written.
        """
        self._entries.append(entries)
        many = sum(map(len, self._entries)) >= ROWS_AT_ONCE
        if many or time.monotonic() - self._since > SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        self._wait()  # memory holds two parts at most
        if self._entries:
            entries = Entries.joined(self._entries)
            self._writing = self._thread.submit(self._index.put, entries)
        self._entries, self._since = [], time.monotonic()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _anywhere(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `load_frozen_model` that name files from any folder."""
    files = {
        name: str(Path(model[name]).absolute())
        for name in ("model", "weights")
        if model.get(name) and Path(model[name]).exists()
    }
    return {**model, **files}


def _open(
    devices: Devices,
    output: str,
    server: str | None,
    card: IndexCard,
    files: ImageFiles,
) -> ImageIndex:
    """Makes or opens the index in the first process, then opens it in the others."""
    if devices.rank == 0:
        if server is None:
            remove_partial(Path(output))
        try:
            there = open_index(output, server)
        except FileNotFoundError:
            pass
        else:
            _check_images(there, card, files)
        index = create_index(output, card, server)
    devices.fabric.barrier()
    return index if devices.rank == 0 else open_index(output, server)


def _check_images(index: ImageIndex, card: IndexCard, files: ImageFiles) -> None:
    """Checks that another folder has the images of an index: that it has moved."""
    if index.card.images == card.images or not len(index):
        return
    contents, same = index.contents(), 0
    for name in contents.keys() & {*files.names}:
        path = files.root / name
        same += path.is_file() and path.stat().st_size == contents[name][0][0]
    if same < SAME_IMAGES * len(index):
        raise ValueError(
            f"The index in '{index.place}' is of the images in '{index.card.images}', "
            f"of which '{files.root}' has {same} of {len(index)}: with --data "
            f"'{files.root}' the others would be dropped. Name another --output for "
            "these images, or the folder that those have moved to."
        )


def update_index(
    index: ImageIndex, encoder: ImageEncoder, files: ImageFiles, limit: int | None
) -> None:
    """Brings an index up to date with its images, see `run_index`.

    Args:
        index:
            The index, which nobody else writes into.
        encoder:
            Made its tokens.
        files:
            The images.
        limit:
            As for `run_index`.
    """
    devices = encoder.devices
    changes = devices.of_first(lambda: find_changes(index.contents(), files))
    todo = sorted([*changes.new, *changes.changed])
    wanted = files[todo].limited(limit)
    devices.say(_told(files, changes, len(wanted)))
    if devices.rank == 0:
        index.drop(changes.gone)
        index.restamp(changes.touched)
    devices.fabric.barrier()
    index.refresh()
    unreadable = _fill(index, encoder, wanted) if len(wanted) else []
    devices.fabric.barrier()
    if devices.rank == 0:
        index.refresh()
        # Their tokens are of what the files were once.
        index.drop([*{*index.files} & {wanted.names[i] for i in unreadable}])
        index.tidy()
    devices.fabric.barrier()
    index.refresh()
    if unreadable:
        devices.say(f"Skipped: {unreadable_text(wanted, unreadable)}.")
    if not len(index):
        raise RuntimeError(
            f"No image in '{files.root}' could be read: nothing is kept."
        )
    devices.say(_summary(index))


def _told(files: ImageFiles, changes: Changes, num_wanted: int) -> str:
    new, changed = len(changes.new), len(changes.changed)
    same, gone = len(files) - new - changed, len(changes.gone)
    text = (
        f"'{files.root}' has {counted(len(files), 'image')}: {new} new, {changed} "
        f"changed, {same} as indexed; {gone} {are(gone)} gone."
    )
    if num_wanted < new + changed:
        left = new + changed - num_wanted
        text += f" {left} {are(left)} left for the next run (--limit)."
    return text


def _summary(index: ImageIndex) -> str:
    sizes = index.sizes().double()
    seen = (sizes.amin(dim=1) / sizes.amax(dim=1)).mean()
    text = f"{counted(len(index), 'image')} in '{index.place}'"
    num_bytes = index.num_bytes
    if num_bytes is not None:
        text += (
            f": {num_bytes / 1e6:.1f} MB, {num_bytes / len(index) / 1e3:.1f} kB each"
        )
    return f"{text}. The model sees {seen:.0%} of their area, the square in the middle."


def _fill(index: ImageIndex, encoder: ImageEncoder, files: ImageFiles) -> Sequence[int]:
    """Computes images, each process its share; returns numbers of unreadable ones."""
    devices = encoder.devices
    images = IndexedImages(EvaluationImages(files, encoder.transform))
    # Forks of this process may hang: threads of LanceDB hold locks as they begin. Those
    # of a fork server would outlive a run that is killed.
    loader = devices.loader(images, start_method="spawn")
    unreadable = torch.zeros(len(files), dtype=torch.int32)
    with Writer(index) as writer:
        batches: Iterable[Any] = devices.progress(loader, "images", len(loader))
        for batch in batches:
            readable = batch.sample.readable
            unreadable[batch.sample.number[~readable]] = 1
            if readable.any():
                writer.put(_entries(encoder, files, batch))
    moved = devices.fabric.to_device(unreadable)
    found: Any = devices.fabric.all_reduce(moved, reduce_op="sum")
    return found.nonzero().flatten().tolist()


def _entries(encoder: ImageEncoder, files: ImageFiles, batch: Any) -> Entries:
    """What is kept of the readable images of a batch of `IndexedSample`."""
    readable = batch.sample.readable
    images, numbers, _, sizes = (value[readable] for value in batch.sample)
    names = [files.names[i] for i in numbers.tolist()]
    parts, cls = encoder.checked(images, names)
    return Entries(
        names,
        parts.vectors.cpu(),
        parts.masses.cpu(),
        parts.maps.cpu(),
        parts.vectors.mean(dim=1).cpu(),
        cls.cpu(),
        sizes,
        batch.stamp[readable],
        batch.hash[readable],
    )
