"""Alignment of frozen image features with a frozen text tower."""
