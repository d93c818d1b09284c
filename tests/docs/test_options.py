"""The pages of options hold what the parsers know."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from _ext import options

from stellar_cli.__main__ import COMMANDS, EVALUATE
from stellar_cli.tasks import TASKS


def rows_under(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    text = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


class TestOption:
    def test_option__argparse(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("photo", help="a *photo*")
        parser.add_argument("--top", type=int, default=20, help="of `TOP` [0, 1)")
        parser.add_argument("--by", choices=("mean", "cls"), required=True)
        parser.add_argument("--all", action="store_true", help=f"in {Path.home()}/a")
        parser.add_argument("--hidden", help=argparse.SUPPRESS)

        rows = [options.option_of(a, a.default) for a in options.listed(parser)]

        assert rows == [
            ("`PHOTO`", "text", "required", r"a \*photo\*"),
            ("`--top`", "int", "`20`", r"of `TOP` \[0, 1)"),
            ("`--by`", "`mean`, `cls`", "required", ""),
            ("`--all`", "alone", "off", "in ~/a"),
        ]


@pytest.mark.slow
class TestPages:
    def test_tasks_page__has_every_option_of_every_task(self) -> None:
        page = options.tasks_page()

        shared = {row[0] for row in rows_under(page, "Options of every task")}
        assert {"`--model`", "`--seed`", "`--controls`"} <= shared
        for task in TASKS:
            actions = options.listed(options.parser_of("evaluate", task))
            own = [row[0] for row in rows_under(page, task)]
            names = {f"`{options.names_of(action)[0]}`" for action in actions}
            common = shared if "`--model`" in names else set()
            assert sorted(own) == sorted(names - common), task
        assert rows_under(page, "knn")[2:] == [
            ["`--neighbours`", "int", "`20`", "Number of training images that vote."],
            ["`--temperature`", "float", "`0.07`", "Temperature of the votes."],
        ]

    def test_commands_page__has_every_option_of_every_command(self) -> None:
        page = options.commands_page()

        others = {"pretrain", *(c for c in COMMANDS if COMMANDS[c][0] == EVALUATE)}
        for command in COMMANDS.keys() - others:
            actions = options.listed(options.parser_of(command))
            names = [
                ", ".join(f"`{name}`" for name in options.names_of(action))
                for action in actions
            ]
            assert [r[0] for r in rows_under(page, f"stellar {command}")] == names

    def test_pretrain_page__has_every_option_with_the_recipes_defaults(self) -> None:
        page = options.pretrain_page()

        for recipe in ("photos", "photos_prior"):
            parser = options.parser_of("pretrain", "--config", recipe)
            for action in options.listed(parser):
                assert f"`{options.names_of(action)[0]}`" in page
        # base.yaml's, where the code has 32 and None.
        assert "| `--data.batch_size` | int | `128` |" in page
        assert "| `--trainer.gradient_clip_val` |  | `3.0` |" in page
