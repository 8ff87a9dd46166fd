"""What a peer is given, in a folder, and how it answers: the examples, who has which, the cohorts, the first weights.

A peer's process is told on standard input when a round may begin, a line for each, and answers on standard output, a
line of JSON for each: {"images": so many}. When no more may begin it says {"accuracy": of its model on the test part}
and ends. What its libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import models
from bench.speed.module import Module

if TYPE_CHECKING:
    from bench.training.job import Job

FILE = "work.pt"
_COHORTS = 1000
"""Rounds whose cohorts are written; then they begin again."""


@dataclass(frozen=True)
class Work:
    """Federated averaging, to be done."""

    x: Tensor
    """(N, ...) float32, normalised."""
    y: Tensor
    """(N,) int64."""
    test_x: Tensor
    test_y: Tensor
    clients: list[Tensor]
    """For each client (n_k,) int64, rows of `x`."""
    cohorts: list[list[int]]
    """Clients of each round."""
    epochs: int
    batch: int
    lr: float
    momentum: float
    module: Module
    """The network, with its first weights."""

    def cohort(self, round: int) -> list[int]:
        """Give the clients of a round, 0 and up."""
        return self.cohorts[round % len(self.cohorts)]

    def images(self, clients: Iterable[int]) -> int:
        """Count the examples that clients train on in a round, in all epochs."""
        return self.epochs * sum(len(self.clients[k]) for k in clients)

    def train(self, module: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train for a round as everybody does."""
        optimiser = torch.optim.SGD(module.parameters(), lr=self.lr, momentum=self.momentum)
        module.train()
        for _ in range(self.epochs):
            for x, y in batches:
                optimiser.zero_grad()
                F.cross_entropy(module(x), y).backward()
                optimiser.step()

    @torch.no_grad()
    def accuracy(self, module: torch.nn.Module) -> float:
        """Give the share of right answers on the test part, classes being of one size there."""
        module.eval()
        right = [
            (module(x).argmax(1) == y).sum()
            for x, y in zip(self.test_x.split(256), self.test_y.split(256), strict=True)
        ]
        return float(sum(right)) / len(self.test_y)


def write(folder: Path, job: Job) -> None:
    """Write what a run of this suite is given for peers to read."""
    from bench.training.job import surroundings

    here = surroundings(job)
    population, setting, task = here.population, job.setting, here.task
    torch.save(
        {
            "x": population.images.plain(torch.arange(len(population.images))),
            "y": population.images.y,
            "test_x": population.test.plain(torch.arange(len(population.test))),
            "test_y": population.test.y,
            "clients": population.index,
            "cohorts": [list(population.cohort(round)) for round in range(_COHORTS)],
            "epochs": setting.epochs,
            "batch": setting.batch_size,
            "lr": setting.lr,
            "momentum": setting.momentum,
            "model": (task.model.name, task.model.num_classes, task.model.shape, task.model.norm),
            "weights": task.init(),
        },
        folder / FILE,
    )


@lru_cache(maxsize=1)
def read(folder: Path) -> Work:
    """Read it, once in a process."""
    content: dict[str, Any] = torch.load(folder / FILE, weights_only=True)
    module = Module(models.build(*content.pop("model")), content.pop("weights"))
    return Work(**content, module=module)


class Line:
    """A peer's end of the line to who sets it to work; made before anything is printed."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def may_begin(self) -> bool:
        """Wait until a round may begin; false where no more will."""
        return bool(sys.stdin.readline())

    def answer(self, **said: float) -> None:
        """Tell of a round, or of the end."""
        self._answers.write(json.dumps(said) + "\n")
