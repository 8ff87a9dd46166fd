"""FedAvg as the authors of FedNTD have it: the control. Nothing is left that could differ.

What runs is their `Server.run`: client training, weights by sizes, aggregation. Its tests, and what it would send to
Weights & Biases, go nowhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import zeros

from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "Lee-Gihun/FedNTD", "be00ee5"


def served(problem: Problem, folder: Path, name: str, **parameters: object) -> Models:
    """Run one of the repository's servers."""
    setting, loader = problem.setting, problem.loader()
    local = {
        k: {"datasize": problem.sizes[k], "train": loader(problem.examples[k]), "test": None} for k in problem.clients
    }
    tests = [(problem.examples[0].x, problem.examples[0].y)]
    data = {"num_classes": 10, "data_map": problem.counts.numpy(), "global": {"test": tests}, "local": local}
    model = problem.network()
    optimiser = torch.optim.SGD(model.parameters(), setting.lr, setting.momentum, weight_decay=setting.weight_decay)
    with opened(folder, problem.seed, ("wandb",)) as code:
        server: Any = code.module(f"algorithms.{name}.Server").Server(
            options(parameters), model, data, optimiser, None,
            n_rounds=setting.rounds, local_epochs=setting.epochs, device="cpu",
        )  # fmt: skip
        server._client_sampling = lambda round: problem.cohort()
        server.client._get_local_stats = lambda: {"train_acc": 0.0, "test_acc": 0.0, "classwise_accuracy": zeros(10)}
        server.run()
    return Models(tree_of(server.model, problem.initial))


def _theirs(problem: Problem, folder: Path) -> Models:
    return served(problem, folder, "fedavg")


CASES = (
    Case("momentum 0.5", _theirs, ("generic",), "fedavg", setting={"momentum": 0.5, "weight_decay": 1e-4}),
    Case("all clients", _theirs, ("personal.balanced",), "fedavg", setting={"participation": 1.0}),
)
