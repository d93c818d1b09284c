from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lightly_ext.demo.boards import (
    EMPTY,
    FILL_PROBABILITY,
    Boards,
    BoardSets,
    make_board_sets,
    make_boards,
    split_glyphs,
)


def _all(sets: BoardSets) -> list[Boards]:
    return [sets.train, sets.test, sets.train_single, sets.test_single]


class TestMakeBoardSets:
    def test_make_board_sets__shapes(self, sets: BoardSets) -> None:
        assert [len(boards) for boards in _all(sets)] == [120, 60, 100, 40]
        for boards in _all(sets):
            assert boards.images.shape == (len(boards), 60, 60, 3)
            assert boards.masks.shape == (len(boards), 60, 60)
            assert boards.images.dtype == boards.masks.dtype == np.uint8

    def test_make_board_sets__deterministic(self, sets: BoardSets) -> None:
        again = make_board_sets(0, 120, 60, 100, 40)
        for one, other in zip(_all(sets), _all(again), strict=True):
            np.testing.assert_array_equal(one.images, other.images)
            np.testing.assert_array_equal(one.masks, other.masks)
            np.testing.assert_array_equal(one.cells, other.cells)

    def test_make_board_sets__seed_matters(self, sets: BoardSets) -> None:
        other = make_board_sets(1, 120, 60, 100, 40)
        assert (sets.train.images != other.train.images).any(axis=(1, 2, 3)).all()

    def test_make_board_sets__no_digit_in_training_and_test(self) -> None:
        sets = make_board_sets(3, 2000, 500, 1300, 500)
        train = {*sets.train.cells.flat, *sets.train_single.cells.flat} - {EMPTY}
        test = {*sets.test.cells.flat, *sets.test_single.cells.flat} - {EMPTY}
        assert not train & test
        # Nearly every digit of both pools is really used.
        assert len(train) > 1290
        assert len(test) > 490

    def test_make_board_sets__number_of_classes(self, sets: BoardSets) -> None:
        for boards in (sets.train_single, sets.test_single):
            assert (boards.classes.sum(axis=1) == 1).all()
        counts = np.bincount(sets.train.classes.sum(axis=1))
        assert len(counts) == 4
        assert counts[0] == 0
        assert counts[1:].min() > 20


class TestSplitGlyphs:
    def test_split_glyphs__partition(self) -> None:
        train, test = split_glyphs(7)
        assert len(train) == 1300
        np.testing.assert_array_equal(
            np.sort(np.concatenate([train, test])), np.arange(1797)
        )


class TestMakeBoards:
    def test_make_boards__labels_pixel_by_pixel(self, sets: BoardSets) -> None:
        target = load_digits().target
        boards = sets.train
        for board in range(30):
            for cell in range(25):
                rows = slice(12 * (cell // 5), 12 * (cell // 5) + 12)
                columns = slice(12 * (cell % 5), 12 * (cell % 5) + 12)
                mask = boards.masks[board, rows, columns]
                glyph = boards.cells[board, cell]
                if glyph == EMPTY:
                    assert (mask == 0).all()
                    assert boards.cell_labels[board, cell] == 0
                    continue
                label = 1 + target[glyph]
                assert boards.cell_labels[board, cell] == label
                assert set(np.unique(mask)) <= {0, label}
                # The mask is a square of 7 to 12 px.
                inside = np.argwhere(mask == label)
                height, width = np.ptp(inside, axis=0) + 1
                assert height == width
                assert 7 <= height <= 12
                assert len(inside) == height * width

    def test_make_boards__background_is_constant_and_dark(
        self, sets: BoardSets
    ) -> None:
        for image, mask in zip(sets.train.images, sets.train.masks, strict=True):
            background = image[mask == 0]
            assert (background == background[0]).all()
            assert background[0].max() < 60
            # Nearly neutral, and the digits are bright.
            assert int(np.ptp(background[0].astype(int))) <= 12
            assert image[mask > 0].max() > 140

    def test_make_boards__every_board_has_a_digit(self) -> None:
        glyphs = np.arange(1797)
        boards = make_boards(2000, glyphs, max_classes=1, seed=(0,))
        filled = boards.cells != EMPTY
        assert filled.any(axis=1).all()
        assert filled.mean() == pytest.approx(FILL_PROBABILITY, abs=0.01)

    def test_make_boards__uses_only_the_pool(self) -> None:
        pool = np.flatnonzero(load_digits().target < 10)[::7]
        boards = make_boards(50, pool, max_classes=3, seed=(1,))
        assert set(boards.cells.flat) - {EMPTY} <= set(pool.tolist())

    def test_make_boards__bad_input(self) -> None:
        glyphs = np.arange(1797)
        with pytest.raises(ValueError, match="num_boards must be at least 1, got 0"):
            make_boards(0, glyphs, max_classes=1, seed=(0,))
        with pytest.raises(ValueError, match="max_classes must be in 1 to 10, got 11"):
            make_boards(1, glyphs, max_classes=11, seed=(0,))
        without_three = np.flatnonzero(load_digits().target != 3)
        with pytest.raises(ValueError, match=r"lacks the digit classes \[3\]"):
            make_boards(1, without_three, max_classes=1, seed=(0,))


class TestBoards:
    def test_getitem__slices_everything(self, sets: BoardSets) -> None:
        part = sets.train[10:14]
        assert len(part) == 4
        np.testing.assert_array_equal(part.images, sets.train.images[10:14])
        np.testing.assert_array_equal(part.classes, sets.train.classes[10:14])

    def test_classes__from_masks(self, sets: BoardSets) -> None:
        for mask, classes in zip(sets.train.masks, sets.train.classes, strict=True):
            present = set(np.unique(mask)) - {0}
            assert present == set(1 + np.flatnonzero(classes))
