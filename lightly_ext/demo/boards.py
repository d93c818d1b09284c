"""Digit boards: small scenes composed from scikit-learn's 1797 handwritten digits.

A board has 60 x 60 px, a 5 x 5 grid of 12 px cells. It shows one to three digit
classes; each cell is filled with probability 0.3 with a digit of one of them, 7 to 12
px high, at a random place inside its cell, in a bright random colour on a dark, nearly
neutral background. Everything follows from the seed, and no handwritten digit that
training boards are made of appears on a test board.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import from_numpy
from torch.nn import functional as F

GRID_SIZE = 5
CELL_SIZE = 12
BOARD_SIZE = GRID_SIZE * CELL_SIZE
NUM_CELLS = GRID_SIZE**2
NUM_DIGITS = 10
FILL_PROBABILITY = 0.3
GLYPH_HEIGHTS = range(7, CELL_SIZE + 1)
NUM_TRAIN_GLYPHS = 1300
EMPTY = -1

Uint8Array = NDArray[np.uint8]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Boards:
    """Some boards and all that is known about them.

    Attributes:
        images:
            Array with shape (num_boards, 60, 60, 3), uint8, RGB.
        masks:
            Array with shape (num_boards, 60, 60), uint8. 0 is background, 1 + digit is
            the square that a digit was drawn into: strokes of two pixels are beyond a
            patch of twelve, boxes are not.
        cells:
            Array with shape (num_boards, 25), the index in `load_digits()` of the
            handwritten digit in each cell, row by row; -1 in an empty cell.
    """

    images: Uint8Array
    masks: Uint8Array
    cells: IntArray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> Boards:
        return Boards(self.images[index], self.masks[index], self.cells[index])

    @cached_property
    def cell_labels(self) -> IntArray:
        """Array with shape (num_boards, 25): 0 in an empty cell, else 1 + digit."""
        classes = _digits()[1]
        return np.where(self.cells == EMPTY, 0, 1 + classes[self.cells])

    @cached_property
    def classes(self) -> NDArray[np.bool_]:
        """Array with shape (num_boards, 10): whether a digit class is on the board."""
        return (self.cell_labels[:, :, None] == 1 + np.arange(NUM_DIGITS)).any(axis=1)


@dataclass(frozen=True)
class BoardSets:
    """The four sets of the demo.

    Attributes:
        train: Boards with one to three classes, for pretraining and for probes.
        test: Boards with one to three classes, from digits that `train` does not use.
        train_single: Boards with a single class, from the digits of `train`.
        test_single: Boards with a single class, from the digits of `test`.
    """

    train: Boards
    test: Boards
    train_single: Boards
    test_single: Boards


def make_board_sets(
    seed: int,
    num_train: int = 6000,
    num_test: int = 500,
    num_train_single: int = 1300,
    num_test_single: int = 500,
) -> BoardSets:
    """Composes the demo's training and test boards.

    Args:
        seed: Decides on everything, the split of the handwritten digits included.
        num_train: Number of training boards.
        num_test: Number of test boards.
        num_train_single: Number of training boards with a single class.
        num_test_single: Number of test boards with a single class.

    Returns:
        The four sets of boards.
    """
    train_ids, test_ids = split_glyphs(seed)
    return BoardSets(
        train=make_boards(num_train, train_ids, max_classes=3, seed=(seed, 1)),
        test=make_boards(num_test, test_ids, max_classes=3, seed=(seed, 2)),
        train_single=make_boards(
            num_train_single, train_ids, max_classes=1, seed=(seed, 3)
        ),
        test_single=make_boards(
            num_test_single, test_ids, max_classes=1, seed=(seed, 4)
        ),
    )


def split_glyphs(seed: int) -> tuple[IntArray, IntArray]:
    """Splits the 1797 handwritten digits into 1300 for training and 497 for tests."""
    order = np.random.default_rng((seed, 0)).permutation(len(_digits()[1]))
    return np.sort(order[:NUM_TRAIN_GLYPHS]), np.sort(order[NUM_TRAIN_GLYPHS:])


def make_boards(
    num_boards: int, glyph_ids: IntArray, max_classes: int, seed: tuple[int, ...]
) -> Boards:
    """Composes boards from a pool of handwritten digits.

    Args:
        num_boards: Number of boards.
        glyph_ids: Indices into `load_digits()` that may be used.
        max_classes: Each board shows 1 to `max_classes` digit classes.
        seed: Non-negative integers that decide on everything random.

    Returns:
        The boards; each has at least one digit on it.

    Raises:
        ValueError: If there is no board to make, if `max_classes` is not in 1 to 10,
            or if the pool lacks a digit class.
    """
    if num_boards < 1:
        raise ValueError(f"num_boards must be at least 1, got {num_boards}.")
    if not 1 <= max_classes <= NUM_DIGITS:
        raise ValueError(f"max_classes must be in 1 to 10, got {max_classes}.")
    rng = np.random.default_rng(seed)
    filled = _draw_filled_cells(rng, num_boards)
    classes = _draw_cell_classes(rng, num_boards, max_classes)
    glyphs = _draw_glyphs(rng, classes[filled], glyph_ids)
    ink, box = _place_glyphs(rng, glyphs)
    cells = np.full((num_boards, NUM_CELLS), EMPTY, dtype=np.int64)
    cells[filled] = glyphs
    masks = np.zeros((*filled.shape, CELL_SIZE, CELL_SIZE), dtype=np.uint8)
    masks[filled] = box * (1 + classes[filled])[:, None, None]
    return Boards(
        images=_paint(rng, filled, ink),
        masks=_join_cells(masks),
        cells=cells,
    )


@cache
def _digits() -> tuple[FloatArray, IntArray]:
    """Ink of the handwritten digits, (1797, 8, 8) in 0 to 1, and their classes."""
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


@cache
def _resized_digits(height: int) -> FloatArray:
    ink = from_numpy(_digits()[0])[:, None]
    resized = F.interpolate(ink, size=(height, height), mode="bilinear")
    return resized[:, 0].numpy()


def _draw_filled_cells(rng: np.random.Generator, num_boards: int) -> NDArray[np.bool_]:
    filled = rng.random((num_boards, NUM_CELLS)) < FILL_PROBABILITY
    # An empty board has no class to be recognised: it gets one digit.
    always = rng.integers(NUM_CELLS, size=num_boards)
    filled[np.arange(num_boards), always] |= ~filled.any(axis=1)
    return filled


def _draw_cell_classes(
    rng: np.random.Generator, num_boards: int, max_classes: int
) -> IntArray:
    """Class of each cell, (num_boards, 25), at most `max_classes` per board."""
    palette = rng.random((num_boards, NUM_DIGITS)).argsort(axis=1)
    num_classes = rng.integers(1, max_classes + 1, size=(num_boards, 1))
    choice = rng.integers(num_classes, size=(num_boards, NUM_CELLS))
    return np.take_along_axis(palette, choice, axis=1)


def _draw_glyphs(
    rng: np.random.Generator, classes: IntArray, glyph_ids: IntArray
) -> IntArray:
    """One handwritten digit of the pool for each entry of `classes`."""
    pool_classes = _digits()[1][glyph_ids]
    counts = np.bincount(pool_classes, minlength=NUM_DIGITS)
    if not counts.all():
        missing = np.flatnonzero(counts == 0).tolist()
        raise ValueError(
            f"glyph_ids lacks the digit classes {missing}; give at least one each."
        )
    by_class = glyph_ids[pool_classes.argsort(kind="stable")]
    starts = counts.cumsum() - counts
    return by_class[starts[classes] + rng.integers(counts[classes])]


def _place_glyphs(
    rng: np.random.Generator, glyphs: IntArray
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Ink and box of each digit in its cell, both (num_glyphs, 12, 12)."""
    heights = rng.integers(GLYPH_HEIGHTS.start, GLYPH_HEIGHTS.stop, size=len(glyphs))
    corners = rng.integers(0, CELL_SIZE - heights + 1, size=(2, len(glyphs)))
    ink = np.zeros((len(glyphs), CELL_SIZE, CELL_SIZE), dtype=np.float32)
    box = np.zeros(ink.shape, dtype=np.bool_)
    for height in GLYPH_HEIGHTS:
        chosen = np.flatnonzero(heights == height)
        rows = corners[0, chosen, None] + np.arange(height)
        columns = corners[1, chosen, None] + np.arange(height)
        place = (chosen[:, None, None], rows[:, :, None], columns[:, None, :])
        ink[place] = _resized_digits(height)[glyphs[chosen]]
        box[place] = True
    return ink, box


def _paint(
    rng: np.random.Generator, filled: NDArray[np.bool_], ink: FloatArray
) -> Uint8Array:
    """Mixes each digit's colour into its board's background by its ink."""
    grey = rng.uniform(0.02, 0.16, size=(len(filled), 1))
    background = (grey + rng.uniform(-0.02, 0.02, size=(len(filled), 3))).clip(0, 1)
    background = background.astype(np.float32)
    bright = rng.uniform(0.6, 1.0, size=(len(ink), 3)).astype(np.float32)
    behind = background[filled.nonzero()[0]]
    tiles = behind[:, None, None] + ink[..., None] * (bright - behind)[:, None, None]
    shape = (*filled.shape, CELL_SIZE, CELL_SIZE, 3)
    cells = np.broadcast_to(_to_uint8(background)[:, None, None, None], shape).copy()
    cells[filled] = _to_uint8(tiles)
    return _join_cells(cells)


def _to_uint8(values: FloatArray) -> Uint8Array:
    return (255 * values).round().astype(np.uint8)


def _join_cells(cells: NDArray) -> NDArray:
    """(num_boards, 25, 12, 12, ...) -> (num_boards, 60, 60, ...)."""
    num_boards, rest = len(cells), cells.shape[4:]
    grid = cells.reshape(num_boards, GRID_SIZE, GRID_SIZE, CELL_SIZE, CELL_SIZE, *rest)
    return grid.swapaxes(2, 3).reshape(num_boards, BOARD_SIZE, BOARD_SIZE, *rest)
