"""`stellar evaluate reconstruction` with tiny networks, as a process."""

from __future__ import annotations

import sys

from lightly_ext.evaluate import cli
from lightly_ext.evaluate.reconstruction import reconstruction
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks

if __name__ == "__main__":
    reconstruction.load_networks = tiny_networks
    cli.main(["reconstruction", *sys.argv[1:]])
