"""What a plug-in's file says of it, read from its text, so that listing what there is imports none."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from bench.plugins.registry import ALGORITHMS, PARTS, Registry


def source(kind: str, name: str) -> str | None:
    """Read a built-in plug-in's file."""
    package = importlib.import_module(f"bench.{kind}")
    files = (Path(folder) / f"{name}.py" for folder in package.__path__)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


def declared(registry: Registry[Any], name: str, variable: str) -> Any:
    """Give a class variable of a plug-in; None where it says nothing, or is another distribution's and not imported."""
    if name in registry.entered():
        return getattr(registry[name], variable)
    module = ast.parse(source(registry.kind, name) or "")
    for statement in (each for node in module.body if isinstance(node, ast.ClassDef) for each in node.body):
        match statement:
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if found == variable:
                return ast.literal_eval(value)
    return None


def controls(method: str) -> dict[str, str]:
    """Give the rows that a method says it must be compared with, and what each answers; none of what is no method."""
    return dict(declared(ALGORITHMS, method, "controls") or {}) if method in ALGORITHMS else {}


def aliases() -> dict[str, str]:
    """Give the names that papers have for methods with parts, and each such row as on the command line."""
    return {alias: row for part in PARTS for alias, row in (declared(PARTS, part, "aliases") or {}).items()}
