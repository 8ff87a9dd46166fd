"""One case with one seed: our run, what is handed to the authors' code, and the test of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from bench import Algorithm, LocalData, Task, Tree, tree
from bench.files import data_root
from bench.plugins.registry import ALGORITHMS, DATASETS
from bench.protocol.settings import Setting
from bench.splits.split import make_split
from bench.training.job import Job
from bench.training.rounds import Run

SETTING = Setting(
    name="agreement",
    model="mlp",
    clients=20,
    participation=0.4,
    rounds=20,
    epochs=2,
    batch_size=16,
    lr=0.05,
    imbalance=10.0,
    alpha=0.5,
    eval_every=20,
)
"""Digits with a tail of 10: some 25 images a client, seconds a run."""
ALL = {"participation": 1.0, "rounds": 12, "lr": 0.1}
"""All clients in each round: fewer rounds take as long, and steps are longer."""


Plan: TypeAlias = tuple[str | None, ...]
"""Passes over a client's examples in a round: see `Problem.loader`."""
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]
"""Images and labels, of batches or one by one."""
_CHOICE: Any = np.random.choice


@dataclass(frozen=True)
class Models:
    """What the authors' code ends with."""

    generic: Tree | None = None
    """The one model of all."""
    personal: Sequence[Tree] | None = None
    """A model for each client; None: the generic one."""


@dataclass(frozen=True)
class Case:
    """One way to compare a method with its authors' code."""

    name: str
    """What is particular to it."""
    theirs: Callable[[Problem, Path], Models]
    """Runs the authors' code, which lies in a folder."""
    metrics: tuple[str, ...]
    """Of a run, that are compared."""
    algorithm: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of our algorithm, where they are not the default."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """Fields that differ from `SETTING`."""


class Problem:
    """What both sides of a case are given.

    Args:
        case: Which.
        seed: Of the split, the initial weights, cohorts and batches.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed, self.round = case, seed, -1
        dataset = DATASETS["digits"]()
        setting: Setting = replace(SETTING, **case.setting)
        splits = dataset.load(data_root())
        split = make_split(splits.labels, dataset.num_classes, setting, seed)
        self.job = Job(ALGORITHMS[case.algorithm](**case.fields), dataset, splits, split, setting, seed, "stacked")
        self.run, self.setting = Run(self.job), setting
        self.task, self.population = self.run.task, self.run.population
        self.initial = self.task.init()
        """Body and head that everybody starts from."""
        self.clients = range(self.population.size)
        self.sizes = [len(self.population.index[k]) for k in self.clients]
        self.examples = [Examples(k, *self._plain(k)) for k in self.clients]
        """The training examples of each client, in stored order."""
        self.counts = torch.stack([self.population.class_counts(k) for k in self.clients])
        """(K, C), training examples of each class."""
        self.everything = [pair for examples in self.examples for pair in examples]
        """All of them, one client after the other."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.rows = [list(range(end - size, end)) for end, size in zip(ends, self.sizes, strict=True)]
        """Which of `everything` are whose."""
        self._owner = {row: k for k in self.clients for row in self.rows[k]}
        self._passes: dict[tuple[int, Plan], int] = {}
        self._made: dict[tuple[int, str], Pairs] = {}

    # What is handed out ---------------------------------------------------------------------------

    def cohort(self) -> list[int]:
        """Begin the next round, and give its clients, ascending.

        Raises:
            Finished: All rounds are done.
        """
        if self.round + 1 == self.setting.rounds:
            raise Finished
        self.round += 1
        self.again()
        return list(self.population.cohort(self.round))

    def again(self) -> None:
        """Begin all plans of batches anew."""
        self._passes.clear()
        self._made.clear()

    def drawn(self, pool: object, *positional: Any, **named: Any) -> Any:
        """Draw the cohort where numpy's `choice` is asked for some of the clients; anything else as it does."""
        return self.cohort() if pool == range(self.population.size) else _CHOICE(pool, *positional, **named)

    def data(self, client: int, round: int) -> LocalData:
        """Give what our client is handed in a round."""
        visit = self.population.visit(client, round, {})
        n = torch.tensor(len(visit.index))
        return LocalData(self.population.images, visit.index, n, visit.key, visit.class_counts, self.setting.batch_size)

    def loader(self, *plan: str | None) -> Callable[..., Any]:
        """Give what stands in the place of a DataLoader: our batches of the client whose examples it is asked for.

        Args:
            plan: What the passes over a client in a round are: "SALT N" for an epoch of `LocalData.batches`, None for
                the stored order, in which further passes are too. Without: the local epochs.
        """
        passes = plan or tuple(f" {epoch}" for epoch in range(self.setting.epochs))

        def make(dataset: Any, *positional: object, **named: object) -> Stream:
            return Stream(self, self._client_of(dataset), passes, dataset)

        return make

    def batches(self, client: int, plan: Plan) -> Pairs:
        """Give the batches of the next pass of a plan."""
        turn = self._passes.get((client, plan), 0)
        self._passes[client, plan] = turn + 1
        planned = plan[turn] if turn < len(plan) else None
        if planned is None:
            size = self.setting.batch_size
            return list(zip(self.examples[client].x.split(size), self.examples[client].y.split(size), strict=True))
        salt, _, epoch = planned.rpartition(" ")
        if (client, salt) not in self._made:
            epochs = 1 + max(int(each.rpartition(" ")[2]) for each in plan if each and each.rpartition(" ")[0] == salt)
            batches = self.data(client, max(self.round, 0)).batches(epochs, salt)
            self._made[client, salt] = [(batch.x, batch.y) for batch in batches]
        first = int(epoch) * self.steps(client)
        return self._made[client, salt][first : first + self.steps(client)]

    def steps(self, client: int) -> int:
        """Give the number of batches of an epoch."""
        return -(-self.sizes[client] // self.setting.batch_size)

    def network(self, head: str = "head", says: Callable[[Tensor, Tensor], object] | None = None) -> Network:
        """Give our network with the initial weights; `head` and `says` as `Network` has them."""
        return Network(self.initial, head, says)

    def _client_of(self, dataset: Any) -> int:
        """Tell whose examples a dataset is: a list of some, or one that says which rows of all it has."""
        if isinstance(dataset, Examples):
            return dataset.client
        rows = getattr(dataset, "idxs", None) or dataset.indices
        return self._owner[int(rows[0])]

    def _plain(self, client: int) -> tuple[Tensor, Tensor]:
        rows = self.population.index[client]
        return self.population.images.plain(rows), self.population.images.y[rows]

    # Ends -----------------------------------------------------------------------------------------

    def ours(self) -> tuple[Models, dict[str, float | None]]:
        """Do our run; give its models and metrics."""
        run, measured = self.run, None
        while run.progress.round < self.setting.rounds:
            measured = run.step()
        assert measured is not None
        task, server = run.task_at(self.setting.rounds - 1), run.progress.server
        shared = run.algorithm.broadcast(task, server)
        named = run.evaluator.models(task, server, shared, run.store, self.clients, True)
        return Models(run.algorithm.global_model(task, server), named.get("personal")), measured

    def tested(self, models: Models) -> dict[str, float | None]:
        """Test models as those of any run are."""
        run = Run(replace(self.job, algorithm=Handed()))
        run.progress.server = models.generic or self.initial
        for k in self.clients:
            run.store[k] = run.progress.server if models.personal is None else models.personal[k]
        return run.evaluate(run.task_at(self.setting.rounds - 1), self.setting.rounds, True)

    def apart(self, metric: str, one: Models, other: Models) -> float:
        """Give how far the models of a metric are from each other, as a share of how far the second ones came from
        the start.
        """
        generic = metric.startswith("generic")
        firsts, seconds = (
            [each.generic] if generic else each.personal or [each.generic] * len(self.clients) for each in (one, other)
        )
        between = moved = 0.0
        for first, second in zip(firsts, seconds, strict=True):
            assert first is not None and second is not None
            between += float(tree.norm(tree.sub(first, second))) ** 2
            moved += float(tree.norm(tree.sub(second, self.initial))) ** 2
        return math.sqrt(between / moved)


class Examples(list[tuple[Tensor, Tensor]]):
    """A client's examples as a list of pairs, which remembers whose they are."""

    def __init__(self, client: int, x: Tensor, y: Tensor) -> None:
        super().__init__(zip(x, y, strict=True))
        self.client, self.x, self.y = client, x, y

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Examples(self.client, self.x[place], self.y[place])
        return super().__getitem__(place)


class Stream:
    """Our batches of a client in the place of a DataLoader: each pass over it is the next one of a plan."""

    def __init__(self, problem: Problem, client: int, plan: Plan, dataset: Any) -> None:
        self.problem, self.client, self.plan, self.dataset = problem, client, plan, dataset

    def __len__(self) -> int:
        return self.problem.steps(self.client)

    def __iter__(self) -> Pass:
        return Pass(self.problem.batches(self.client, self.plan))


class Pass:
    """A pass over batches, whose length some ask for."""

    def __init__(self, batches: Pairs) -> None:
        self.rest, self.length = iter(batches), len(batches)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self.rest)


class Finished(Exception):
    """The authors' code goes on where all rounds are done."""


class Network(nn.Module):
    """The suite's network of one hidden layer as a module.

    Args:
        initial: Its weights.
        head: What the authors' code calls the head.
        says: What it gives of features and logits; None: the logits.
    """

    def __init__(self, initial: Tree, head: str, says: Callable[[Tensor, Tensor], object] | None) -> None:
        super().__init__()
        (hidden,) = initial["body"].values()
        self.base = nn.Sequential(nn.Flatten(), linear(hidden), nn.ReLU())
        self.add_module(head, linear(initial["head"]))
        self.called, self.says = head, says

    def forward(self, x: Tensor, latent_output: bool = False) -> object:
        z = self.base(x)
        if latent_output:
            return z
        y = getattr(self, self.called)(z)
        return y if self.says is None else self.says(z, y)


def linear(layer: Tree) -> nn.Linear:
    """Make a module of a linear layer."""
    made = nn.Linear(layer["weight"].shape[1], layer["weight"].shape[0])
    with torch.no_grad():
        made.weight.copy_(layer["weight"])
        made.bias.copy_(layer["bias"])
    return made


def tree_of(state: nn.Module | Mapping[str, Tensor], like: Tree) -> Tree:
    """Give a module of one hidden layer, or its state, whose last layer is the head, as the suite has models."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    leaves = [leaf.detach().clone() for leaf in state.values()]
    (hidden,) = like["body"]
    names = ("weight", "bias")
    return {"body": {hidden: dict(zip(names, leaves[:2]))}, "head": dict(zip(names, leaves[2:4]))}  # noqa: B905


@dataclass(frozen=True, kw_only=True)
class Handed(Algorithm):
    """Models that others have trained: the server's, and each client's own."""

    def init_client(self, task: Task) -> Tree:
        """Make the place of a model."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Do nothing."""
        return shared, private

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own."""
        return private
