"""What can be read instead of a folder of images: tars, parquet, arrow, the hub."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightly_ext.data.listing import EXTENSIONS, printable

HUB = "hf:"
# Builder of `datasets` by the suffix of its files.
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# As `datasets` finds splits in the names of files and folders.
_SPLIT = re.compile(
    r"(?<![a-z])(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)(?![a-z])",
    re.IGNORECASE,
)
_SHOWN = 5
_SAVED_SPLITS = "dataset_dict.json"


@dataclass(frozen=True)
class Source:
    """Shards of images: tars, parquet or arrow files.

    Attributes:
        name:
            As it was given, for messages.
        builder:
            Name of what reads them in `datasets`: "webdataset", "parquet" or "arrow".
            For data sets of the hub it may be another one.
        files:
            Sorted paths, or addresses that `fsspec` opens; at least one.
        dataset:
            Name on the hub, or folder, that `datasets.load_dataset` takes; None for
            files that were named.
        config:
            Its configuration, None for the only one.
        split:
            Its split.
    """

    name: str
    builder: str
    files: tuple[str, ...]
    dataset: str | None = None
    config: str | None = None
    split: str | None = None


def find_source(text: str | os.PathLike[str]) -> Source | None:
    """Finds the shards that a text names.

    That is a tar, parquet or arrow file, several by wildcards (`'shards/*.tar'`) or
    braces (`shards/{000..127}.tar`), a folder that holds such files and no images, or
    `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` of the Hugging Face hub, where
    a local folder that `datasets.load_dataset` takes may stand for the name.

    Args:
        text:
            As given on the command line.

    Returns:
        The shards. None for what is none of it, as a folder of images.

    Raises:
        ValueError: If nothing matches, kinds of files are mixed, a file is of no kind,
            or there is no such data set, configuration or split.
        ImportError: If the extra [stream] is needed and missing.
        OSError: If the hub cannot be reached.
    """
    text = os.fspath(text)
    if text.startswith(HUB):
        return _hub_source(text)
    if os.path.isdir(text):
        return _folder_source(text)
    # A file may have a name that looks like a pattern.
    paths = [text] if os.path.exists(text) else _matching(text)
    if not paths:
        return None
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return _folder_source(paths[0])
    return Source(text, _builder(text, paths), tuple(paths))


def find_splits(text: str | os.PathLike[str]) -> dict[str, Source] | None:
    """Finds the splits of a data set, where :func:`find_source` wants one of them.

    Splits of files are in their names, or in those of their folders, such as
    train-0000.tar and val/0000.tar. Behind `hf:NAME:` may also stand a configuration.

    Args:
        text:
            As for :func:`find_source`.

    Returns:
        The splits by name, in small letters; "" is all there is, where none is named.
        None for what is none of it, as a folder of images.

    Raises:
        ValueError: As :func:`find_source`, or if some files are of no split.
        ImportError: If the extra [stream] is needed and missing.
        OSError: If the hub cannot be reached.
    """
    text = os.fspath(text)
    if text.startswith(HUB):
        return _hub_splits(text)
    if os.path.isfile(os.path.join(text, _SAVED_SPLITS)):
        names = _saved_splits(text)
        saved = {name: _folder_source(os.path.join(text, name)) for name in names}
        return {name.lower(): part for name, part in saved.items() if part}
    if os.path.isdir(text):
        paths = _saved_files(text) or sorted(_shards_below(text))
    else:
        source = find_source(text)
        paths = list(source.files) if source else []
    if not paths:
        return None
    splits = _splits(paths)
    if "" in splits and len(splits) > 1:
        raise ValueError(
            f"{printable(text)} holds the splits {', '.join(sorted(splits)[1:])}, and "
            f"files of none: {_some(splits[''])}. Name the files as the others, or "
            "move them away."
        )
    return {
        name: Source(text, _builder(text, of_split), tuple(of_split))
        for name, of_split in splits.items()
    }


def _splits(paths: list[str]) -> dict[str, list[str]]:
    """Files by their splits; all as "" where they are of no more than one."""
    # Names of folders that all of them lie in tell nothing.
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    splits: dict[str, list[str]] = {}
    for path in paths:
        match = _SPLIT.search(os.path.relpath(path, folder or "."))
        splits.setdefault(match[0].lower() if match else "", []).append(path)
    return splits if len(splits.keys() - {""}) > 1 else {"": paths}


def _matching(text: str) -> list[str]:
    """Sorted paths that a pattern stands for; none if it is no pattern."""
    names = list(_expanded(text))
    if len(names) == 1 and not glob.has_magic(text):
        if text.lower().endswith((*BUILDERS, *_COMPRESSED)):
            raise ValueError(f"There is no file {printable(text)}.")
        return []
    found, missing = set[str](), []
    for name in names:
        matches = glob.glob(name, recursive=True)
        found.update(matches)
        if not matches:
            missing.append(name)
    if missing and len(names) > 1:
        raise ValueError(
            f"{len(missing)} of the {len(names)} files that {printable(text)} stands "
            f"for are missing: {_some(missing)}."
        )
    if missing:
        raise ValueError(
            f"No file matches {printable(text)}. Is the folder right, and the pattern "
            "in quotes?"
        )
    return sorted(found)


def _expanded(text: str) -> Iterator[str]:
    """What braces stand for, a{1..3}b or a{x,y}b, as in a shell."""
    for match in _BRACES.finditer(text):
        span = _RANGE.fullmatch(match[1])
        if span:
            first, last = sorted(map(int, span.groups()))
            width = max(len(s) if s.startswith("0") else 0 for s in span.groups())
            values = [f"{number:0{width}}" for number in range(first, last + 1)]
        elif "," in match[1]:
            values = match[1].split(",")
        else:
            continue
        for value in values:
            yield from _expanded(text[: match.start()] + value + text[match.end() :])
        return
    yield text


def _builder(text: str, paths: list[str]) -> str:
    """The one kind of files; refuses none and several."""
    found: dict[str, list[str]] = {}
    for path in paths:
        name = path.lower()
        suffix = next((s for s in _COMPRESSED if name.endswith(s)), None)
        found.setdefault(suffix or os.path.splitext(name)[1], []).append(path)
    for suffix in found.keys() & set(_COMPRESSED):
        raise ValueError(
            f"{printable(found[suffix][0])} is compressed, so that none of its images "
            "can be read without all before it, and images gain nothing from it. "
            "Unpack it to a plain .tar."
        )
    others = found.keys() - BUILDERS.keys()
    if len(found) > 1 or others:
        counts = ", ".join(
            f"{len(names)} {suffix or 'without suffix'} ({printable(names[0])})"
            for suffix, names in sorted(found.items())
        )
        raise ValueError(
            f"{printable(text)} must name tars (.tar), parquet (.parquet) or arrow "
            f"files (.arrow), of one kind, or a folder of images; it names {counts}."
        )
    return BUILDERS[next(iter(found))]


def _folder_source(folder: str) -> Source | None:
    """The shards below a folder; None if there is none, or there are images."""
    saved = _saved_files(folder)
    paths = saved or sorted(_shards_below(folder))
    if not paths:
        return None
    splits = _splits(paths)
    splits.pop("", None)
    if len(splits) > 1:
        one = "train" if "train" in splits else min(splits)
        raise ValueError(
            f"{printable(folder)} holds the splits {', '.join(sorted(splits))}: name "
            f"one, {HUB}{printable(folder)}:{one}, or its files, such as "
            f"'{printable(splits[one][0])}', with * for several."
        )
    return Source(folder, _builder(folder, paths), tuple(paths))


def _saved_files(folder: str) -> list[str]:
    """Files of a folder that `save_to_disk` wrote: others there are caches."""
    if os.path.isfile(os.path.join(folder, _SAVED_SPLITS)):
        splits = _saved_splits(folder)
        if len(splits) == 1:
            return _saved_files(os.path.join(folder, splits[0]))
        raise ValueError(
            f"{printable(folder)} holds the splits {', '.join(splits)}: name one, "
            f"{printable(os.path.join(folder, splits[0]))}."
        )
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
        return []
    files = _read_json(state).get("_data_files", [])
    return [os.path.join(folder, file["filename"]) for file in files]


def _saved_splits(folder: str) -> list[str]:
    splits = _read_json(os.path.join(folder, _SAVED_SPLITS)).get("splits", [])
    return list(map(str, splits))


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _shards_below(folder: str) -> list[str]:
    """Shards at any depth; none where there is an image."""
    paths, seen = [], set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may go in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in names:
            suffix = os.path.splitext(name.lower())[1]
            if name.startswith("."):
                continue
            if suffix in EXTENSIONS:
                return []
            # Compressed ones are refused, not left out in silence.
            if suffix in BUILDERS or name.lower().endswith(_COMPRESSED):
                paths.append(os.path.join(place, name))
    return paths


def _hub_source(text: str) -> Source:
    """Files of a data set that `datasets` knows, by its configuration and split."""
    name, *rest = text.removeprefix(HUB).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise ValueError(
            f"{printable(text)} should be {HUB}NAME, {HUB}NAME:SPLIT or "
            f"{HUB}NAME:CONFIG:SPLIT."
        )
    config = rest[0] if len(rest) == 2 else None
    if os.path.isfile(os.path.join(name, _SAVED_SPLITS)):
        split = _split(text, rest[-1:], _saved_splits(name))
        files = _saved_files(os.path.join(name, split))
        return Source(text, "arrow", tuple(files))
    builder = _dataset_builder(text, name, config)
    found = builder.config.data_files or {}
    split = _split(text, rest[-1:], list(map(str, found)))
    files = sorted(map(str, found[split]))
    return Source(text, builder.name, tuple(files), name, config, split)


def import_datasets(text: str) -> Any:
    """Imports `datasets`, which only some sources need.

    Args:
        text:
            The source, for the error.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{printable(text)} needs the library `datasets`: "
            "pip install 'stellar-plugin[stream]'."
        ) from error
    return datasets


def _hub_splits(text: str) -> dict[str, Source]:
    """Splits of a data set that `datasets` knows: the named one, else all."""
    name, *rest = text.removeprefix(HUB).split(":")
    config = rest[0] if len(rest) == 1 else None
    if rest or not name:
        try:
            return {rest[-1].lower() if rest else "": _hub_source(text)}
        except ValueError:
            if config is None or not _has_config(text, name, config):
                raise
    if os.path.isfile(os.path.join(name, _SAVED_SPLITS)):
        there = _saved_splits(name)
    else:
        there = _names_of_splits(text, name, config)
    return {split.lower(): _hub_source(f"{text}:{split}") for split in there}


def _has_config(text: str, name: str, config: str) -> bool:
    try:
        return bool(_names_of_splits(text, name, config))
    except ValueError:
        return False


def _names_of_splits(text: str, name: str, config: str | None) -> list[str]:
    return list(map(str, _dataset_builder(text, name, config).config.data_files or {}))


def _dataset_builder(text: str, name: str, config: str | None) -> Any:
    datasets = import_datasets(text)
    try:
        return datasets.load_dataset_builder(name, config)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{printable(text)} cannot be read: {error}") from error
    except OSError as error:
        raise OSError(
            f"{printable(text)}: there is no folder {printable(name)}, and the hub "
            f"cannot be reached. {error}"
        ) from error


def _split(text: str, given: list[str], there: list[str]) -> str:
    """The split that is asked for, else `train`, else the only one."""
    if given and given[0] in there:
        return given[0]
    if not given and "train" in there:
        return "train"
    if not given and len(there) == 1:
        return there[0]
    asked = f"no split {printable(given[0])}" if given else "more than one split"
    raise ValueError(
        f"{printable(text)} has {asked}. There are: {', '.join(sorted(there))}."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more
