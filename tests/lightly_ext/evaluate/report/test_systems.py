"""The systems of the paper's tables: each has a file, commands and published scores."""

from __future__ import annotations

from pathlib import Path

import pytest

import mm_configs
from lightly_ext.evaluate.report import systems
from lightly_ext.evaluate.report.published import CLIP, TABLE_2, all_published
from lightly_ext.evaluate.report.report import related
from lightly_ext.evaluate.report.systems import Row
from lightly_ext.evaluate.report.tables import build_tables
from lightly_ext.evaluate.result import Result
from stellar_cli.tasks import TASKS
from stellar_plugin.protocols import IMAGENET_TRAIN_SCALE, LINEAR_PAPER, patch_grid

PAGE = Path(__file__).parents[4] / "docs" / "models.md"
PRINTED_BY = (
    'python -c "from lightly_ext.evaluate.report import systems; '
    'print(systems.table())"'
)


def test_table__stands_in_the_docs() -> None:
    text = PAGE.read_text()
    assert PRINTED_BY in text
    assert systems.table() in text, f"print it anew: {PRINTED_BY}"


def test_rows__all_of_table_2() -> None:
    names = [row.system.name for row in systems.rows()]
    assert names == [*TABLE_2, CLIP]


def test_scores__of_table_1_and_2() -> None:
    (dino,) = (row for row in systems.rows() if row.system.name == "DINO ViT-B")
    assert systems.scores(dino.system) == {
        "ImageNet": "76.46",
        "kNN": "74.69",  # of CLS, not of the patches
        "Pets / Food / GlaS": "93.84 / 79.28 / 95.00",
        "ADE20K / Cityscapes / VOC": "26.87 / 26.82 / 79.29",
        "FID": "3.27",
    }


@pytest.mark.parametrize("row", systems.rows(), ids=lambda row: row.system.name)
class TestEverySystem:
    def test_file_and_published_scores(self, row: Row) -> None:
        assert row.system.file
        assert row.system.name in {entry.model for entry in all_published()}
        if row.system.name in TABLE_2:
            assert systems.scores(row.system)["ImageNet"] != "-"

    def test_segmentation__published_on_the_cells_of_its_map(self, row: Row) -> None:
        found = {
            entry.protocol.card()["label_resolution"]
            for entry in all_published()
            if entry.model == row.system.name
            and entry.protocol.name == "segmentation-paper"
            and entry.source == "STELLAR table 2"
        }
        assert found <= {patch_grid(row.system.stride)}

    def test_report__measured_in_the_column_above_its_published_row(
        self, row: Row
    ) -> None:
        model, size = row.system.name, row.system.size
        if model not in TABLE_2:
            pytest.skip("of CLIP the paper has other people's numbers alone")
        data = "ImageNet-1K"
        probe = LINEAR_PAPER.replace(data=data, train_scale=IMAGENET_TRAIN_SCALE)
        card = probe.replace(crop=size).card()
        result = Result("linear-paper", model, data, {"accuracy": 0.5}, card, {})
        tables = build_tables([result], related(all_published(), [result]))
        (table,) = (t for t in tables if not t.only_published)
        measured, published = table.rows[:2]
        assert (measured.title, published.model) == (model, model)
        (column,) = (c for r, c in table.cells if r == measured)
        assert (published, column) in table.cells

    def test_commands__of_tasks_and_configs_that_exist(self, row: Row) -> None:
        for command in systems.commands(row):
            words = command.split()
            assert "..." not in words
            if words[0] == "stellar":
                assert words[1] == "evaluate" and words[2] in TASKS
            else:
                assert words[-1].rstrip(')"') in mm_configs.names()
