"""The ledger of an algorithm must be true: what it keeps, sends and computes is measured on the toy problem."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bench import tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.contract.passes import passes
from bench.contract.promises import ContractBroken, require
from bench.plugins import ledger
from bench.sparse import weights_of
from bench.training.rounds import Run
from bench.tree import Tree

_OF_ONES_OWN = ("send", "newcomer", "newcomer_adaptation")
"""Verbs by which a client may have something that others have not."""
_ACCOUNTS = ("Server keeps", "Client keeps", "Down", "Up")
_EXAMPLES = {
    "n": sum(toy.SIZES) / len(toy.SIZES),
    "b": sum(min(size, toy.SETTING.batch_size) for size in toy.SIZES) / sum(toy.SIZES),
}
"""Of a client on average, and what share of them a batch has."""
_NEARLY = 0.1
"""By how much passes may differ from their formula: examples set aside are whole ones, and batches may be short."""


def ledger_of(algorithm: Algorithm) -> dict[str, str]:
    """Read what stands behind each title of an algorithm's ledger."""
    return ledger.sections(inspect.getdoc(sys.modules[type(algorithm).__module__]) or "")


def ledger_is_true(plugin: Callable[[], Algorithm]) -> None:
    """The module's docstring lists exactly what server and client keep, and what of it stands still, what they send, of
    what size, and how often clients go over their examples; and says where it departs from its source, and with what
    newcomers are tested, if a client has anything of its own.
    """
    algorithm = plugin()
    said = ledger_of(algorithm)
    own = any(getattr(type(algorithm), verb) is not getattr(Algorithm, verb) for verb in _OF_ONES_OWN)
    newcomers = ["Newcomers"] if own or said.get("Client keeps") not in (None, "nothing") else []
    missing = [title for title in (*_ACCOUNTS, *newcomers, "Departs") if title not in said]
    require(not missing, f"the module's docstring has no line {', '.join(missing)}")
    run = toy.run(algorithm, setting=replace(toy.SHORT, participation=1.0))
    kept: dict[str, Tree] = {"Server keeps": run.progress.server, "Client keeps": run.store.initial}
    down: Tree = {}
    up: Tree = {}
    for task, exchange in toy.trips(run):
        down |= toy.received(run, 0, task.round, exchange)
        up |= toy.upload_once(run, 0, task, exchange)[0]
    now = {"Server keeps": run.progress.server, "Client keeps": run.store[-1 if "pooled" in algorithm.needs else 0]}
    for title, tree_found in {**kept, "Down": down, "Up": up}.items():
        there, entries = ", ".join(sorted(tree_found)) or "nothing", ledger.entries(said[title])
        told = ", ".join(sorted(entries)) or "nothing"
        require(entries.keys() == tree_found.keys(), f"the ledger says {title}: {told}; found: {there}")
        if title in kept:
            _what_is_kept_moves(title, entries, tree_found, now[title])
        else:
            _sizes_are_true(title, entries, tree_found, _letters(run))
    _passes_are_true(said.get("Passes", ledger.USUAL), algorithm)


def _letters(run: Run) -> dict[str, Any]:
    """Give what the formulas of a ledger are written in, as it is for the toy problem."""
    model = run.task.init()
    size = {part: sum(leaf.numel() for leaf in tree.flatten(model[part]).values()) for part in ("body", "head")}
    known = {"C": run.task.num_classes, "d": run.task.model.feature_size, "N": run.population.training}
    known |= {} if run.task.teacher is None else {"T": run.task.teacher.shape[1]}
    known |= {ledger.LATER: 0, "weights": weights_of(model["body"]).total}
    return {**known, **size, "model": sum(size.values()), **vars(run.algorithm)}


def _value(formula: str, names: Mapping[str, Any]) -> Any:
    try:
        return ledger.value(formula, names)
    except ValueError as error:
        raise ContractBroken(f"the ledger says {error}") from error


def _what_is_kept_moves(title: str, entries: Mapping[str, str | None], first: Tree, last: Tree) -> None:
    """What server or client keep is another one after two rounds of all, unless the ledger says that it is not."""
    for key, how in entries.items():
        stands = " or ".join(ledger.STANDS)
        require(how in (None, *ledger.STANDS), f"the ledger says {title}: {key} ({how}), not {stands}")
        if how is None and tree.flatten({key: first[key]}):
            moved = tree.largest_difference({key: first[key]}, {key: last[key]}) > 0
            problem = f"the ledger says {title}: {key}, which two rounds leave as it was"
            require(moved, f"{problem}; if that is meant: {key} ({stands})")


def _sizes_are_true(title: str, entries: Mapping[str, str | None], found: Tree, letters: Mapping[str, Any]) -> None:
    """What is sent has the sizes that the ledger says; the model's parts and layers of one's own need none there."""
    for key, size in entries.items():
        thing = found[key]
        if isinstance(thing, Tensor):
            shape = tuple(thing.shape) or (1,)
            require(size is not None, f"the ledger says {title}: {key} without its shape; found: {shape}")
            told = _value(f"{size},", letters)
            require(told == shape, f"the ledger says {title}: {key} ({size}), which is {told} here; found: {shape}")
        elif size is not None or key in ("body", "head"):
            numbers = sum(leaf.numel() for leaf in tree.flatten(thing).values())
            told = _value(size or key, letters)
            same = f"{key} ({size})" if size else f"{key} as the model has it"
            require(told == numbers, f"the ledger says {title}: {same}, {told} numbers here; found: {numbers}")


def _passes_are_true(said: str, algorithm: Algorithm) -> None:
    """Clients go over their examples as often as the ledger says, whatever the epochs."""
    formulas = ledger.passes(said)
    for epochs in (1, 2):
        found = passes(algorithm, epochs)
        names = {"E": epochs, **_EXAMPLES, **vars(algorithm)}
        formula = {"before the test": "0", **{when: formulas["between"] for when in ("between", "first", "last")}}
        measured = {"first": found.first, "between": found.between, "last": found.last, "before the test": found.tuning}
        for when, one in (formula | formulas).items():
            told = _value(one, names)
            near = abs(told - measured[when]) <= _NEARLY * max(told, 1)
            problem = f"the ledger says Passes: {said}, of which {when.strip()} {told:.2f} at {epochs} epochs"
            require(near, f"{problem}; found: {measured[when]:.2f}")
