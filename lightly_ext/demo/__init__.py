"""The demo: STELLAR on boards of digits, from random weights to pictures."""

from __future__ import annotations
