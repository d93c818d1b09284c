"""Trains an mmseg config: `python -m stellar_plugin.mmseg.train CONFIG ...`.

Does what `mim train mmseg CONFIG ...` does, by running the same script: the training
tool that mmsegmentation ships. It knows --work-dir, --resume, --amp, --cfg-options and
--launcher.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import mmseg


def find_tool(name: str) -> Path:
    """Finds a script of the installed mmsegmentation.

    Args:
        name:
            For example "train.py".

    Raises:
        FileNotFoundError: If mmsegmentation was installed without its tools.
    """
    package = Path(mmseg.__file__).parent
    # Wheels carry the tools in .mim, a source checkout beside the package.
    for folder in (package / ".mim" / "tools", package.parent / "tools"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"mmsegmentation in '{package}' has no tools/{name}; reinstall it from a wheel."
    )


def main() -> None:
    """Runs mmsegmentation's training tool on the arguments of the command line."""
    tool = find_tool("train.py")
    sys.argv[0] = str(tool)
    runpy.run_path(str(tool), run_name="__main__")


if __name__ == "__main__":
    main()
