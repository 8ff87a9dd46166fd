"""Who may import whom: imports only go down, heavy libraries have one home each, and nothing draws from a global generator."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    "__init__": 0, "identity": 0, "keys": 0, "spelling": 0, "tree": 0,
    "algorithm": 1, "data": 1, "dataset": 1, "files": 1, "losses": 1, "models": 1, "settings": 1, "task": 1,
    "engine": 2, "evaluation": 2, "heterogeneity": 2, "longtail": 2, "metrics": 2, "partition": 2, "population": 2,
    "registry": 2, "rounds": 2, "split": 2, "toy": 2, "speed": 2,
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """Modules that a file imports anywhere, as dotted names; `from bench import tree` counts as `bench.tree`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names
