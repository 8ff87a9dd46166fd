"""What an algorithm says of itself: its name, fields, tier, family, controls, and its ledger, which must be true."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

from bench.algorithm import Algorithm
from bench.contract import toy
from bench.contract.promises import require
from bench.plugins.registry import ALGORITHMS
from bench.protocol.sets import FAMILIES
from bench.protocol.spelling import parse_algorithms
from bench.splits.auxiliary import NEEDS

_OF_ONES_OWN = ("send", "newcomer", "newcomer_adaptation")
"""Verbs by which a client may have something that others have not."""


def name_is_file_name(plugin: type[Algorithm]) -> None:
    """The registered name is the name of the file."""
    module = inspect.getmodule(plugin)
    assert module is not None
    stem = Path(module.__file__ or "").stem
    names = [name for name in ALGORITHMS if ALGORITHMS[name] is plugin]
    require(names == [stem], f"registered as {names}, but the file is {stem}.py")


def defaults_construct(plugin: type[Any]) -> None:
    """The class is a frozen, keyword-only dataclass whose defaults suffice and whose repr evaluates back to
    it.
    """
    parameters = getattr(plugin, "__dataclass_params__", None)
    require(parameters is not None and parameters.frozen, "not a frozen dataclass")
    algorithm = plugin()
    again = eval(repr(algorithm), {plugin.__name__: plugin})
    require(again == algorithm, f"eval(repr()) gives {again!r}, not {algorithm!r}")
    extra = set(vars(algorithm)) - {field.name for field in dataclasses.fields(algorithm)}
    require(not extra, f"holds {', '.join(sorted(extra))} besides its fields")


def tier_is_told(plugin: type[Algorithm]) -> None:
    """A method with images at the server is of tier A, or of V which says more, as it must where there is a teacher;
    tier and needs are known ones.
    """
    needs, tier = plugin().needs, plugin().tier
    unknown = needs - (NEEDS | {"body", "prior", "pooled", "teacher"})
    known = "body, prior, pooled, auxiliary, public, teacher"
    require(not unknown, f"needs {', '.join(sorted(unknown))}; what can be needed is {known}")
    require(tier in ("S", "L", "A", "V"), f"tier = {tier!r}: must be one of S, L, A, V")
    images = ", ".join(sorted(needs & NEEDS))
    require(not images or tier in ("A", "V"), f"needs {images}, which is tier A")
    require("teacher" not in needs or tier == "V", "needs teacher, which is tier V")


def family_is_known(plugin: type[Algorithm]) -> None:
    """It belongs to a named set that there is, or to none; one of ours belongs to one."""
    ours = plugin.__module__.startswith("bench.algorithms.")
    told = f"family = {plugin.family!r}: must be one of {', '.join(FAMILIES)}"
    require(plugin.family in FAMILIES or (plugin.family is None and not ours), told if ours else f"{told}, or None")


def controls_are_rows(plugin: type[Algorithm]) -> None:
    """What it must be compared with are rows that there can be, other ones than its own, each with what it answers."""
    for row, answer in plugin.controls.items():
        found = parse_algorithms(row)
        require(len(found) == 1 and found[0] != plugin(), f"controls: {row} is not one row, and another than its own")
        require(bool(answer.strip()), f"controls: {row} says nothing of what it answers")


def later_fields_have_defaults(plugin: type[Any]) -> None:
    """Fields that came later have the defaults that runs did before."""
    values = {field.name: getattr(plugin(), field.name) for field in dataclasses.fields(plugin)}
    wrong = [name for name, value in plugin.later.items() if name not in values or values[name] != value]
    require(not wrong, f"later names {', '.join(wrong)}, which is no field with that default")


def ledger(plugin: type) -> dict[str, set[str]]:
    """Read the ledger of an algorithm's module: what is kept and sent, by top-level key."""
    text = inspect.getdoc(sys.modules[plugin.__module__]) or ""
    entries: dict[str, set[str]] = {}
    for line in text.splitlines():
        for title in ("Server keeps", "Client keeps", "Down", "Up"):
            if line.startswith(title + " "):
                words = line[len(title) :].strip()
                entries[title] = set() if words == "nothing" else {word.strip() for word in words.split(",")}
    return entries


def ledger_is_true(plugin: type[Algorithm]) -> None:
    """The module's docstring lists exactly what server and client keep and send, and says where it departs
    from its source; and with what newcomers are tested, if a client has anything of its own.
    """
    entries = ledger(plugin)
    text = inspect.getdoc(sys.modules[plugin.__module__]) or ""
    own = any(getattr(plugin, verb) is not getattr(Algorithm, verb) for verb in _OF_ONES_OWN)
    newcomers = ["Newcomers"] if own or entries.get("Client keeps") else []
    titles = ["Server keeps", "Client keeps", "Down", "Up", *newcomers, "Departs"]
    missing = [title for title in titles if f"\n{title} " not in f"\n{text}"]
    require(not missing, f"the module's docstring has no line {', '.join(missing)}")
    run = toy.run(plugin(), setting=toy.SHORT)
    found: dict[str, set[str]] = {
        "Server keeps": set(run.progress.server),
        "Client keeps": set(run.store.initial),
        "Down": set(),
        "Up": set(),
    }
    for task, exchange in toy.trips(run):
        found["Down"] |= set(toy.received(run, 0, task.round))
        found["Up"] |= set(toy.upload_once(run, 0, task, exchange)[0])
    for title, keys_found in found.items():
        said = ", ".join(sorted(entries[title])) or "nothing"
        seen = ", ".join(sorted(keys_found)) or "nothing"
        require(entries[title] == keys_found, f"the ledger says {title}: {said}; found: {seen}")
