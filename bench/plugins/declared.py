"""What a plug-in's file says of it, read from its text, so that listing what there is imports none."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.plugins.registry import ALGORITHMS, PARTS, Registry


def source(kind: str, name: str) -> str | None:
    """Read a built-in plug-in's file."""
    package = importlib.import_module(f"bench.{kind}")
    files = (Path(folder) / f"{name}.py" for folder in package.__path__)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a plug-in, as its text has it."""

    name: str
    default: str
    """An expression; "" where there is none."""
    doc: str
    """The string after it, on one line."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a plug-in's file says to its reader."""

    summary: str
    """The module docstring's first paragraph, on one line."""
    documentation: str
    """The module docstring."""
    about: str
    """The class's docstring."""
    fields: tuple[Field, ...]


def text(kind: str, name: str) -> Text | None:
    """Read what a built-in plug-in's file says; None where there is no such file."""
    content = source(kind, name)
    if content is None:
        return None
    module = ast.parse(content)
    documentation = ast.get_docstring(module) or ""
    registered = [node for node in module.body if isinstance(node, ast.ClassDef) and _registers(node, name)]
    return Text(
        summary=" ".join(documentation.partition("\n\n")[0].split()),
        documentation=documentation,
        about="".join(inspect.cleandoc(ast.get_docstring(node) or "") for node in registered),
        fields=tuple(field for node in registered for field in fields(node)),
    )


def _registers(node: ast.ClassDef, name: str) -> bool:
    """Whether a class stands under `@register(name)`."""
    return any(
        isinstance(call, ast.Call) and call.args and getattr(call.args[0], "value", None) == name
        for call in node.decorator_list
    )


def fields(definition: ast.ClassDef) -> Iterator[Field]:
    """Read the fields of a class that have a docstring; class variables have none."""
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                default = "" if statement.value is None else ast.unparse(statement.value)
                yield Field(name=name, default=default, doc=" ".join(doc.split()))


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
