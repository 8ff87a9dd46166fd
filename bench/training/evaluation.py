"""What every model gets right, per client and class, at the least cost.

A personal model is a body and a head. Where clients share a body, each test image goes through it once and
the heads are products with the features. Counts are all that is kept; every metric is a function of them
(`bench.training.metrics`).

What is costly is shared out among the run's crew: models are made, tuned and tested a client at a time, and features
that several models need a portion of the test images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bench import tree
from bench.algorithm import Adaptation, Client
from bench.data import LocalData
from bench.task import Task
from bench.training.crew import Crew, Surroundings, visit_all
from bench.training.states import Store
from bench.training.visit import Verb, Visit
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

    here: Surroundings
    crew: Crew
    wrap: Callable[[Verb], Verb] = lambda verb: verb
    """Put around the verbs of personal models: where statistics stay at the client, it puts them in."""
    _features: dict[tuple[int, ...], tuple[Tree, Tensor]] = field(default_factory=dict)
    """By the memory of a body: the body, so that its memory is no other's meanwhile, and its features of all test
    images; emptied after each evaluation."""

    def generic(self, task: Task, server: Tree) -> Counts:
        """Test the one model of all clients, and its variants, on the whole official test set."""
        algorithm = self.here.algorithm
        models = {"generic": algorithm.global_model(task, server)}
        models |= {f"generic:{name}": m for name, m in algorithm.global_variants(task, server).items()}
        counts: Counts = {}
        for name, model in models.items():
            if model is not None:
                correct, total = self._test_on_all(task, model)
                counts[name] = (correct[None], total[None])
        return counts

    def personal(self, task: Task, server: Tree, store: Store, clients: Sequence[int], final: bool) -> Counts:
        """Test each client's own model on its own test images, some clients at a time.

        Args:
            task: Of the round.
            server: The newest state.
            store: Private states.
            clients: Which, ascending; beyond `population.training` they are held out of training and counted as
                `unseen`.
            final: Adaptation is costly, so adapted models are tested after the last round only.
        """
        shared = self.here.algorithm.broadcast(task, server)
        first = clients[0] if clients[0] < self.here.population.training else None
        each = tree.nbytes(self.here.algorithm.send(task, server, first)) + tree.nbytes(store.initial)
        at_once = max(1, min(_CLIENTS, _MODEL_BYTES // max(tree.nbytes(shared) + each, 1)))
        parts = [
            self._some(task, server, shared, store, clients[start : start + at_once], final)
            for start in range(0, len(clients), at_once)
        ]
        return {
            name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
            for name in parts[0]
        }

    def _some(
        self, task: Task, server: Tree, shared: Tree, store: Store, clients: Sequence[int], final: bool
    ) -> Counts:
        algorithm, population = self.here.algorithm, self.here.population
        unseen = clients[0] >= population.training
        sent = [algorithm.send(task, server, None if unseen else k) for k in clients]
        visits = [population.visit(k, task.round, store[k], own) for k, own in zip(clients, sent, strict=True)]
        models = self._ask(algorithm.personal_model, Client.personal_model, task, shared, visits)
        variants = self._ask(algorithm.personal_variants, Client.personal_variants, task, shared, visits)
        named: dict[str, list[Tree]] = {}
        for k, extra in enumerate(variants):
            for name, model in extra.items():
                named.setdefault(f"personal:{name}", [None] * len(visits))[k] = model  # type: ignore[list-item]
        headline = "unseen" if unseen else "personal"
        if models and models[0] is not None:
            adaptation = algorithm.adaptation(task) or (UNSEEN_ADAPTATION if unseen else None)
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

        tuned, _ = visit_all(
            self.here,
            self.crew,
            partial(_adapt, adaptation),
            task,
            {},
            [replace(visit, private=model, sent={}) for visit, model in zip(visits, models, strict=True)],
        )
        return {budget: [curve[str(budget)] for curve in tuned] for budget in adaptation.budgets()}

    def _ask(
        self, verb: Verb, usual: Callable[..., object], task: Task, shared: Tree, visits: list[Visit]
    ) -> list[Tree]:
        """Ask clients for models; where an algorithm says nothing of its own that is not worth sending round."""
        crew = None if getattr(verb, "__func__", None) is usual else self.crew
        return visit_all(self.here, crew, self.wrap(verb), task, shared, visits)[0]

    def _test(
        self, task: Task, models: list[Tree], shared: Tree, clients: Sequence[int]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        population = self.here.population
        bodies = [_memory(model) for model in models]
        common = _memory(shared)
        found: list[_Found] = [()] * len(clients)
        apart = []
        items: list[_Item] = []
        for k, client in enumerate(clients):
            rows, absent = population.tests[client], population.class_counts(client) == 0
            often = bodies[k] == common or bodies.count(bodies[k]) > 1 or bodies[k] in self._features
            if often and not _predicts(self.here):
                scores = _logits(self.here, models[k], self._features_of(models[k])[rows])
                found[k] = _count(self.here, scores, rows, absent)
            else:
                apart.append(k)
                items.append((models[k], rows, absent))
        sizes = [len(rows) for _, rows, _ in items]
        for k, answer in zip(apart, self.crew.map(partial(_try, task.round, task.lr), {}, items, sizes), strict=True):
            found[k] = answer
        plain, masked, total = (torch.stack(column) for column in zip(*found, strict=True))
        return (plain, total), (masked, total)

    def _test_on_all(self, task: Task, model: Tree) -> tuple[Tensor, Tensor]:
        """Test one model on all test images: right answers and images of each class, (C,) int64 twice."""
        everything = torch.arange(len(self.here.population.test), device=self.here.population.device)
        if not _predicts(self.here):
            scores = _logits(self.here, model, self._features_of(model))
            correct, _, total = _count(self.here, scores, everything, None)
            return correct, total
        items: list[_Item] = [({}, rows, None) for rows in self._portions(everything)]
        found = self.crew.map(partial(_try, task.round, task.lr), model, items, [len(rows) for _, rows, _ in items])
        correct, _, total = (torch.stack(column).sum(0) for column in zip(*found, strict=True))
        return correct, total

    def _features_of(self, model: Tree) -> Tensor:
        """Give the features of all test images, (M, d), computed once for a body."""
        memory = _memory(model)
        if memory not in self._features:
            body: Tree = model["body"]
            everything = torch.arange(len(self.here.population.test), device=self.here.population.device)
            portions = self._portions(everything)
            parts = self.crew.map(_embed, body, portions, [len(rows) for rows in portions])
            self._features[memory] = body, torch.cat(parts)
        return self._features[memory][1]

    def _portions(self, rows: Tensor) -> list[Tensor]:
        """Part rows where slices end, into a few portions for each process."""
        slices = -(-len(rows) // _SLICE)
        return list(rows.split(max(1, -(-slices // (4 * self.crew.size))) * _SLICE))


_Item = tuple[Tree, Tensor, Tensor | None]
"""A model of its own (empty: the shared one), (n,) test images, and (C,) which classes are absent (None: not asked)."""
_Found = tuple[Tensor, ...]
"""Right answers, right answers among classes that are not absent, and images, of each class: (C,) int64 each."""


def _adapt(adaptation: Adaptation, task: Task, shared: Tree, model: Tree, data: LocalData) -> Tree:
    """Fine-tune one client's model: by budget, as text."""
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


def _predicts(here: Surroundings) -> bool:
    """Tell whether an algorithm scores images in a way of its own."""
    return type(here.algorithm).predict is not Client.predict


def _try(round: int, lr: float, here: Surroundings, shared: Tree, item: _Item) -> _Found:
    """Test a model, the item's or else the shared one, on some test images."""
    own, rows, absent = item
    model = own or shared
    if not _predicts(here):
        return _count(here, _logits(here, model, _embed(here, model["body"], rows)), rows, absent)
    task, test = here.task.at(round, lr), here.population.test
    with _inference(here):
        slices = [here.algorithm.predict(task, model, test.plain(part)) for part in rows.split(_SLICE)]
        scores = torch.cat(slices).float()
    return _count(here, scores, rows, absent)


def _embed(here: Surroundings, body: Tree, rows: Tensor) -> Tensor:
    """Give the features of test images: (len(rows), d)."""
    network, test = here.task.model, here.population.test
    with _inference(here):
        return torch.cat([network.features(body, test.plain(part)) for part in rows.split(_SLICE)])


def _logits(here: Surroundings, model: Tree, features: Tensor) -> Tensor:
    """Score features: (B, C) float32."""
    with _inference(here):
        return here.task.model.logits(model["head"], features).float()


@contextmanager
def _inference(here: Surroundings) -> Iterator[None]:
    precision = here.task.precision
    with torch.no_grad(), torch.autocast(here.population.test.device.type, precision, precision != torch.float32):
        yield


def _count(here: Surroundings, scores: Tensor, rows: Tensor, absent: Tensor | None) -> _Found:
    y = here.population.test.y[rows]

    def right(scores: Tensor) -> Tensor:
        return torch.bincount(y[scores.argmax(1) == y], minlength=here.task.num_classes).cpu()

    total = torch.bincount(y, minlength=here.task.num_classes).cpu()
    plain = right(scores)
    return plain, plain if absent is None else right(scores.masked_fill(absent, -torch.inf)), total


def _memory(model: Tree) -> tuple[int, ...]:
    return tuple(leaf.data_ptr() for leaf in tree.flatten(model.get("body", {})).values())
