"""Evaluation of frozen features."""

from __future__ import annotations
