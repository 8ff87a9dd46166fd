"""Who does the work of one run: its own process alone, or others with it that share a cohort out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from bench import tree
from bench.algorithm import Algorithm
from bench.task import Task
from bench.training.asked import Told
from bench.training.engine import Engine, Probe
from bench.training.parcel import Memory
from bench.training.population import Population
from bench.training.visit import Verb, Visit
from bench.tree import Tree

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Surroundings:
    """What every process of a crew has, and nothing of it changes: the run without its states."""

    algorithm: Algorithm
    population: Population
    task: Task
    """Of no round in particular."""
    engine: Engine
    fingerprint: str
    """Of the split."""
    told: Told | None = None
    """What clients said of their images before the first round; None: the network asks nothing."""

    def fixed(self) -> list[Memory]:
        """Give the memory, in one order everywhere, that results may lie in besides what they are made from."""
        named = {"weights": self.task.weights, "prior": self.task.prior, "teacher": self.task.teacher}
        leaves = tree.flatten({name: each for name, each in named.items() if each is not None})
        return [(leaf.untyped_storage(), 0) for leaf in leaves.values()]

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Have models score test images: in the run's precision, and differentiate nothing."""
        precision = self.task.precision
        with torch.no_grad(), torch.autocast(self.population.test.device.type, precision, precision != torch.float32):
            yield


class Crew(Protocol):
    """The processes of one run. They keep nothing from one piece of work to the next."""

    @property
    def size(self) -> int:
        """How many there are, the run's own among them."""

    def join(self, here: Surroundings) -> None:
        """Take in the run's own process; whoever is not ready yet takes part later."""

    def map(
        self,
        work: Callable[[Surroundings, Tree, Item], Answer],
        shared: Tree,
        items: Sequence[Item],
        sizes: Sequence[float],
    ) -> list[Answer]:
        """Apply a function to items, with the same bits whoever does it.

        Args:
            work: (surroundings, shared, item) -> answer; it can be pickled, and draws from no global generator.
            shared: What it needs for every item: sent once to a process, also where the next call has the same.
            items: Trees of tensors, dataclasses of them and so on.
            sizes: How long each takes, in any unit.

        Returns:
            One answer per item, in order.
        """

    def peak_memory(self) -> float:
        """Give the sum of the largest memory of the other processes, in bytes, as far as it is known."""


class Alone:
    """A crew of one."""

    size = 1

    def join(self, here: Surroundings) -> None:
        """Take in this process."""
        self.here = here

    def map(
        self,
        work: Callable[[Surroundings, Tree, Item], Answer],
        shared: Tree,
        items: Sequence[Item],
        sizes: Sequence[float],
    ) -> list[Answer]:
        """Apply a function to items, one after the other."""
        return [work(self.here, shared, item) for item in items]

    def peak_memory(self) -> float:
        """Give zero: there are no others."""
        return 0.0


def visit_all(
    here: Surroundings,
    crew: Crew | None,
    verb: Verb,
    task: Task,
    shared: Tree,
    visits: Sequence[Visit],
    probe: Probe | None = None,
) -> tuple[list[Any], float]:
    """Run a verb for every visit, shared out among a crew: one result per visit, and the samples processed.

    Args:
        here: The run's.
        crew: Who does it; None: this process.
        verb: What to do; it can be pickled.
        task: Of the round.
        shared: What every client is sent.
        visits: One for each client.
        probe: Told how many operations the largest visit takes.
    """

    def share(parts: list[list[Visit]]) -> list[list[tuple[Any, float]]]:
        assert crew is not None
        sizes = [sum(len(visit.index) for visit in part) for part in parts]
        return crew.map(partial(_visit, verb, task.round, task.lr), shared, parts, sizes)

    return here.engine(verb, task, shared, here.population.images, visits, probe, share if crew else None)


def _visit(
    verb: Verb, round: int, lr: float, here: Surroundings, shared: Tree, visits: Sequence[Visit]
) -> list[tuple[Any, float]]:
    """Run a verb for a group in one process of a crew."""
    return here.engine.work(verb, here.task.at(round, lr), shared, here.population.images, visits)
