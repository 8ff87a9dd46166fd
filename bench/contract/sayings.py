"""What an algorithm says of itself: name, fields, tier, family and controls; its ledger is in a file beside this."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.contract.accounts import ledger_of
from bench.contract.promises import require
from bench.plugins import ledger
from bench.plugins.registry import ALGORITHMS
from bench.protocol.sets import FAMILIES
from bench.protocol.spelling import parse_algorithms
from bench.splits.auxiliary import NEEDS


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
    unknown = needs - (NEEDS | {"body", "pixels", "prior", "pooled", "sgd", "teacher"})
    known = "body, pixels, prior, pooled, sgd, auxiliary, public, teacher"
    require(not unknown, f"needs {', '.join(sorted(unknown))}; what can be needed is {known}")
    require(tier in ledger.TIERS, f"tier = {tier!r}: must be one of {', '.join(ledger.TIERS)}")
    images = ", ".join(sorted(needs & NEEDS))
    require(not images or tier in ("A", "V"), f"needs {images}, which is tier A")
    require("teacher" not in needs or tier == "V", "needs teacher, which is tier V")


def family_is_known(plugin: type[Algorithm]) -> None:
    """It belongs to a named set that there is, or to none; one of ours belongs to one."""
    ours = plugin.__module__.startswith("bench.algorithms.")
    told = f"family = {plugin.family!r}: must be one of {', '.join(FAMILIES)}"
    require(plugin.family in FAMILIES or (plugin.family is None and not ours), told if ours else f"{told}, or None")


def controls_are_rows(plugin: type[Algorithm]) -> None:
    """What it must be compared with are rows that there can be, each with what it answers; and at its defaults it is
    another than they are, for clients held out at least, though maybe not in two rounds where something moves later.
    """
    if not plugin.controls:
        return
    said = ledger_of(plugin())
    later = any("(later)" in said.get(title, "") for title in ("Server keeps", "Client keeps"))
    own = _marks(plugin())
    for row, answer in plugin.controls.items():
        found = parse_algorithms(row)
        require(len(found) == 1 and found[0] != plugin(), f"controls: {row} is not one row, and another than its own")
        require(bool(answer.strip()), f"controls: {row} says nothing of what it answers")
        differs = later or _marks(found[0]) != own or _of_newcomer(found[0]) != _of_newcomer(plugin())
        require(differs, f"controls: {row} gives what it gives at its defaults")


def _marks(algorithm: Algorithm) -> tuple[object, ...]:
    """Give what two rounds of the toy problem end with."""
    outcome = toy.finish(toy.run(algorithm, setting=toy.SHORT)).outcome()
    return outcome.digest, outcome.metrics.get("personal"), outcome.metrics.get("generic")


def _of_newcomer(algorithm: Algorithm) -> str:
    """Give what a client held out is tested with after a round, of a network with running statistics."""
    setting = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, unseen=1)
    run = toy.finish(toy.run(algorithm, setting=setting))
    return tree.digest([toy.tested_models(run, len(toy.SIZES) - 1)])


def later_fields_have_defaults(plugin: type[Any]) -> None:
    """Fields that came later have the defaults that runs did before."""
    values = {field.name: getattr(plugin(), field.name) for field in dataclasses.fields(plugin)}
    wrong = [name for name, value in plugin.later.items() if name not in values or values[name] != value]
    require(not wrong, f"later names {', '.join(wrong)}, which is no field with that default")
