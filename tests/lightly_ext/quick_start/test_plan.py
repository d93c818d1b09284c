from __future__ import annotations

import pytest

from lightly_ext.quick_start.plan import (
    Costs,
    Minutes,
    check_minutes,
    extended,
    minutes_for,
    training_seconds,
)
from lightly_ext.quick_start.training import PRIOR, STELLAR, Steps, steps_within


class TestMinutesFor:
    @pytest.mark.parametrize(
        ("number", "minutes"), [(200, 10), (1500, 10), (6000, 20), (15_000, 30)]
    )
    def test_minutes_for__square_root_of_photos(
        self, number: int, minutes: float
    ) -> None:
        found = minutes_for(number, "cpu")
        assert found.number == minutes
        assert "--minutes names another" in found.reason

    def test_minutes_for__says_what_a_gpu_does(self) -> None:
        assert minutes_for(1000, "gpu").number == 10
        assert "larger model" in minutes_for(1000, "gpu").reason


class TestTrainingSeconds:
    costs = Costs({PRIOR: 10.0, STELLAR: 20.0}, 5.0, 15.0)

    def test_training_seconds__all_else_is_paid_first(self) -> None:
        found = training_seconds(560.0, self.costs, [PRIOR, STELLAR])
        assert found == pytest.approx({PRIOR: 200.0, STELLAR: 300.0})
        # Of one stage that is left, all that is left.
        found = training_seconds(335.0, self.costs, [STELLAR])
        assert found == pytest.approx({STELLAR: 300.0})
        assert training_seconds(1.0, self.costs, []) == {}

    def test_training_seconds__some_where_the_time_is_gone(self) -> None:
        found = training_seconds(65.0, self.costs, [PRIOR, STELLAR])
        assert found == pytest.approx({PRIOR: 4.0, STELLAR: 6.0})
        assert training_seconds(-100.0, self.costs, [STELLAR]) == {STELLAR: 10.0}


class TestCheckMinutes:
    costs = TestTrainingSeconds.costs

    def test_check_minutes__names_a_time_that_is_enough(self) -> None:
        # 120 s, of which 55 are gone and 60 are for all else: 15 too few, so 3 minutes.
        said = r"^2 minutes are too .* took 55 s, .* take 60 s more\. .*--minutes 3,"
        with pytest.raises(ValueError, match=said):
            check_minutes(2.0, 65.0, self.costs, [PRIOR, STELLAR])
        check_minutes(3.0, 125.0, self.costs, [PRIOR, STELLAR])
        check_minutes(2.0, 70.0, self.costs, [PRIOR, STELLAR])

    def test_check_minutes__where_more_is_gone_than_there_was(self) -> None:
        # 6 s, of which 47 are gone: 121 s with training, 2.1 minutes.
        with pytest.raises(ValueError, match=r"^0\.1 min.* took 47 s.*--minutes 3,"):
            check_minutes(0.1, -41.0, self.costs, [PRIOR, STELLAR])


class TestExtended:
    costs = TestTrainingSeconds.costs

    def test_extended__at_least_a_share_for_training(self) -> None:
        asked = Minutes(10.0, "for photos")
        # 60 s are for all else, so 120 are left: 60 less than three tenths of it.
        found = extended(asked, 180.0, self.costs, [PRIOR, STELLAR])
        assert found.number == 11.0 and "1 more" in found.reason
        assert extended(asked, 240.0, self.costs, [PRIOR, STELLAR]) == asked
        assert extended(asked, 1.0, self.costs, []) == asked

    def test_extended__not_what_was_asked_for(self) -> None:
        asked = Minutes(10.0, "as asked for", given=True)
        assert extended(asked, 100.0, self.costs, [PRIOR, STELLAR]) == asked


class TestStepsWithin:
    def test_steps_within__knn_takes_a_tenth_at_most(self) -> None:
        # Six points would take 60 s of 100.
        assert steps_within(100.0, 1.0, 10.0) == Steps(90, 90, 180)
        assert steps_within(1000.0, 1.0, 10.0) == Steps(940, 156, 10 * 156)
        assert steps_within(1200.0, 1.0, 0.0) == Steps(1200, 200, 1800)

    def test_steps_within__one_at_least(self) -> None:
        assert steps_within(1.0, 5.0, 0.0) == Steps(1, 1, 2)
