"""Whose model counts how much is the setting's: a fact of every algorithm in the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.tree import largest_difference
from tests.by_hand import short

FEDERATED = [name for name in sorted(ALGORITHMS) if "pooled" not in ALGORITHMS[name]().needs]
NO_MEAN_OF_BODIES = {
    "afl": "clients count by weights that follow their losses, and start alike",
    "fed3r": "sums over examples travel, and the head is solved for",
    "fedamp": "the server keeps a model for each client",
    "fedas": "bodies count by the trace of their Fisher information",
    "feddistill": "logits of each class travel, over the clients that hold it",
    "fedgh": "means of each class travel, on which the server trains a head",
    "fedfomo": "the server keeps a model for each client",
    "fedmtl": "the server keeps a model for each client",
    "fedncm": "means of each class travel, by how many examples they are of",
    "fedproto": "means of each class travel, over the clients that hold it",
    "local": "nothing is sent",
    "pefll": "as of pfedhn, and the gradient of what describes clients counts each alike",
    "pfedhn": "what clients changed goes back through the hypernetwork, each alike; a mean is of statistics only",
}
HEADS = {
    "fedtiny": "bodies are averaged as they are sent, packed, and kept as they are unpacked",
    "lg_fedavg": "bodies stay with their clients, and heads are averaged",
    "unfreeze": "bodies join later, and at first heads alone are sent",
}
TEACHERS = dict.fromkeys(
    ("deit_lt", "ltd"), "a teacher is averaged at first, body and head, and the body of the model that is tested later"
)
BY_STEPS = {"fedcm": "an update is divided by its client's number of steps, whatever it weighs"}
AFTER_THE_MEAN = {
    "elastic": "the server's step is shorter or longer than to the mean, by parameter",
    "fedadagrad": "the server's step is Adagrad's",
    "fedadam": "the server's step is Adam's",
    "feddc": "the server goes beyond the mean, by the drift",
    "feddisco": "clients count less, the further their classes are from equally frequent",
    "feddyn": "the server goes beyond the mean, by the drift",
    "fedic": "the average is trained further at the server",
    "fednova": "an update is divided by its client's number of steps",
    "fedyogi": "the server's step is Yogi's",
    "qfedavg": "the step is shorter than to the mean, which counts losses besides",
    "ifca": "a cluster's mean is of those that chose it",
}


def served(name: str, weights: str, claim: Tensor | None = None) -> Tree:
    """The server's state after two rounds, in which clients of sizes as they are, or as they claim, take part."""
    run = toy.run(short(name), setting=replace(toy.SETTING, rounds=2, participation=1.0, client_weights=weights))
    sizes = run.population.sizes
    if claim is not None:
        run.population.sizes = lambda clients: claim[list(clients)]  # type: ignore[method-assign]
    assert sizes(range(8)).tolist() == list(toy.SIZES)
    server = toy.finish(run).progress.server
    return {key: part for key, part in server.items() if key != "sizes"}  # by which FedVC draws clients


CLAIM = torch.tensor([1.0, 300.0, 2.0, 17.0, 90.0, 33.0, 0.0, 5.0]).double()
"""Sizes that have nothing to do with the true ones, but that the empty client is empty."""


@pytest.mark.parametrize("name", FEDERATED)
def test_with_uniform_weights_no_server_looks_at_sizes_and_with_sizes_all_do_that_average(name: str) -> None:
    """FedPAC's prototypes count by examples of a class, which its clients send, and that is no exception."""
    assert (largest_difference(served(name, "uniform"), served(name, "uniform", CLAIM)) == 0.0) == (
        name not in BY_STEPS
    )
    assert (largest_difference(served(name, "size"), served(name, "size", CLAIM)) == 0.0) == (name in NO_MEAN_OF_BODIES)


@pytest.mark.parametrize("name", [name for name in FEDERATED if name not in NO_MEAN_OF_BODIES | AFTER_THE_MEAN])
def test_a_mean_of_bodies_has_the_settings_weights(name: str) -> None:
    """In the first round, where momentum and controls of a server are still nothing."""
    clients, sizes = torch.tensor([0, 1, 2, 4]), torch.tensor([60.0, 44.0, 33.0, 9.0]).double()
    part, found = "head" if name in HEADS else "teacher" if name in TEACHERS else "body", 0
    run = toy.run(short(name), setting=replace(toy.SETTING, rounds=1, participation=1.0))
    for task, exchange in toy.trips(run):
        sent = [toy.upload_once(run, k, task, exchange)[0] for k in clients.tolist()]
        if part not in sent[0]:
            continue
        for weights in (sizes, torch.ones(4).double(), torch.tensor([0.0, 1.0, 0.0, 3.0]).double()):
            uploads = Uploads(sent, sizes, clients, weights)
            averaged = run.algorithm.server_verb(exchange.server)(task, run.progress.server, uploads)[part]
            shares = (weights / weights.sum()).tolist()
            mean = tree.map(
                lambda *w, s=shares: sum(a * b for a, b in zip(s, w, strict=True)), *(u[part] for u in sent)
            )
            assert largest_difference(averaged, mean) < 1e-5
            found += 1
    assert found == 3
