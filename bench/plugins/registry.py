"""Names to plug-in classes, lazily: looking through the names imports nothing, looking one up imports one
module.

Plug-ins are the files of `algorithms/`, `datasets/` and `bench/parts/`, the networks of `bench/models/`, other
distributions' entry points in the groups `bench.algorithms`, `bench.datasets`, `bench.parts` and `bench.models`, and
files named with `--plugin`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from bench.plugins import blame
from bench.plugins.names import meant, near

T = TypeVar("T", bound=type)
P = TypeVar("P")


class UnknownPlugin(LookupError):
    """No plug-in has that name; the message offers near ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class BadPlugin(ValueError):
    """A plug-in cannot be loaded, or two have one name."""


class Registry(Mapping[str, type[P]], Generic[P]):
    """Plug-ins of one kind by name.

    Args:
        kind: "algorithms", "datasets", "parts" or "models": names the folder, the entry-point group, and the word in
            messages.
        base: What plug-ins derive from, by its full name: nothing is imported for it.
        a_file_each: Whether the folder's files are plug-ins by their names; if not, its package registers its own.
    """

    def __init__(self, kind: str, base: str, a_file_each: bool = True) -> None:
        self.kind, self.base, self.a_file_each = kind, base, a_file_each
        self._classes: dict[str, type[P]] = {}

    def __getitem__(self, name: str) -> type[P]:
        name = self.meant(name)
        if name in self._classes:
            return self._classes[name]
        if name in self._files():
            importlib.import_module(f"bench.{self.kind}.{name}")
        elif name in self._classes:  # registered when its package was imported, which was now
            return self._classes[name]
        else:
            entry = self._entry_points()[name]
            loaded = entry.load()
            if isinstance(loaded, type) and name not in self._classes:
                self._classes[name] = loaded
        if name not in self._classes:
            raise BadPlugin(
                f"{self.kind}/{name} was imported and did not register {name!r}; its class needs @register({name!r})"
            )
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._files(), *self._entry_points(), *self._classes}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._classes or meant(name, self) is not None)

    def meant(self, name: str) -> str:
        """Give the name of the plug-in that was typed, in whatever case and with - for _.

        Raises:
            UnknownPlugin: There is none.
        """
        found = name if name in self._classes else meant(name, self)
        if found is None:
            raise UnknownPlugin(f"no bench.{self.kind} plug-in is called {name!r}; {near(name, self)}")
        return found

    def add(self, name: str, plugin: type[P]) -> None:
        """Enter a class under a name; another class under a taken name is an error, never a replacement."""
        if name in self._files() and not plugin.__module__.startswith(f"bench.{self.kind}."):
            raise BadPlugin(f"{name!r} of {_file(plugin)} has the name of a built-in of {self.kind}; rename it")
        known = self._classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            plugin.__module__,
            plugin.__qualname__,
        ):
            both = f"{known.__qualname__} of {_file(known)} and {plugin.__qualname__} of {_file(plugin)}"
            raise BadPlugin(f"two {self.kind} are called {name!r}: {both}; rename one")
        self._classes[name] = plugin

    def entered(self) -> dict[str, type[P]]:
        """Give the classes that are known so far, without importing any."""
        return dict(self._classes)

    def takes(self, plugin: type) -> bool:
        """Tell whether a class is of this kind."""
        return any(f"{kind.__module__}.{kind.__qualname__}" == self.base for kind in plugin.__mro__)

    def registered_by(self, module: str) -> list[str]:
        """Give the names whose class was defined in a module."""
        return sorted(name for name, known in self._classes.items() if known.__module__ == module)

    def _files(self) -> dict[str, Path]:
        package = importlib.import_module(f"bench.{self.kind}")
        if not self.a_file_each:
            return {}
        return {
            file.stem: file
            for folder in package.__path__
            for file in Path(folder).glob("*.py")
            if not file.stem.startswith("_")
        }

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in installed(self.kind)}


def installed(kind: str) -> Iterable[EntryPoint]:
    """List the plug-ins that installed packages have, of one kind."""
    places = tuple((place, _changed(place)) for place in sys.path)
    return [entry for entry in _all_installed(places) if entry.group == f"bench.{kind}"]


@lru_cache(maxsize=1)
def _all_installed(places: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """Read what all packages have, which takes a while: once, and again if one has been installed meanwhile."""
    found = entry_points()
    return [entry for group in found.groups if group.startswith("bench.") for entry in found.select(group=group)]


def _changed(place: str) -> int:
    try:
        return os.stat(place).st_mtime_ns
    except OSError:
        return 0


def _file(plugin: type) -> str:
    """Name the file that a class stands in, as it was given; of a session without files its module."""
    return getattr(sys.modules.get(plugin.__module__), "__file__", None) or plugin.__module__


def register(name: str) -> Callable[[T], T]:
    """Enter an `Algorithm`, `Dataset`, part or `Network` under its file's name."""

    def enter(plugin: T) -> T:
        for registry in REGISTRIES:
            if registry.takes(plugin):
                registry.add(name, plugin)
                return plugin
        raise BadPlugin(f"{plugin.__qualname__} is neither an Algorithm, a Dataset, a part nor a Network")

    return enter


def load_plugin(path: Path) -> list[str]:
    """Import a file of plug-ins, of whatever kind, and give the names it registered.

    Raises:
        BadPlugin: No such file, it fails when imported, or a name is taken.
    """
    module = f"bench_plugin_{path.stem}"
    if not path.is_file():
        raise BadPlugin(f"--plugin {path}: no such file")
    if path.suffix != ".py":
        raise BadPlugin(f"--plugin {path}: a file of Python is wanted, with a name that ends in .py")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if getattr(sys.modules.get(module), "__plugin_digest__", None) != digest:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        imported = importlib.util.module_from_spec(spec)
        imported.__dict__["__plugin_digest__"] = digest
        sys.modules[module] = imported  # before it runs, so that its classes pickle by reference
        try:
            spec.loader.exec_module(imported)
        except (Exception, SystemExit) as error:
            del sys.modules[module]
            if isinstance(error, BadPlugin):
                raise
            raise BadPlugin(f"--plugin {path} fails when imported: {blame.told(error)}") from error
    names = [name for registry in REGISTRIES for name in registry.registered_by(module)]
    if not names:
        raise BadPlugin(f"--plugin {path} registers nothing; its class needs @register(...)")
    return names


def plugin_files() -> set[str]:
    """Give the files of all plug-ins that were loaded, for `bench.plugins.blame`."""
    plugins = [
        plugin
        for registry in REGISTRIES
        for plugin in registry.entered().values()
        if registry.a_file_each or not plugin.__module__.startswith("bench.")  # else a library of ours
    ]
    modules = {plugin.__module__ for plugin in plugins}
    files = {file for module in modules if (file := getattr(sys.modules.get(module), "__file__", None)) is not None}
    members = (member for plugin in plugins if plugin.__module__ == "__main__" for member in vars(plugin).values())
    methods = map(inspect.unwrap, members)  # not what is ours around them
    cells = {code.co_filename for member in methods if (code := getattr(member, "__code__", None)) is not None}
    return files | (cells - {"<string>"})  # which is what a decorator made


def source_digest(plugin: type) -> str | None:
    """Give the SHA-256 of the file that `load_plugin` took a class from, or of its source where it stands elsewhere
    (see `bench.plugins.cells`); None for installed ones: they have a version.
    """
    own: str | None = vars(plugin).get("__plugin_digest__")
    return own or getattr(sys.modules.get(plugin.__module__), "__plugin_digest__", None)


def name(plugin: object) -> str:
    """Give the name that an instance's class is registered under; of an algorithm with parts all, joined by +."""
    return "+".join(map(_name, _pieces(plugin)))


def _pieces(plugin: object) -> tuple[object, ...]:
    pieces: tuple[object, ...] = getattr(plugin, "pieces", (plugin,))  # only an algorithm has parts
    return pieces


def _name(plugin: object) -> str:
    for registry in REGISTRIES:
        for known in registry.registered_by(type(plugin).__module__):
            if registry[known] is type(plugin):
                return known
    raise LookupError(f"{type(plugin).__qualname__} is not registered")


def label(plugin: object, *, without: tuple[str, ...] = ()) -> str:
    """Spell an instance as on the command line, without fields at their defaults: `fedrep(head_epochs=5)+topk`.

    Args:
        plugin: An algorithm, a dataset or a part.
        without: Fields that are left out as well.
    """
    return "+".join(_label(piece, without) for piece in _pieces(plugin))


def _label(plugin: object, without: tuple[str, ...]) -> str:
    changed = [
        f"{field.name}={value!r}"
        for field in fields(plugin)  # type: ignore[arg-type]
        if field.name not in without and (value := getattr(plugin, field.name)) != _default(field)
    ]
    return _name(plugin) + (f"({', '.join(changed)})" if changed else "")


def call(plugin: object) -> str:
    """Write an instance with the fields that it is told by, as Python does: `FedRep(head_epochs=5, body_epochs=1)`."""
    pieces = (f"{type(piece).__qualname__}({_arguments(told(piece))})" for piece in _pieces(plugin))
    return " + ".join(pieces)


def _arguments(values: Mapping[str, object]) -> str:
    return ", ".join(f"{field}={value!r}" for field, value in values.items())


def told(plugin: Any) -> dict[str, Any]:
    """Give the fields that tell an instance from others: of those that came `later` what is not as it was before."""
    later: Mapping[str, object] = getattr(plugin, "later", {})
    values = {field.name: getattr(plugin, field.name) for field in fields(plugin)}
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def _default(field: Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


# Of any class: what is looked up by name is made by keywords that a person typed.
ALGORITHMS: Registry[Any] = Registry("algorithms", "bench.algorithm.Algorithm")
DATASETS: Registry[Any] = Registry("datasets", "bench.dataset.Dataset")
PARTS: Registry[Any] = Registry("parts", "bench.part.Part")
MODELS: Registry[Any] = Registry("models", "bench.models.networks.Network", a_file_each=False)
REGISTRIES: tuple[Registry[Any], ...] = (ALGORITHMS, DATASETS, PARTS, MODELS)
