from __future__ import annotations

import pytest

from lightly_ext.demo.boards import BoardSets, make_board_sets


@pytest.fixture(scope="session")
def sets() -> BoardSets:
    return make_board_sets(
        0, num_train=120, num_test=60, num_train_single=100, num_test_single=40
    )
