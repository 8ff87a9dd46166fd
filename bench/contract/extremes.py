"""What a field does with numbers that nobody means: -1, 0, a thousand million, NaN. It refuses them, or lives with
them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from bench.algorithm import Algorithm
from bench.contract import toy
from bench.contract.promises import ContractBroken, require
from bench.dataset import DataMissing, Dataset
from bench.plugins import blame
from bench.plugins.registry import plugin_files
from bench.ranges import hints
from bench.training.rounds import Diverged

NEVER = (math.nan, 10**9)
"""What no field takes: what is counted would never end or fill the memory, what is measured is a slip."""
RARELY = (-1, 0)
"""What is refused, or does no harm."""
_SIZES = (12, 5, 1, 0)
_SECONDS = 60.0  # far above what the toy takes


def numbers_are_bounded(plugin: type[Any], use: Callable[[Any], object]) -> None:
    """No field takes NaN or a thousand million; whatever it takes of -1 and 0 does no harm when it is used."""
    known = {name: kinds for name, hint in hints(plugin).items() if (kinds := _numbers(hint))}
    for name, kinds in known.items():
        how = (
            f"say its range by its type: one of bench.ranges, as in {name}: {'Steps' if int in kinds else 'Strength'}, "
            f"or {name}: Annotated[{'int' if int in kinds else 'float'}, Interval(ge=0, le=1_000)]"
        )
        for value in NEVER:
            require(_made(plugin, {name: value}) is None, f"{name} = {value:,} is taken; {how}")
        others = {other: 1 for other in known if other != name and int in known[other]}  # few steps, small layers
        for value in RARELY:
            if (made := _made(plugin, {name: value})) is not None:
                problem = _problem(use, _made(plugin, {**others, name: value}) or made)
                require(problem is None, f"{name} = {value} is taken and {problem}; refuse it: {how}")


def _numbers(hint: Any) -> set[type]:
    """Give the kinds of number that a type lets a field be."""
    if get_origin(hint) is Annotated:
        return _numbers(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return set[type]().union(*map(_numbers, get_args(hint)))
    return {hint} & {int, float}


def _made(plugin: type[Any], values: dict[str, float]) -> Any | None:
    """Make an instance; None where it is refused in a sentence."""
    try:
        return plugin(**values)
    except ValueError as refusal:
        require(bool(str(refusal)), f"{_listed(values)} is refused without a word")
        return None
    except (Exception, SystemExit) as error:
        said = f"{_listed(values)} ends in {blame.told(error, plugin_files())}"
        raise ContractBroken(f"{said}; a ValueError with a sentence is wanted") from error


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value:,}" for name, value in values.items())


def _problem(use: Callable[[Any], object], made: Any) -> str | None:
    """Say what goes wrong where an instance is used, for a while at most."""
    found: list[str] = []

    def try_it() -> None:
        try:
            use(made)
        except (Diverged, DataMissing):  # which are sentences
            pass
        except (Exception, SystemExit) as error:
            found.append(f"ends in {blame.told(error, plugin_files())}")

    trial = threading.Thread(target=try_it, daemon=True)  # what does not end ends with the process
    trial.start()
    trial.join(_SECONDS)
    return f"does not end within {_SECONDS:g} seconds" if trial.is_alive() else next(iter(found), None)


def run_a_round(algorithm: Algorithm) -> None:
    """Take four clients of a few pictures, or none, through a round and its test."""
    setting = replace(toy.SETTING, clients=len(_SIZES), participation=1.0, rounds=1, epochs=1)
    toy.finish(toy.run(algorithm, setting=setting, sizes=_SIZES))


def say_facts(dataset: Dataset) -> None:
    """Ask a dataset what it says of itself; nothing is read."""
    for fact in ("num_classes", "image_shape", "mean", "std", "groups", "pictures"):
        getattr(dataset, fact)
