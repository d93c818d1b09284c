"""Photos of a try: found, split, and copied small, so that each is read once."""

from __future__ import annotations

import errno
import io
import shlex
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

from PIL import Image
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image

from lightly_ext.data import list_images, printable, read_image
from lightly_ext.data.streams import Source
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.tables import TableSplits, class_images, table_images
from lightly_ext.pretrain.derived import MEASURED_IMAGES, MIN_IMAGES, PATCHES
from stellar_plugin.image_conversion import cut_ends
from stellar_plugin.wording import are, counted

TRAIN, TESTS, BANK = "train", ("val", "test"), "bank"
# One in so many photos of a class is for testing, where the folder does not say.
TEST_PART = 5
# Photos that are used, at most: to learn from, and of them and of the others to score.
MAX_TRAIN = {"cpu": 15_000, "gpu": 100_000}
MAX_BANK, MAX_TEST = 1500, 500
# The shorter side of copies in px: less is not learned from, and views are smaller than
# the most.
LEAST_SIDE, COPIED_SIDE = min(least for least, _ in PATCHES.values()), 256
QUALITY = 95


@dataclass(frozen=True)
class PhotoSets:
    """Photos to learn from and others to test with.

    Attributes:
        folder:
            Where they were found.
        train:
            Photos to learn from.
        test:
            Photos that are not learned from.
        split:
            How the two were told apart, one sentence.
        unlabelled:
            Why there are no classes, one sentence; empty where there are.
        left_out:
            Numbers of photos that were found and are not used, by the reason.
    """

    folder: Path
    train: ImageFiles
    test: ImageFiles
    split: str
    unlabelled: str
    left_out: dict[str, int]

    @property
    def bank(self) -> ImageFiles:
        """Training photos that accuracies are computed with."""
        return limited(self.train, MAX_BANK)


def find_photos(folder: Path, most: int = MAX_TRAIN["cpu"]) -> PhotoSets:
    """Finds the photos of a folder, or of tars or parquet, and splits them.

    Subfolders `train` and `val` (or `test`) are the parts. Without, the last fifth of
    each class, in the order of names, is for testing: photos taken in a row are alike.
    The first-level subfolders are classes if they are two or more, no photo lies
    outside of them, and both parts have photos of each.

    Args:
        folder:
            Folder of photos, nested to any depth; or what `find_splits` finds.
        most:
            Photos to learn from, at most.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no photo, or too few.
    """
    tables = TableSplits.find(str(folder))
    if tables is not None:
        train, test, split = _of_tables(tables)
    elif folder.is_dir():
        train, test, split = _of_folder(folder)
    else:
        raise FileNotFoundError(
            f"'{printable(folder)}' does not exist: name a folder of photos."
        )
    used = limited(train, most), limited(test, MAX_TEST)
    left_out = {
        f"training photos beyond {most}": len(train) - len(used[0]),
        f"test photos beyond {MAX_TEST}": len(test) - len(used[1]),
    }
    left_out = {reason: number for reason, number in left_out.items() if number}
    return _checked(PhotoSets(folder, *used, split, "", left_out))


def copy_photos(photos: PhotoSets, output: Path) -> PhotoSets:
    """Reads all photos, and copies those that are readable, the large ones smaller.

    Args:
        photos:
            What `find_photos` found.
        output:
            Folder for the copies: `train`, `val`, and `bank` with what `PhotoSets.bank`
            is. Replaced.

    Returns:
        The copies.

    Raises:
        ValueError: If too few of them are readable.
    """
    shutil.rmtree(output, ignore_errors=True)
    train = _copied(photos.train, output / TRAIN)
    test = _copied(photos.test, output / TESTS[0])
    lost = len(photos.train) + len(photos.test) - len(train) - len(test)
    left_out = photos.left_out | ({"unreadable": lost} if lost else {})
    # Where other commands find them: not all read tables.
    folder = photos.folder if photos.train.rows is None else train.root
    copied = _checked(
        replace(photos, folder=folder, train=train, test=test, left_out=left_out)
    )
    for name in copied.bank.names:
        target = output / BANK / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(train.root / name, target)
    return copied


def limited(files: ImageFiles, limit: int) -> ImageFiles:
    """About as many photos, spread evenly over each class, one of each at least."""
    if len(files) <= limit:
        return files
    if files.labels is None:
        return files.limited(limit)
    chosen: list[int] = []
    for members in _by_class(files.labels):
        count = max(1, len(members) * limit // len(files))
        chosen += [members[i * len(members) // count] for i in range(count)]
    return files[sorted(chosen)]


def _of_folder(folder: Path) -> tuple[ImageFiles, ImageFiles, str]:
    parts = [folder / name for name in TESTS if (folder / name).is_dir()]
    if (folder / TRAIN).is_dir() and parts:
        train, test = (_listed(path) for path in (folder / TRAIN, parts[0]))
        return train, test, f"The folder's own split: {TRAIN} and {parts[0].name}."
    return _halves(_listed(folder / TRAIN if (folder / TRAIN).is_dir() else folder))


def _of_tables(tables: TableSplits) -> tuple[ImageFiles, ImageFiles, str]:
    train, test = tables.split("train"), tables.split("test")
    if train is None or test is None:
        return _halves(_of_source(tables.all_images("train")[1]))
    parts = (_of_source(tables.splits[name]) for name in (train, test))
    return next(parts), next(parts), f"The data's own split: {train} and {test}."


def _of_source(source: Source) -> ImageFiles:
    try:
        return class_images(source)
    except ValueError:  # an image has no class
        return table_images(source)


def _listed(folder: Path) -> ImageFiles:
    """Images of a folder, with its subfolders as classes if none lies outside."""
    names = list_images(folder)
    if not all("/" in name for name in names):
        return ImageFiles(folder, names)
    # macOS writes names of folders in another form than Linux.
    folders = [normalize("NFC", name.split("/", 1)[0]) for name in names]
    classes = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(classes)}
    return ImageFiles(folder, names, [numbers[f] for f in folders], classes)


def _halves(files: ImageFiles) -> tuple[ImageFiles, ImageFiles, str]:
    groups = _by_class(files.labels or [0] * len(files))
    tests = {i for group in groups for i in group[len(group) - _num_test(group) :]}
    train = [i for i in range(len(files)) if i not in tests]
    each = "each class" if files.labels else "the photos"
    split = f"The last fifth of {each}, in the order of names, is for testing."
    return files[train], files[sorted(tests)], split


def _num_test(group: Sequence[int]) -> int:
    return len(group) // TEST_PART or int(len(group) > 1)


def _by_class(labels: Sequence[int]) -> list[list[int]]:
    """Numbers of the photos of each class that has some."""
    groups: dict[int, list[int]] = {}
    for number, label in enumerate(labels):
        groups.setdefault(label, []).append(number)
    return list(groups.values())


def _checked(photos: PhotoSets) -> PhotoSets:
    """The same, without classes where there are none to tell apart.

    Raises:
        ValueError: If there are too few photos.
    """
    train, test = photos.train, photos.test
    if len(train) < MIN_IMAGES or not len(test):
        lost = photos.left_out.get("unreadable", 0)
        raise ValueError(
            f"There {are(len(train))} {counted(len(train), 'photo')} to learn from and "
            f"{len(test)} to test with in '{printable(photos.folder)}'"
            f"{f', {lost} {are(lost)} unreadable' if lost else ''}: fewer than "
            f"{MIN_IMAGES} cannot be learned from. Add photos, best {MEASURED_IMAGES} "
            "or more, or look at them with a model that is trained: `stellar visualize "
            f"--model stellar-b16 --data {shlex.quote(str(photos.folder))}`."
        )
    reason = photos.unlabelled or _no_classes(train, test)
    classes = () if reason else sorted(_classes(train))
    train, test = (_relabelled(files, classes) for files in (train, test))
    return replace(photos, train=train, test=test, unlabelled=reason)


def _relabelled(files: ImageFiles, classes: Sequence[str]) -> ImageFiles:
    """With labels that are places in a list of classes; without, if there are none."""
    names = [files.classes[label] for label in files.labels or ()] if classes else ()
    labels = [classes.index(name) for name in names]
    return replace(files, labels=labels or None, classes=tuple(classes))


def _classes(files: ImageFiles) -> set[str]:
    return {files.classes[label] for label in files.labels or ()}


def _no_classes(train: ImageFiles, test: ImageFiles) -> str:
    if train.labels is None or test.labels is None:
        return "The photos do not all lie in subfolders, which would be their classes."
    found = _classes(train), _classes(test)
    if len(found[0] | found[1]) == 1:
        return f"All photos are of one class, '{printable(*found[0])}'."
    single = sorted(found[0] ^ found[1])
    if single:
        names = ", ".join(map(printable, single[:3]))
        return f"Both parts must have photos of each class, only one has: {names}."
    return ""


def _copied(files: ImageFiles, folder: Path) -> ImageFiles:
    names = _names_of_copies(files)
    for parent in {(folder / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        copies: Iterable[str | None] = pool.map(
            partial(_copy, files, folder), range(len(files)), names
        )
        shown = f"reading {folder.name}"
        copied = list(track(copies, shown, len(files), transient=True))
    kept = [i for i, name in enumerate(copied) if name is not None]
    found = [name for name in copied if name is not None]
    return replace(files[kept], root=folder, names=found, rows=None)


def _names_of_copies(files: ImageFiles) -> Sequence[str]:
    """Those of the files; images of a table may have any, and are numbered."""
    if files.rows is None:
        return files.names
    names = [f"{number:06d}" for number in range(len(files))]
    if files.labels is None:
        return names
    # Names of classes may be no names of folders.
    return [f"{label:04d}/{n}" for label, n in zip(files.labels, names, strict=True)]


def _copy(files: ImageFiles, folder: Path, number: int, name: str) -> str | None:
    """Name of the copy, None if the photo cannot be read."""
    try:
        source = files.source(number)
        image = read_image(source)
        side = min(image.shape[1:])
        if isinstance(source, Path) and LEAST_SIDE <= side <= COPIED_SIDE:
            content = source.read_bytes()
        else:
            content, name = _smaller(image), f"{name}.jpg"
    except Exception:  # decoders raise anything on broken files
        return None
    try:
        (folder / name).write_bytes(content)
    except OSError as error:  # a full disk makes no photo unreadable
        if error.errno != errno.ENAMETOOLONG:
            raise OSError(f"Photos cannot be copied to '{folder}': {error}.") from error
        return None
    return name


def _smaller(image: Tensor) -> bytes:
    """A JPEG with 32 to 256 px at the shorter side."""
    size = min(max(min(image.shape[1:]), LEAST_SIDE), COPIED_SIDE)
    resized = resize_image(cut_ends(image), size=[size], antialias=True)
    content = io.BytesIO()
    picture = Image.fromarray(resized.permute(1, 2, 0).numpy())
    picture.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
