"""What every model gets right, per client and class, at the least cost.

A personal model is a body and a head. Where clients share a body, each test image goes through it once and
the heads are products with the features. Counts are all that is kept; every metric is a function of them
(`bench.metrics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench import tree
from bench.algorithm import EACH, Adaptation, Algorithm, Client
from bench.data import LocalData
from bench.engine import Engine, Verb, Visit
from bench.population import Population
from bench.states import Store
from bench.task import Task
from bench.tree import Tree

Counts = dict[str, tuple[Tensor, Tensor]]
"""Model name to (correct, total), each (K, C) int64; (1, C) for a generic model."""

UNSEEN_ADAPTATION = Adaptation(epochs=5, parts=("head",), curve=())
"""What clients held out of training do where the algorithm has no adaptation of its own."""

_SLICE = 128  # test images a pass: activations stay small
_CLIENTS, _MODEL_BYTES = 128, 2**29  # clients whose models are held at once: so many, or so much


@dataclass
class Evaluator:
    """Tests the models of one run."""

    algorithm: Algorithm
    population: Population
    engine: Engine
    num_classes: int
    wrap: Callable[[Verb], Verb] = lambda verb: verb
    """Put around the verbs of personal models: where statistics stay at the client, it puts them in."""
    _features: dict[tuple[int, ...], tuple[Tree, Tensor]] = field(default_factory=dict)
    """By the memory of a body: the body, so that its memory is no other's meanwhile, and its features of all test
    images; emptied after each evaluation."""

    def generic(self, task: Task, server: Tree) -> Counts:
        """Test the one model of all clients, and its variants, on the whole official test set."""
        models = {"generic": self.algorithm.global_model(task, server)}
        models |= {f"generic:{name}": m for name, m in self.algorithm.global_variants(task, server).items()}
        everything = torch.arange(len(self.population.test), device=self.population.device)
        counts: Counts = {}
        for name, model in models.items():
            if model is not None:
                prediction = self._scores(task, model, everything, True).argmax(1)
                correct, total = self._count(prediction, everything)
                counts[name] = (correct[None], total[None])
        return counts

    def personal(
        self, task: Task, shared: Tree, own: Tree | None, store: Store, clients: Sequence[int], final: bool
    ) -> Counts:
        """Test each client's own model on its own test images, some clients at a time.

        Args:
            task: Of the round.
            shared: The newest broadcast.
            own: Its part that differs by client, (N, ...).
            store: Private states.
            clients: Which, ascending; beyond `population.training` they are held out of training and counted as
                `unseen`.
            final: Adaptation is costly, so adapted models are tested after the last round only.
        """
        size = max(tree.nbytes(shared) + tree.nbytes(store.initial), 1)
        at_once = max(1, min(_CLIENTS, _MODEL_BYTES // size))
        parts = [
            self._some(task, shared, own, store, clients[start : start + at_once], final)
            for start in range(0, len(clients), at_once)
        ]
        return {
            name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
            for name in parts[0]
        }

    def _some(
        self, task: Task, shared: Tree, own: Tree | None, store: Store, clients: Sequence[int], final: bool
    ) -> Counts:
        unseen = clients[0] >= self.population.training
        visits = [
            self.population.visit(k, task.round, store[k], None if own is None or unseen else tree.pick(own, k))
            for k in clients
        ]
        data = self.population.images
        models, _ = self.engine(self.wrap(self.algorithm.personal_model), task, shared, data, visits)
        variants, _ = self.engine(self.wrap(self.algorithm.personal_variants), task, shared, data, visits)
        named: dict[str, list[Tree]] = {}
        for k, extra in enumerate(variants):
            for name, model in extra.items():
                named.setdefault(f"personal:{name}", [None] * len(visits))[k] = model  # type: ignore[list-item]
        headline = "unseen" if unseen else "personal"
        if models and models[0] is not None:
            adaptation = self.algorithm.adaptation(task) or (UNSEEN_ADAPTATION if unseen else None)
            if adaptation is None:
                named[headline] = models
            elif not final:
                named[f"{headline}:0 epochs"] = models
            else:
                adapted = self.adapt(adaptation, task, visits, models)
                for budget, tuned in adapted.items():
                    named[f"{headline}:{budget} epochs"] = tuned
                named[headline] = adapted[adaptation.epochs]
        if unseen:
            named = {name: tested for name, tested in named.items() if name.startswith("unseen")}
        counts: Counts = {}
        for name, tested in named.items():
            plain, masked = self._test(task, tested, shared, clients)
            counts[name] = plain
            if name in ("personal", "unseen"):
                counts[f"{name}.masked"] = masked
        return counts

    def forget(self) -> None:
        """Drop the features kept for this evaluation."""
        self._features.clear()

    def adapt(
        self, adaptation: Adaptation, task: Task, visits: list[Visit], models: list[Tree]
    ) -> dict[int, list[Tree]]:
        """Fine-tune models on their clients' training data: for each budget, one model a visit."""

        def adapt(task: Task, shared: Tree, model: Tree, data: LocalData) -> Tree:
            moving = {part: model[part] for part in adaptation.parts}
            momentum: Tree | None = None
            reached, done = 0, {}
            for budget in adaptation.budgets():
                moving, momentum = task.resume_sgd(
                    lambda p, batch: task.loss({**model, **p}, batch),
                    moving,
                    data.batches(budget - reached, salt=f"adapt {reached}"),
                    momentum,
                    task.lr * adaptation.lr_factor,
                )
                reached = budget
                done[str(budget)] = {**model, **moving}
            return done

        tuned, _ = self.engine(
            adapt,
            task,
            {},
            self.population.images,
            [replace(visit, private=model, own=None) for visit, model in zip(visits, models, strict=True)],
        )
        return {budget: [curve[str(budget)] for curve in tuned] for budget in adaptation.budgets()}

    def _test(
        self, task: Task, models: list[Tree], shared: Tree, clients: Sequence[int]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        plain, masked, totals = [], [], []
        bodies = [self._memory(model) for model in models]
        common = self._memory(shared)
        for k, client in enumerate(clients):
            rows = self.population.tests[client]
            scores = self._scores(task, models[k], rows, bodies[k] == common or bodies.count(bodies[k]) > 1)
            absent = self.population.class_counts(client) == 0
            correct, total = self._count(scores.argmax(1), rows)
            plain.append(correct)
            totals.append(total)
            masked.append(self._count(scores.masked_fill(absent, -torch.inf).argmax(1), rows)[0])
        total = torch.stack(totals)
        return (torch.stack(plain), total), (torch.stack(masked), total)

    @staticmethod
    def _memory(model: Tree) -> tuple[int, ...]:
        return tuple(leaf.data_ptr() for leaf in tree.flatten(model.get("body", {})).values())

    def _scores(self, task: Task, model: Tree, rows: Tensor, shared_body: bool) -> Tensor:
        """Score test images: (len(rows), C) float32."""
        test = self.population.test
        mixed = task.precision != torch.float32
        with torch.no_grad(), torch.autocast(test.device.type, task.precision, mixed):
            if type(self.algorithm).predict is not Client.predict:
                return torch.cat(
                    [self.algorithm.predict(task, model, test.plain(r)) for r in rows.split(_SLICE)]
                ).float()
            body, head = model["body"], model["head"]
            memory = self._memory(model)
            if shared_body or memory in self._features:
                if memory not in self._features:
                    everything = torch.arange(len(test), device=rows.device)
                    self._features[memory] = body, self._embed(task, body, everything)
                features = self._features[memory][1][rows]
            else:
                features = self._embed(task, body, rows)
            return task.model.logits(head, features).float()

    def _embed(self, task: Task, body: Tree, rows: Tensor) -> Tensor:
        slices = [task.model.features(body, self.population.test.plain(r)) for r in rows.split(_SLICE)]
        return torch.cat(slices) if slices else torch.empty(0, task.model.feature_size, device=rows.device)

    def _count(self, prediction: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Count right answers and images of each class: (C,) int64 twice."""
        y = self.population.test.y[rows]
        right = y[prediction == y]
        return (
            torch.bincount(right, minlength=self.num_classes).cpu(),
            torch.bincount(y, minlength=self.num_classes).cpu(),
        )


def part_each(broadcast: Tree) -> tuple[Tree, Tree | None]:
    """Part a broadcast into what all clients get and what differs by client, (N, ...)."""
    own = broadcast.get(EACH)
    return {key: value for key, value in broadcast.items() if key != EACH}, own
