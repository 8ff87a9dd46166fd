"""What facts of methods are compared with: a client's data, torch's own SGD on the toy's network, means by size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench import Algorithm, Batch, LocalData, Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run

SHORT: dict[str, dict[str, Any]] = {
    "clip2fl": {"features_per_class": 10, "match_steps": 2, "head_epochs": 1},
    "creff": {"features_per_class": 10, "match_steps": 2, "head_epochs": 1},
    "dafos": {"episodes": 2},
    "fat": {"steps": 2},
    "fedcrac": {"steps": 2},
    "fedic": {"steps": 2},
    "fediic": {"spread_steps": 2},
    "fedloge": {"etf_steps": 10},
    "fedrep": {"head_epochs": 1},
    "ltd": {"steps": 2},
    "pfedme": {"inner_steps": 2},
    "rucr": {"head_epochs": 1},
    "smoothing": {"steps": 2},
}
"""Fields with which methods whose servers, heads or solvers take long take little; what is done is the same."""


def short(name: str) -> Algorithm:
    """Give an algorithm that takes little."""
    algorithm: Algorithm = ALGORITHMS[name](**SHORT.get(name, {}))
    return algorithm


FEW = (9, 5, 0, 0, 0, 0, 0, 0)
"""Examples of clients where a step is dear, as of a network with batch norm."""


def done(run: Run) -> Run:
    """Take all steps, and test nothing."""
    for _ in toy.trips(run):
        pass
    return run


def data_of(run: Run, client: int, round: int = 0) -> LocalData:
    """What a client is handed in a round."""
    visit = run.population.visit(client, round, {})
    n = torch.tensor(len(visit.index))
    return LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.setting.batch_size)


def method(run: Run) -> Any:
    """A run's algorithm, with whatever methods its own class has besides."""
    return run.algorithm


def measured(run: Run, metric: str) -> float:
    """A metric that a finished run has."""
    found = run.outcome().metrics[metric]
    assert found is not None
    return found


def trained(run: Run, start: Tree, batches: Iterable[Batch]) -> Tree:
    """torch's SGD on cross-entropy from a momentum of zero, all leaves of the toy's network in their order."""
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(start).values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    for batch in batches:
        optimiser.zero_grad()
        F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:]), batch.y).backward()
        optimiser.step()
    return tree.unflatten(dict(zip(tree.flatten(start), (p.detach() for p in w), strict=True)))


def mean_by_size(run: Run, cohort: Sequence[int], models: Sequence[Tree]) -> Tree:
    """The mean of clients' models, each weighing as many examples as its client has."""
    sizes = [len(run.population.index[k]) for k in cohort]
    return tree.map(lambda *w: sum(n * leaf for n, leaf in zip(sizes, w, strict=True)) / sum(sizes), *models)


def two_groups(run: Run) -> None:
    """Deal a run's examples to its eight clients all alike, and move the labels of the last four on by three of six."""
    population, everything = run.population, torch.cat(run.population.index)
    for k in range(8):
        population.index[k] = everything[k::8]
        if k > 3:
            population.images.y[population.index[k]] = (population.images.y[population.index[k]] + 3) % 6
