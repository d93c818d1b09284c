from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightly_ext.pages.charts import HEIGHT, MAX_POINTS, WIDTH, Chart
from lightly_ext.pretrain.run_log import RunLogger, read_log
from lightly_ext.pretrain.run_page import charts


def write_log(folder: Path, version: int, rows: list[dict[str, object]]) -> None:
    path = folder / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    names = sorted({name for row in rows for name in row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


class TestReadLog:
    def test_read_log__later_runs_win(self, tmp_path: Path) -> None:
        first = [{"step": i, "epoch": 0, "loss": 10 - i} for i in range(5)]
        write_log(tmp_path, 2, [*first, {"step": 4, "epoch": 0, "knn": 0.5}])
        # Resumed from a checkpoint after step 2; version 10 comes after version 2.
        write_log(tmp_path, 10, [{"step": 3, "loss": 1}, {"step": 5, "loss": "nan"}])
        log = read_log(tmp_path)
        assert list(log) == ["loss"]  # that knn was lost
        assert {k: log["loss"][k] for k in (0, 1, 2, 3)} == {0: 10, 1: 9, 2: 8, 3: 1}
        assert list(log["loss"]) == [0, 1, 2, 3, 5]

    def test_read_log__the_step_that_is_logged_again(self, tmp_path: Path) -> None:
        # With what its callbacks had told; other figures of it are not lost.
        rows = [{"step": i, "loss": i, "images_per_s": 9} for i in (2, 3, 4)]
        write_log(tmp_path, 0, rows)
        write_log(tmp_path, 1, [{"step": 3, "loss": 3.5}])
        speed = {2: 9.0, 3: 9.0}
        assert read_log(tmp_path) == {"loss": {2: 2, 3: 3.5}, "images_per_s": speed}

    def test_read_log__torn_last_line(self, tmp_path: Path) -> None:
        write_log(tmp_path, 0, [{"step": 0, "loss": 1, "lr": 2}])
        path = tmp_path / "version_0" / "metrics.csv"
        path.write_text(path.read_text() + "0.5,")
        assert read_log(tmp_path) == {"loss": {0: 1.0}, "lr": {0: 2.0}}

    def test_read_log__nothing_there(self, tmp_path: Path) -> None:
        assert read_log(tmp_path) == {}


class TestRunLogger:
    def test_save__a_kill_loses_no_row(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logger = RunLogger(tmp_path, name="csv")
        for step in range(3):
            logger.log_metrics({"loss": 3.0 - step}, step)
            logger.save()

        def kill(*_: object) -> None:
            raise KeyboardInterrupt

        # A new column, for which the file is written anew.
        logger.log_metrics({"knn": 0.5}, 2)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", kill)
            with pytest.raises(KeyboardInterrupt):
                logger.save()
        rows = {0: 3.0, 1: 2.0, 2: 1.0}
        assert read_log(tmp_path / "csv") == {"loss": rows}

    def test_save__new_column(self, tmp_path: Path) -> None:
        logger = RunLogger(tmp_path, name="csv")
        for row in ({"loss": 2.0}, {"knn": 0.5}, {"loss": 1.0, "knn": 0.25}):
            logger.log_metrics(row, len(row))
            logger.save()
        found = {"loss": {1: 2.0, 2: 1.0}, "knn": {1: 0.5, 2: 0.25}}
        assert read_log(tmp_path / "csv") == found


class TestCharts:
    def test_charts__groups_and_points(self) -> None:
        log = {
            "train/total": {0: 4.0, 5: 3.0, 10: 2.0},
            "knn_top1": {9: 0.6},
            "health/token_rank": {0: float("nan")},
            "lr-AdamW/pg1": {0: 0.0, 10: 1.0},
            "lr-AdamW/pg2": {0: 0.0, 10: 1.0},
            "loss": {0: 4.0},
            "other": {0: 1.0},
        }
        groups = charts(log, {"untrained": 0.4, "chance": 0.2})
        assert list(groups) == ["Loss", "Online kNN", "Optimisation", "More"]
        (loss,) = groups["Loss"]
        line = f"0.0,0.0 {WIDTH / 2},{HEIGHT / 2} {WIDTH:.1f},{HEIGHT:.1f}"
        assert loss.lines == [line]
        assert (loss.low, loss.high, loss.first, loss.last) == ("2", "4", 0, 10)
        (knn,) = groups["Online kNN"]
        assert knn.lines == ["0.0,0.0"]
        lines = {"untrained 0.4": HEIGHT / 2, "chance 0.2": float(HEIGHT)}
        assert knn.references == lines

    def test_charts__constant(self) -> None:
        for value, low, high, y in ((0.0, "0", "1", HEIGHT), (5.0, "4.5", "5.5", 60)):
            (chart,) = charts({"health/x": {0: value, 2: value}}, {})["Health"]
            assert (chart.low, chart.high) == (low, high)
            assert chart.lines == [f"0.0,{y:.1f} {WIDTH:.1f},{y:.1f}"]

    def test_charts__decades(self) -> None:
        def chart(*values: float) -> Chart:
            (found,) = charts({"health/x": dict(enumerate(values))}, {})["Health"]
            return found

        decades = chart(1e-2, 1.0, 100.0)
        middle = f"{WIDTH / 2},{HEIGHT / 2}"
        assert decades.lines == [f"0.0,{HEIGHT:.1f} {middle} {WIDTH:.1f},0.0"]
        assert decades.logarithmic
        assert not chart(0.0, 1.0, 1e4).logarithmic
        assert not chart(1.0, 1000.0).logarithmic

    def test_charts__many_points_are_means(self) -> None:
        points = {i: float(i) for i in range(100_000)}
        (chart,) = charts({"train/total": points}, {})["Loss"]
        pairs = [tuple(map(float, p.split(","))) for p in chart.lines[0].split()]
        assert len(pairs) <= MAX_POINTS + 2
        assert (pairs[0], pairs[-1]) == ((0, HEIGHT), (WIDTH, 0))
        # On a line, means are too.
        assert all(abs(x / WIDTH + y / HEIGHT - 1) < 2e-3 for x, y in pairs)
