"""Files and folders that are replaced as a whole, whenever the process is killed.

What is new is written beside its place under a hidden name, flushed to the disk and
renamed. After a kill, the old or the new lies in the place, and perhaps something
hidden beside it, which `remove_partial` takes away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_model
from torch import nn

PARTIAL, REPLACED = ".partial", ".replaced"
# What system calls say where a file system has no links, no exchange, no folder sync.
UNSUPPORTED = (errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# Of linux/fs.h: both names swap their content, in one step.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def partial(path: Path) -> Path:
    """Where the new content of a path is written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left unfinished in a folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in UNSUPPORTED):
            raise
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Renames a synced file or folder over what may be there, and syncs the name."""
    os.replace(source, target)
    sync(target.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which then takes the place of a path.

    Each call has a file of its own, as several processes may replace the same path. Its
    suffix tells no format: nobody shall take for whole what a kill left.
    """
    new = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield new
        sync(new)
        move(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk does not tell
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a file of text as a whole; bytes of names that are no text are escaped."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_weights(path: Path, module: nn.Module) -> None:
    """Writes the weights of a module as a safetensors file, as a whole."""
    with replacing(path) as new:
        save_model(module, str(new))


def replace_link(link: Path, target: Path) -> None:
    """Lets a name in the folder of a file stand for it, wherever the folder moves.

    A relative symbolic link, a copy where the file system has no links.
    """
    new = partial(link)
    try:
        os.symlink(target.name, new)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        shutil.copyfile(target, new)
        sync(new)
    move(new, link)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a folder in the place of another, and removes what was there.

    Both names swap in one step where the system can. Else there are two renames;
    `finish_replacing` ends what a kill between them leaves.

    Args:
        new:
            The new folder, `partial` of the other.
        folder:
            The folder to replace. It need not exist.
    """
    for path in new.rglob("*"):
        sync(path)
    sync(new)
    if not folder.exists():
        move(new, folder)
    elif _exchange(new, folder):
        sync(folder.parent)
        shutil.rmtree(new)
    else:
        move(folder, _replaced(folder))
        finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Ends a `replace_folder` that was killed; nothing happens where none was."""
    new, replaced = partial(folder), _replaced(folder)
    if not replaced.exists():
        return
    if not folder.exists():
        move(new, folder)
    shutil.rmtree(replaced)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")


def _exchange(a: Path, b: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b))
    if rename(*names, RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))
