"""The folder of a demo."""

from __future__ import annotations

from pathlib import Path

# In the folder of a demo from its start on; and what one leaves at its end.
MARK, RESULTS = ".stellar_demo", ("table.json", "table.md", "index.html")


def start_output(output: Path) -> None:
    """Makes a folder for a demo, which may replace what is in it.

    Args:
        output:
            The folder: new, empty, or that of an earlier demo, whose results go.

    Raises:
        FileExistsError: If something else is in it.
    """
    output.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in output.iterdir()} - {".lock"}
    if found and not found & {MARK, "table.json"}:
        raise FileExistsError(
            f"'{output}' is not empty and not of a demo, which would replace folders "
            "in it. Name another --output."
        )
    (output / MARK).touch()
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
