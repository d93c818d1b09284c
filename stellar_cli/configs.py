"""`stellar configs`: the configs of mmsegmentation that come with the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import mm_configs
from stellar_cli.errors import OptionError, did_you_mean, raise_errors


def main(argv: Sequence[str]) -> None:
    """Lists the configs, or prints where one is.

    Args:
        argv:
            Name of a config, or nothing.

    Raises:
        OptionError: If there is no such config.
    """
    parser = argparse.ArgumentParser(
        "stellar configs",
        description="Lists the configs of mmsegmentation, or prints where one is.",
        epilog='mim train mmseg "$(stellar configs stellar_ade20k)"',
    )
    parser.add_argument("name", nargs="?", help="config, as in the list")
    raise_errors(parser)
    name = parser.parse_args(argv).name
    names = mm_configs.names()
    if name is None:
        width = max(map(len, names)) + 2
        for listed in names:
            print(f"{listed:{width}}{mm_configs.purpose(listed)}")
    elif name.removesuffix(".py") in names:
        print(mm_configs.path(name.removesuffix(".py")))
    else:
        question = did_you_mean(name, names)
        raise OptionError(
            f"There is no config '{name}'.{question} `stellar configs` lists them."
        )
