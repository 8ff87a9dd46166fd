"""What every model gets right, per client and class, at the least cost.

A personal model is a body and a head. Where clients share a body, each test image goes through it once and
the heads are products with the features. How often a class was taken for which is all that is kept; every metric is a
function of it (`bench.training.metrics`, `bench.results.classes`).

What is costly is shared out among the run's crew: models are made, tuned and tested a client at a time, and features
that several models need a portion of the test images at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import tree
from bench.algorithm import Adaptation, Algorithm, Client, is_usual, method_of, stages
from bench.data import LocalData
from bench.protocol.settings import BEYOND_TRAINING
from bench.task import Task
from bench.training import adaptation as tuning
from bench.training import open_set, robustness
from bench.training.counting import Answers, sparse
from bench.training.crew import Crew, Surroundings, visit_all
from bench.training.keeping import Keeper
from bench.training.states import Store
from bench.training.visit import Verb, Visit
from bench.tree import Tree

Work = Callable[[str, Verb, Task, Tree, Sequence[Visit]], list[Any]]
"""Runs a verb for every visit, and counts it: (name, verb, task, shared, visits) -> one result a visit."""

_SLICE = 128  # test images a pass: activations stay small
_CLIENTS, _MODEL_BYTES = 128, 2**29  # clients whose models are held at once: so many, or so much
_UNCORRECTED = "uncorrected"  # a model as it was trained
_SCORES = 2**22  # of some clients that are compared at once: 16 MB, or those of one client


@dataclass
class Evaluator:
    """Tests the models of one run."""

    here: Surroundings
    crew: Crew
    work: Work
    """What counts samples and operations as adaptation."""
    wrap: Callable[[Verb], Verb] = lambda verb: verb
    """Put around the verbs of personal models: where statistics stay at the client, it puts them in."""
    keeper: Keeper | None = None
    """Who writes what is tested to files; None: nobody."""
    open_set: dict[int, str] = field(default_factory=dict)
    """Of clients held out of training, how they came out in the last evaluation's open-set test, if there is one."""
    _features: dict[tuple[int, ...], tuple[Tree, Tensor]] = field(default_factory=dict)
    """By the memory of a body: the body, so that its memory is no other's meanwhile, and its features of all test
    images; `forget` empties it after each evaluation."""

    def generic(self, task: Task, server: Tree, final: bool = False) -> Answers:
        """Test the one model of all clients, and its variants, on the whole official test set; in the end the model
        under attack too.
        """
        algorithm = self.here.algorithm
        models = {"generic": algorithm.global_model(task, server)}
        models |= {f"generic:{name}": m for name, m in algorithm.global_variants(task, server).items()}
        if algorithm.corrects and (trained := models["generic"]) is not None:
            changed = algorithm.corrected(task, server, trained, None)
            models |= {name: each for name, (each,) in _beside("generic", [trained], [changed]).items()}
            if changed is None and algorithm.learns:
                models[f"generic:{_UNCORRECTED}"] = models.pop("generic")
        answers: Answers = {}
        for name, model in models.items():
            if model is not None:
                if self.keeper is not None:
                    self.keeper.put(name, model)
                answers[name] = [self._test_on_all(task, model, _predictor(self.here, name))]
        if final and (model := models.get("generic")) is not None:
            answers |= self._under_attack("generic", task, [model], [-1])
        return answers

    def personal(self, task: Task, server: Tree, store: Store, clients: Sequence[int], final: bool) -> Answers:
        """Test each client's own models on its own test images, some clients at a time.

        Args:
            task: Of the round.
            server: The newest state.
            store: Private states; clients that have none start as newcomers do.
            clients: Which, ascending; beyond `population.training` they are held out of training and counted as
                `unseen`.
            final: Adaptation is costly, so adapted models, corrected ones where that is learnt, and those right after
                local training, are tested after the last round only.
        """
        shared = self.here.algorithm.broadcast(task, server)
        first = clients[0] if clients[0] < self.here.population.training else None
        each = tree.nbytes(self.here.algorithm.send(task, server, first)) + tree.nbytes(store.initial)
        at_once = max(1, min(_CLIENTS, _MODEL_BYTES // max(tree.nbytes(shared) + each, 1)))
        parts = [
            self._some(task, server, shared, store, clients[start : start + at_once], final)
            for start in range(0, len(clients), at_once)
        ]
        return {name: [each for part in parts for each in part[name]] for name in parts[0]}

    def models(
        self, task: Task, server: Tree, shared: Tree, store: Store, clients: Sequence[int], final: bool
    ) -> dict[str, list[Tree]]:
        """Make the personal models of a few clients, all trained or all held out: by name, one a client.

        Args:
            task: Of the round.
            server: The newest state.
            shared: What is broadcast of it.
            store: Private states; clients that have none start as newcomers do.
            clients: Which, ascending.
            final: Whether models are adapted, and trained once more.

        Raises:
            Misnamed: They cannot be tuned as the algorithm says.
        """
        algorithm, population = self.here.algorithm, self.here.population
        unseen = clients[0] >= population.training
        labelled = population.setting.unseen_labels or not unseen
        sent = [algorithm.send(task, server, None if unseen else k) for k in clients]
        visits = [
            population.visit(k, task.round, store[k], own, trained=True) for k, own in zip(clients, sent, strict=True)
        ]
        ask = partial(self._ask, labelled, task, shared)
        count = self.work if final else None
        known = set(store.clients())
        new = [place for place, k in enumerate(clients) if k not in known]
        if new and not is_usual(algorithm.newcomer, Client.newcomer):
            arrived = ask(partial(_arrive, algorithm.newcomer), [visits[place] for place in new], count)
            for place, (_, private) in zip(new, arrived, strict=True):
                visits[place] = replace(visits[place], private=private)
        named: dict[str, list[Tree]] = {}
        asked = not unseen and not is_usual(algorithm.personal_variants, Client.personal_variants)
        for k, extra in enumerate(ask(algorithm.personal_variants, visits) if asked else []):
            for name, model in extra.items():
                named.setdefault(f"personal:{name}", [None] * len(visits))[k] = model  # type: ignore[list-item]
        models = ask(algorithm.personal_model, visits, count)
        if models[0] is None:
            return named
        if final and unseen and population.setting.open_classes:
            self.open_set |= open_set.lines(self.here, self.crew, task, models, clients)
        if final and not unseen:
            named["personal:after"] = ask(partial(_after, algorithm), visits)
        listed = stages(algorithm.newcomer_adaptation(task) if unseen else algorithm.adaptation(task))
        adaptation = tuple(stage for stage in listed if labelled or not stage.labels)
        tuning.require_possible(algorithm, adaptation, models[0])
        headline = "unseen" if unseen else "personal"
        if adaptation and not final:
            return {**named, f"{headline}:0 epochs": models}
        if adaptation:
            adapted = self.adapt(adaptation, task, visits, models)
            named |= {f"{headline}:{budget}": tuned for budget, tuned in adapted.items()}
            *_, models = adapted.values()
        if algorithm.learns and not final:
            return {**named, f"{headline}:{_UNCORRECTED}": models}
        named[headline] = models
        if algorithm.corrects:
            named |= _beside(headline, models, self._corrected(labelled, task, shared, visits, models))
        return named

    def _some(
        self, task: Task, server: Tree, shared: Tree, store: Store, clients: Sequence[int], final: bool
    ) -> Answers:
        answers: Answers = {}
        setting = self.here.population.setting
        named = self.models(task, server, shared, store, clients, final)
        if self.keeper is not None:
            self.keeper.clients(clients, store, named)
        for name, models in named.items():
            plain, masked = self._test(task, models, shared, clients, _predictor(self.here, name))
            answers[name] = plain
            # Which classes a client has not is known of its labels; its test may have others nevertheless.
            known = name == "personal" or (name == "unseen" and setting.unseen_labels)
            if known and setting.client_test not in BEYOND_TRAINING:
                answers[f"{name}.masked"] = masked
        if final and "personal" in named:
            answers |= self._under_attack("personal", task, named["personal"], clients)
        return answers

    def _under_attack(self, name: str, task: Task, models: list[Tree], clients: Sequence[int]) -> Answers:
        """Test models on attacked images, where the setting says so."""
        rows = self.here.population.attacked
        if not rows:
            return {}
        own = [rows[client] for client in clients]
        predictor = _predictor(self.here, name)
        return {f"{name}.{robustness.ROBUST}": robustness.tested(self.here, self.crew, task, models, own, predictor)}

    def forget(self) -> None:
        """Drop the features kept for this evaluation; those of a body without weights, which cannot move, stay."""
        self._features = {memory: kept for memory, kept in self._features.items() if not memory}

    def adapt(
        self, adaptation: tuple[Adaptation, ...], task: Task, visits: list[Visit], models: list[Tree]
    ) -> dict[str, list[Tree]]:
        """Tune models on their clients' training data.

        Returns:
            By budget, such as "0 epochs" or "3 steps", one model a visit; the last one is the whole adaptation's.
        """
        verb: Verb = partial(tuning.adapt, adaptation, self.here.algorithm)
        asked = [replace(visit, private=model, sent={}) for visit, model in zip(visits, models, strict=True)]
        tuned = self.work(f"adapt {adaptation}", verb, task, {}, asked)
        return {budget: [curve[budget] for curve in tuned] for budget in tuning.budgets(adaptation)}

    def _corrected(
        self, labelled: bool, task: Task, shared: Tree, visits: list[Visit], models: list[Tree]
    ) -> list[Any]:
        """Ask clients what their parts change of trained models; a body that nobody reads is not sent round. What they
        learn for it is work.
        """
        algorithm = self.here.algorithm
        read = [{key: model[key] for key in sorted(algorithm.corrects) if key in model} for model in models]
        asked = [replace(visit, private=mine) for visit, mine in zip(visits, read, strict=True)]
        verb: Verb = algorithm.corrected if labelled else partial(_without_labels, algorithm.corrected)
        if algorithm.learns:
            return self.work("corrected", verb, task, shared, asked)
        return visit_all(self.here, self.crew, verb, task, shared, asked)[0]

    def _ask(
        self,
        labelled: bool,
        task: Task,
        shared: Tree,
        verb: Verb,
        visits: list[Visit],
        count: Work | None = None,
    ) -> list[Any]:
        """Ask clients something; where an algorithm says nothing of its own that is not worth sending round."""
        usual = is_usual(verb, Client.personal_model)
        name = getattr(verb, "__name__", "newcomer")
        verb = self.wrap(verb if labelled else partial(_without_labels, verb))
        if count is not None and not usual:
            return count(name, verb, task, shared, visits)
        return visit_all(self.here, None if usual else self.crew, verb, task, shared, visits)[0]

    def _test(
        self, task: Task, models: list[Tree], shared: Tree, clients: Sequence[int], predictor: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        population = self.here.population
        rows = [population.tests[client] for client in clients]
        absent = [population.class_counts(client) == 0 for client in clients]
        bodies = [_memory(model) for model in models]
        times, common = Counter(bodies), _memory(shared)
        kept: list[int] = []
        apart: list[int] = []
        for k, body in enumerate(bodies):
            often = body == common or times[body] > 1 or body in self._features
            (kept if often and not _predicts(self.here, predictor) else apart).append(k)
        found: dict[int, Tensor] = {}
        for some in _portions_of(kept, [self.here.task.num_classes * len(rows[k]) for k in kept], _SCORES):
            given = [self._features_of(bodies[k], models[k]["body"]) for k in some]
            with self.here.inference():
                scores = [
                    self.here.task.model.logits(models[k]["head"], features[rows[k]]).float()
                    for k, features in zip(some, given, strict=True)
                ]
            lacking = torch.stack([absent[k] for k in some])
            found |= zip(some, _compare(self.here, scores, [rows[k] for k in some], lacking), strict=True)
        items: list[_Item] = [(models[k], rows[k], absent[k]) for k in apart]
        work = partial(_try, task.round, task.lr, predictor)
        answers = self.crew.map(work, {}, items, [len(rows[k]) for k in apart])
        found |= zip(apart, answers, strict=True)
        told = torch.cat([found[k] for k in range(len(clients))], 1).cpu()  # the device is asked once for all
        sizes, classes = [len(own) for own in rows], self.here.task.num_classes
        return sparse(told[[0, 1]], sizes, classes), sparse(told[[0, 2]], sizes, classes)

    def _test_on_all(self, task: Task, model: Tree, predictor: str) -> Tensor:
        """Test one model on all official test images: (3, n) as in `Answers`."""
        everything = self.here.population.official
        if not _predicts(self.here, predictor):
            features = self._features_of(_memory(model), model["body"])
            scores = _logits(self.here, model, features[everything])
            found = _compare(self.here, [scores], [everything])
        else:
            items: list[_Item] = [({}, rows, None) for rows in self._portions(everything)]
            work = partial(_try, task.round, task.lr, predictor)
            found = self.crew.map(work, model, items, [len(rows) for _, rows, _ in items])
        return sparse(torch.cat(found, 1)[:2].cpu(), [len(everything)], self.here.task.num_classes)[0]

    def _features_of(self, memory: tuple[int, ...], body: Tree) -> Tensor:
        """Give the features of all test images, (M, d), computed once for a body, which is told by its memory."""
        if memory not in self._features:
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


def _arrive(
    newcomer: Callable[[Task, Tree, LocalData], Tree], task: Task, shared: Tree, private: Tree, data: LocalData
) -> tuple[Tree, Tree]:
    """Make a newcomer's private state, as a local update that sends nothing."""
    return {}, newcomer(task, shared, data)


def _after(algorithm: Algorithm, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
    """Give the model that a client would use right after its local work."""
    return algorithm.personal_model(task, *algorithm.after_training(task, shared, private, data), data)


def _without_labels(verb: Verb, task: Task, shared: Tree, private: Tree, data: LocalData) -> Any:
    return verb(task, shared, private, data.unlabelled())


def _beside(name: str, trained: list[Tree], changed: Sequence[Tree | None]) -> dict[str, list[Tree]]:
    """Name corrected models, and beside them those as they were trained; nothing where nothing was changed."""
    if changed[0] is None:
        return {}
    corrected = [{**model, **(change or {})} for model, change in zip(trained, changed, strict=True)]
    return {name: corrected, f"{name}:{_UNCORRECTED}": trained}


def _predictor(here: Surroundings, model: str) -> str:
    """Give the name of the method that scores images with a model, given the model's name."""
    return here.algorithm.predictors.get(model.partition(":")[2], "predict")


def _predicts(here: Surroundings, predictor: str) -> bool:
    """Tell whether a method scores images in another way than by a body and a head."""
    return not is_usual(method_of(here.algorithm, predictor), Client.predict)


def _try(round: int, lr: float, predictor: str, here: Surroundings, shared: Tree, item: _Item) -> Tensor:
    """Test a model, the item's or else the shared one, on some test images."""
    own, rows, absent = item
    model = own or shared
    if not _predicts(here, predictor):
        scores = _logits(here, model, _embed(here, model["body"], rows))
        return _compare(here, [scores], [rows], None if absent is None else absent[None])[0]
    task, test = here.task.at(round, lr), here.population.test
    predict = method_of(here.algorithm, predictor)
    with here.inference():
        scores = torch.cat([predict(task, model, test.plain(part)) for part in rows.split(_SLICE)]).float()
    return _compare(here, [scores], [rows], None if absent is None else absent[None])[0]


def _embed(here: Surroundings, body: Tree, rows: Tensor) -> Tensor:
    """Give the features of test images: (len(rows), d)."""
    network, test = here.task.model, here.population.test
    with here.inference():
        return torch.cat([network.features(body, test.plain(part)) for part in rows.split(_SLICE)])


def _logits(here: Surroundings, model: Tree, features: Tensor) -> Tensor:
    """Score features: (B, C) float32."""
    with here.inference():
        return here.task.model.logits(model["head"], features).float()


def _portions_of(items: list[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Part items, in their order, into portions of one, or of a size together that is no more than `most`."""
    portion: list[int] = []
    size = 0
    for item, own in zip(items, sizes, strict=True):
        if portion and size + own > most:
            yield portion
            portion, size = [], 0
        portion.append(item)
        size += own
    if portion:
        yield portion


def _compare(
    here: Surroundings, scores: Sequence[Tensor], rows: Sequence[Tensor], absent: Tensor | None = None
) -> list[Tensor]:
    """Say what some models took their images for, on the device, so that nobody waits for it yet.

    Args:
        here: The run's.
        scores: (n, C) of each model.
        rows: (n,) of each, its test images.
        absent: (K, C), which classes each lacks; None: not asked.

    Returns:
        (3, n) int64 of each: an image's class, what it was taken for, and for what among the classes that are there.
    """
    everything, sizes = torch.cat(list(scores)), [len(own) for own in rows]
    plain = masked = everything.argmax(1)
    if absent is not None:
        times = tree.bring(torch.tensor(sizes), absent.device)
        lacking = absent.repeat_interleave(times, 0, output_size=len(everything))
        masked = everything.masked_fill(lacking, -torch.inf).argmax(1)
    return list(torch.stack([here.population.test.y[torch.cat(list(rows))], plain, masked]).split(sizes, 1))


def _memory(model: Tree) -> tuple[int, ...]:
    return tuple(leaf.data_ptr() for leaf in tree.flatten(model.get("body", {})).values())
