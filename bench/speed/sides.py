"""The sides of a workload that are measured in this process: training, the bare loop as its floor, and evaluation.

The federated side is the real thing, a round as a run has it: keyed shuffling, normalisation from uint8, a copy of the
model for each client, uploads, aggregation, accounts. The bare loop is the least that trains: one model on the same
clients' batches, from float images that lie ready, by torch's own optimiser, in the layout and precision that are
fastest, without federation.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import keys, tree
from bench.protocol import provenance
from bench.speed.federation import Heads, job
from bench.speed.module import Module
from bench.speed.turns import Side, Turn
from bench.speed.workloads import Workload
from bench.training.job import PRECISIONS, Job
from bench.training.rounds import Run


def federated(name: str, run: Run) -> Side:
    """Do a round of a run, on one thread a process."""

    def take() -> Turn:
        torch.set_num_threads(1)
        cohort = run.population.cohort(run.progress.round)
        started = time.perf_counter()
        run.step()
        return Turn(time.perf_counter() - started, _images(run, cohort))

    return Side(name, take)


def evaluation(name: str, run: Run) -> Side:
    """Test all models of a run, as after a round."""

    def take() -> Turn:
        torch.set_num_threads(1)
        started = time.perf_counter()
        run.evaluate(run.task_at(run.progress.round), run.progress.round, False)
        return Turn(time.perf_counter() - started, None)

    return Side(name, take)


def bare(name: str, work: Job, precision: str, threads: int) -> Side:
    """Train one model on the batches of a round.

    Args:
        name: Of the side.
        work: Whose model, clients, cohorts and learning rate.
        precision: "bf16" by autocast.
        threads: Of the process.
    """
    run = Run(work)
    population, setting, low = run.population, run.setting, PRECISIONS[precision]
    model = Module(run.task.model, run.task.init(), torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=setting.momentum, foreach=True)
    x, y = population.images.plain(torch.arange(len(population.images))), population.images.y
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    generator, rounds = torch.Generator().manual_seed(0), itertools.count()

    def take() -> Turn:
        torch.set_num_threads(threads)
        cohort = population.cohort(next(rounds))
        started = time.perf_counter()
        for client in cohort:
            own = population.index[client]
            for _ in range(setting.epochs):
                for rows in own[torch.randperm(len(own), generator=generator)].split(setting.batch_size):
                    optimiser.zero_grad()
                    with torch.autocast("cpu", low, enabled=low != torch.float32):
                        loss = F.cross_entropy(model(x[rows]), y[rows])
                    loss.backward()
                    optimiser.step()
        return Turn(time.perf_counter() - started, _images(run, cohort))

    return Side(name, take)


def heads(workload: Workload, folder: Path) -> list[Side]:
    """Test one generic model on all test images, and the personal head of each client on its own."""
    run = Run(job(workload, folder, algorithm=Heads()))
    task, server, clients = run.task_at(0), run.progress.server, range(run.population.training)
    key = keys.key(1)
    for client in clients:  # no two heads are alike
        head = {path: leaf + keys.normal(keys.fold(key, client, path), *leaf.shape) for path, leaf in
                tree.flatten(run.store.initial).items()}  # fmt: skip
        run.store[client] = tree.unflatten(head)

    def timed(test: Callable[[], object]) -> Callable[[], Turn]:
        def take() -> Turn:
            torch.set_num_threads(1)
            started = time.perf_counter()
            test()
            run.evaluator.forget()
            return Turn(time.perf_counter() - started, None)

        return take

    return [
        Side("generic evaluation", timed(lambda: run.evaluator.generic(task, server))),
        Side(f"{len(clients)} heads", timed(lambda: run.evaluator.personal(task, server, run.store, clients, False))),
    ]


def _images(run: Run, cohort: tuple[int, ...]) -> float:
    """Count the examples that a cohort trains on in a round, in all epochs."""
    return float(run.population.sizes(cohort).sum()) * run.setting.epochs


def here() -> dict[str, object]:
    """Say where and with what is measured, in JSON's types."""
    return {
        "machine": provenance.hardware("cpu"),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
