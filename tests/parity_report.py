"""`python -m tests.parity_report`: the table of docs/parity.md."""

from __future__ import annotations

import sys

from tests import parity


def main() -> None:
    report = parity.rows()
    print(parity.table(report))
    beyond = [row.quantity for row in report if not row.is_within]
    if beyond:
        sys.exit(f"Beyond its tolerance: {', '.join(beyond)}.")


if __name__ == "__main__":
    main()
