"""The error of whatever was typed or written wrongly; by itself, so that reading results imports no torch for it."""

from __future__ import annotations


class BadConfig(ValueError):
    """A value of the command line or of a file is out of range, of the wrong type, or unknown."""
