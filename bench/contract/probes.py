"""One part of each kind that cannot be overlooked: they show whether a method lets parts act. And one that can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from bench import losses, tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.data import Batch
from bench.part import Aggregation, Channel, Correction, Loss, Part
from bench.protocol.composed import Composed
from bench.task import Task
from bench.training.outcome import Outcome
from bench.tree import Tree


@dataclass(frozen=True)
class Half(Loss):
    """Half of cross-entropy: no method's own."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Halve it."""
        return 0.5 * losses.cross_entropy(logits, batch)


@dataclass(frozen=True)
class Plain(Loss):
    """Cross-entropy: a method's own, unless its paper has another loss."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Leave it."""
        return losses.cross_entropy(logits, batch)


@dataclass(frozen=True)
class Halving(Channel):
    """Half of an update arrives."""

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        """Halve it."""
        return tree.scale(update, 0.5), {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        """Take it as it is."""
        return sent


@dataclass(frozen=True)
class First(Aggregation):
    """Only the first client counts."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Take its update."""
        return updates[0]


@dataclass(frozen=True)
class Doubling(Correction):
    """A head of twice the size."""

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Double it."""
        return tree.scale(model, 2.0)


PROBES: tuple[Part, ...] = (Half(), Halving(), First(), Doubling())


def silent(algorithm: Algorithm, probes: Sequence[Part]) -> list[Part]:
    """Give those probes that change nothing of what a method trains or tests."""
    usual = _outcome(algorithm)
    found = {probe: _outcome(Composed(algorithm, (probe,))) for probe in probes}
    return [
        probe
        for probe, outcome in found.items()
        if outcome.digest == usual.digest and not any(":uncorrected" in key for key in outcome.metrics)
    ]


def _outcome(algorithm: Algorithm) -> Outcome:
    return toy.finish(toy.run(algorithm, setting=replace(toy.SETTING, rounds=2, eval_every=2))).outcome()
