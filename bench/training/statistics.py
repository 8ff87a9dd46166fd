"""The policy that running statistics of norm layers stay at each client."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench import tree
from bench.data import LocalData
from bench.task import Task
from bench.training.visit import Verb
from bench.tree import Tree


def with_own_statistics(verb: Verb) -> Verb:
    """Keep running statistics of norm layers at the client: put its own in before, take them out after.

    That is those of the models in the first broadcast, under whatever names. What goes up under another name, or below
    `stats` and in no norm layer, is a value like any other.
    """
    return partial(_put_in_and_take_out, verb)


def _put_in_and_take_out(verb: Verb, task: Task, shared: Tree, private: Tree, data: LocalData) -> Any:
    statistics = private["statistics"]
    result = verb(task, _put_in(shared, statistics), private["own"], data)
    if not isinstance(result, tuple):
        return result
    upload, own = result
    moved, rest = tree.split(upload, tree.flatten(statistics).__contains__)
    return rest, {"own": own, "statistics": tree.merge(statistics, moved)}


def _put_in(shared: Tree, statistics: Tree) -> Tree:
    """Put statistics into the norm layers that were sent in this round."""
    sent = tree.flatten(shared)
    own, _ = tree.split(statistics, lambda path: path.rpartition(tree.STATISTICS)[0] + "bias" in sent)
    return tree.merge(shared, own)
