"""Memory over many rounds: what lives longer than a round is the server's state and what clients keep, as the ledger
says it, and nothing else.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch

from bench import tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.system import collector

CLIENTS = 500
SETTING = replace(toy.SETTING, clients=CLIENTS, participation=0.02, rounds=60, epochs=1, eval_every=60)


def living() -> int:
    """Count the bytes of all tensors that there are, each storage once."""
    gc.collect()
    found = {}
    with warnings.catch_warnings(action="ignore"):  # of objects that warn when they are asked what they are
        for each in gc.get_objects():
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize(("name", "kept"), [("fedavg", ""), ("fedrep", "head"), ("ditto", "body, head")])
def test_after_some_rounds_only_what_clients_keep_grows(name: str, kept: str, engine: str) -> None:
    pictures = toy.Toy(train=6 * CLIENTS, test=60)
    run = toy.run(ALGORITHMS[name](), engine, setting=SETTING, sizes=(6,) * CLIENTS, dataset=pictures)
    for _ in range(5):
        run.step()
    for client in range(CLIENTS):  # of each its rows and counts are looked up once
        run.population.visit(client, 0, run.store[client])
    model, clients, before = run.task.init(), len(run.store.clients()), living()
    while run.progress.round < SETTING.rounds - 1:
        run.step()
    new = len(run.store.clients()) - clients
    assert new > 200
    assert living() - before == new * sum(tree.nbytes(model[key]) for key in kept.split(", ") if key)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", ["fedavg", "fedbabu", "creff"])
def test_a_run_that_is_over_leaves_nothing_for_the_collector(name: str, engine: str) -> None:
    with collector.paused():
        run = toy.run(ALGORITHMS[name](), engine, setting=replace(toy.SETTING, rounds=2))
        assert toy.finish(run).outcome().metrics
        kept = [weakref.ref(each) for each in (run, run.population, run.population.images, run.evaluator)]
        del run
        assert [each() for each in kept] == [None] * len(kept)
