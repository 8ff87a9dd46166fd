"""Where the recipes of each area are, in the order of the report."""

from __future__ import annotations

import importlib

AREAS = (
    "forgeries",
    "exhaustion",
    "injection",
    "notes",
    "odd_files",
    "foreign",
    "archives",
    "photographs",
    "checkpoints",
    "folders",
    "database",
    "killed",
    "full_disk",
    "surroundings",
    "command_lines",
    "guards",
    "ports",
)


_loaded: list[int] = []


def load(seed: int) -> None:
    """Enter all tries, once.

    Args:
        seed: Of those that are drawn: kills, damage.
    """
    if _loaded:
        return
    _loaded.append(seed)
    for name in AREAS:
        module = importlib.import_module(f"tests.attack.{name}")
        if hasattr(module, "draw"):
            module.draw(seed)
