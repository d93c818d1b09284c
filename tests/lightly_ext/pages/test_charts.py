from __future__ import annotations

from lightly_ext.pages.charts import HEIGHT, WIDTH, draw_chart


class TestDrawChart:
    def test_draw_chart__parts_share_edges(self) -> None:
        parts = [{0.0: 1.0, 2.0: 3.0}, {2.0: 2.0, 4.0: 5.0}]
        chart = draw_chart("x", parts, marks={"then": 2.0}, ends=(0.0, 8.0))
        quarter, half = WIDTH / 4, WIDTH / 2
        assert chart.lines == [
            f"0.0,{HEIGHT:.1f} {quarter},{HEIGHT / 2}",
            f"{quarter},{3 * HEIGHT / 4} {half},0.0",
        ]
        assert chart.marks == {"then": quarter}
        assert (chart.low, chart.high, chart.latest) == ("1", "5", "5")
        assert (chart.first, chart.last) == (0.0, 8.0)
