"""FedNova. What runs is their optimiser, in which both the steps and the average are: a process for each client there,
and here a thread for each, whose sums are made in memory. The three lines of a step are ours: gradient, loss, step.

All clients take part, as there.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.agreement.foreign import opened
from tests.agreement.problem import ALL, Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "JYWa/FedNova", "47b4e09"


class _Sum:
    """Adds up what all threads bring, in the order of the clients."""

    def __init__(self, count: int) -> None:
        self.barrier, self.brought, self.own = threading.Barrier(count), dict[int, Tensor](), threading.local()

    def __call__(self, tensor: Tensor, op: object = None) -> None:
        self.brought[self.own.rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack([each for _, each in sorted(self.brought.items())]).sum(0)
        self.barrier.wait()
        tensor.copy_(total)

    def average(self, rank: int, optimiser: Any) -> None:
        """Have one client's optimiser average with the others'."""
        self.own.rank = rank
        optimiser.average()


def _theirs(problem: Problem, folder: Path) -> Models:
    setting, clients, total = problem.setting, problem.clients, sum(problem.sizes)
    models: list[Any] = [problem.network() for _ in clients]
    summed = _Sum(len(clients))
    with (
        opened(folder, problem.seed) as code,
        patch.object(import_module("torch.optim.optimizer"), "required", object(), create=True),
        ThreadPoolExecutor(len(clients)) as threads,
    ):
        module = code.module("distoptim.FedNova")
        module.dist = SimpleNamespace(all_reduce=summed, ReduceOp=SimpleNamespace(SUM=None))
        rules = [
            module.FedNova(
                models[k].parameters(), ratio=problem.sizes[k] / total, gmf=0, lr=setting.lr, momentum=setting.momentum,
                weight_decay=setting.weight_decay,
            )
            for k in clients
        ]  # fmt: skip
        for _ in range(setting.rounds):
            for k in problem.cohort():
                for _ in range(setting.epochs):
                    for x, y in problem.loader()(problem.examples[k]):
                        rules[k].zero_grad()
                        F.cross_entropy(models[k](x), y).backward()
                        rules[k].step()
            list(threads.map(summed.average, clients, rules))
    return Models(tree_of(models[0], problem.initial))


CASES = tuple(
    Case(f"as published, momentum {momentum}", _theirs, ("generic",), "fednova",
         setting={**ALL, "momentum": momentum, "weight_decay": 1e-4, "lr": rate})
    for momentum, rate in ((0.0, 0.1), (0.9, 0.02))
)  # fmt: skip
