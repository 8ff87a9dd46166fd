"""Policies of running statistics: that they stay at each client, and that the server keeps some of what it had."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import tree
from bench.data import LocalData
from bench.models.balanced import Balanced, is_count
from bench.models.layers import is_norm_statistic
from bench.task import Task
from bench.training.visit import Verb
from bench.tree import Tree


def taken_up(balanced: Balanced, before: Tree, after: Tree, round: int) -> Tree:
    """Have a server take up some of the running statistics that a round brought, less in each round.

    Args:
        balanced: Says how much.
        before: The server's state.
        after: The same when the round is over.
        round: 0 is the first.
    """
    if not balanced.keeps:
        return after
    rate, earlier = balanced.rate(balanced.server_momentum, float(round + 1)), tree.flatten(before)

    def of(path: str, leaf: Tensor) -> Tensor:
        moves = is_norm_statistic(path) and not is_count(path) and path in earlier
        return torch.lerp(earlier[path], leaf, rate) if moves else leaf

    return tree.map_paths(of, after)


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
