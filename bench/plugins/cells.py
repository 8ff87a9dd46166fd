"""Plug-ins that are in no file of their own: classes written in a notebook's cell, or in a script or module.

A result's identity must tell one version of a plug-in from the next, and workers must get it. A plug-in file has a
digest and is sent whole (`bench.plugins.registry.load_plugin`); of a class elsewhere the source is looked up, with that
of what it uses from the same place, and the class itself is sent.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import linecache
import pickle
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from bench.plugins.registry import REGISTRIES, BadPlugin, installed, register

Sent = list[tuple[str, type]]
"""Names and classes, for another process."""


def enter(plugin: type) -> None:
    """Enter a class under its own name in small letters, unless it has been entered under some name."""
    known = (registry[name] for registry in REGISTRIES for name in registry.registered_by(plugin.__module__))
    if plugin not in known:
        register(plugin.__name__.lower())(plugin)


def note_sources() -> None:
    """Look up the source of each plug-in that is in no file of its own, as it is now: it becomes part of the identity.

    Raises:
        BadPlugin: It is not known, as of a class typed at a prompt.
    """
    for _, plugin in _loose():
        plugin.__plugin_digest__ = source(plugin)  # type: ignore[attr-defined]  # a module has it too: source_digest


def packed(value: Any) -> bytes:
    """Pickle something, with the plug-ins that are in no file of their own."""
    loose = _loose()
    if not loose:
        return pickle.dumps((loose, value))
    import cloudpickle

    modules = {sys.modules[plugin.__module__] for _, plugin in loose if plugin.__module__ != "__main__"}
    for module in modules:  # a worker may not find it
        cloudpickle.register_pickle_by_value(module)
    try:
        content: bytes = cloudpickle.dumps((loose, value))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
    return content


def unpacked(content: bytes) -> Any:
    """Give what was pickled, in a worker, which enters the plug-ins that came with it."""
    loose, value = pickle.loads(content)
    for name, plugin in loose:
        register(name)(plugin)
    return value


def _loose() -> Sent:
    """List the plug-ins that are in no file of their own: neither built in, nor installed, nor of `--plugin`."""
    modules = {entry.module for registry in REGISTRIES for entry in installed(registry.kind)}
    return [
        (name, plugin)
        for registry in REGISTRIES
        for name, plugin in registry.entered().items()
        if not plugin.__module__.startswith(("bench.", "bench_plugin_")) and plugin.__module__ not in modules
    ]


def source(plugin: type) -> str:
    """Give the SHA-256 of a class's source and of the functions, classes and constants of its module that it uses.

    Raises:
        BadPlugin: The source is not known.
    """
    found: dict[str, str] = {}
    _collect(plugin, found)
    return hashlib.sha256("\n\n".join(f"{name}\n{text}" for name, text in sorted(found.items())).encode()).hexdigest()


def _collect(thing: Any, found: dict[str, str]) -> None:
    """Note the source of a class or function, and of what it refers to."""
    if thing.__qualname__ in found:
        return
    found[thing.__qualname__] = _text(thing)
    home = vars(sys.modules[thing.__module__])
    bases = [base.__name__ for base in thing.__bases__] if isinstance(thing, type) else []
    for name in sorted({*bases, *(name for code in _codes(thing) for name in _names(code))}):
        used = home.get(name)
        if isinstance(used, type | FunctionType) and used.__module__ == thing.__module__:
            _collect(used, found)
        elif isinstance(used, bool | int | float | str | tuple):
            found[name] = repr(used)


def _codes(thing: Any) -> Iterator[CodeType]:
    """Give the code of a function, or of a class's own methods: not of those that a decorator made."""
    members = vars(thing).values() if isinstance(thing, type) else [thing]
    for member in members:
        function: Callable[..., Any] | None = getattr(member, "__func__", getattr(member, "fget", member))
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType) and linecache.getlines(code.co_filename):
            yield code


def _names(code: CodeType) -> Iterator[str]:
    """Give the names that code looks up, its inner functions' too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _text(thing: Any) -> str:
    """Give the source of a class or function, its decorators included."""
    for code in _codes(thing):  # Python before 3.13 does not know where a class stands that is in no module's file
        tree = ast.parse("".join(lines := linecache.getlines(code.co_filename)))
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name != thing.__name__:
                continue
            end = node.end_lineno or node.lineno
            if end >= code.co_firstlineno:
                start = min(each.lineno for each in (node, *node.decorator_list))
                return textwrap.dedent("".join(lines[start - 1 : end])).rstrip()
    try:
        return inspect.getsource(thing).rstrip()
    except (OSError, TypeError) as error:
        raise BadPlugin(
            f"the source of {thing.__qualname__} is not known, and it is part of a result's identity; write it in a "
            "notebook's cell or in a file"
        ) from error
