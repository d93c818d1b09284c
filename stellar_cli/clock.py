"""When a command began, before it imported what takes long."""

from __future__ import annotations

import time

began = time.monotonic()
