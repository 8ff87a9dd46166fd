"""A small made-up problem for checks and tests: eight clients of 0-60 noisy 8×8 pictures of six classes, and a method
of our own that carries parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from bench import keys
from bench.algorithm import Algorithm, Exchange
from bench.data import Batch, LocalData
from bench.dataset import Dataset, Splits
from bench.losses import cross_entropy
from bench.models.teacher import Features
from bench.protocol.settings import Setting
from bench.ranges import Positive
from bench.splits.auxiliary import NEEDS, Origin, Reserve, part_off
from bench.splits.split import Split
from bench.task import Task
from bench.training import engine as engines
from bench.training.job import Job, surroundings
from bench.training.rounds import Run
from bench.tree import Tree

SIZES = (60, 44, 33, 17, 9, 3, 0, 26)
"""Training examples of each client: none, fewer than a batch, and a last batch of one among them."""

SETTING = Setting(
    name="toy",
    model="mlp",
    clients=len(SIZES),
    participation=0.75,
    rounds=4,
    epochs=2,
    batch_size=16,
    lr=0.05,
    momentum=0.5,
    imbalance=4.0,
)
SHORT = replace(SETTING, rounds=2)
"""A first round and a last one."""


@dataclass(frozen=True, kw_only=True)
class Toy(Dataset):
    """Six blurred prototypes under noise."""

    num_classes: ClassVar[int] = 6
    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.2,)
    flip: ClassVar[bool] = False

    train: int = 480
    """Training pictures."""
    test: int = 180
    """Test pictures."""
    garbage: bool = False
    """Replace the test part by noise with random labels: whatever reads it for training will differ."""
    enlarged: int = 1
    """How many pixels wide and high each of the 8×8 becomes, for networks that need more."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Grey squares."""
        return 1, 8 * self.enlarged, 8 * self.enlarged

    def load(self, root: Path = Path()) -> Splits:
        """Make the pictures; nothing is read."""
        key = keys.key(2718)
        prototypes = keys.uniform(keys.fold(key, "prototypes"), 6, 1, 8, 8)

        def part(name: str, n: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(n) % 6
            noise = keys.uniform(keys.fold(key, name), n, 1, 8, 8)
            small = (255 * (0.55 * prototypes[y] + 0.45 * noise)).to(torch.uint8)
            return small.repeat_interleave(self.enlarged, 2).repeat_interleave(self.enlarged, 3), y

        test_x, test_y = part("test", self.test)
        if self.garbage:
            test_y = test_y[keys.permutation(key, self.test)]
            test_x = test_x.flip(0)
        return Splits(*part("train", self.train), test_x, test_y)


@dataclass(frozen=True, kw_only=True)
class Host(Algorithm):
    """One model, trained by cross-entropy and averaged."""

    scale: Positive = 1.0
    """Times cross-entropy is its loss: one of its own, if this is not 1."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""

        def scaled(logits: Tensor, batch: Batch) -> Tensor:
            return self.scale * cross_entropy(logits, batch)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            return task.criterion(task.model.logits(params["head"], z), z, batch, scaled)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


def split(splits: Splits, sizes: tuple[int, ...] = SIZES) -> Split:
    """Deal training rows to clients by label, so that most hold two classes, and give each the test images of
    its classes.
    """
    order = torch.argsort(splits.train_y, stable=True)
    order = order[torch.arange(len(order)).reshape(-1, 4).T.flatten()]  # every class in four places
    clients = tuple(part.sort().values for part in order[: sum(sizes)].split(list(sizes)))
    tests = tuple(torch.nonzero(torch.isin(splits.test_y, splits.train_y[rows].unique())).flatten() for rows in clients)
    counts = torch.bincount(splits.train_y[torch.cat(clients)], minlength=6)
    return Split(class_counts=counts, clients=clients, tests=tests, fingerprint=f"toy {sizes}")


def run(
    algorithm: Algorithm,
    engine: str = "serial",
    seed: int = 0,
    setting: Setting = SETTING,
    garbage: bool = False,
    checkpoint: Path | None = None,
    sizes: tuple[int, ...] = SIZES,
    precision: str = "fp32",
    dataset: Toy = Toy(),
    device: str = "cpu",
) -> Run:
    """Set up a run of the toy problem without taking a step."""
    job = _job(algorithm, engine, seed, setting, replace(dataset, garbage=garbage), sizes)
    return Run(replace(job, precision=precision, device=device), checkpoint)


def task(algorithm: Algorithm) -> Task:
    """Give the toy problem as an algorithm sees it, of no round in particular."""
    return surroundings(_job(algorithm, "serial", 0, SETTING, Toy(), SIZES)).task


def _job(algorithm: Algorithm, engine: str, seed: int, setting: Setting, dataset: Toy, sizes: tuple[int, ...]) -> Job:
    splits = dataset.load()
    dealt = split(_true_labels(splits, dataset), sizes)
    return Job(
        algorithm, dataset, splits, dealt, setting, seed, engine,
        reserve=reserve(splits, dealt, algorithm), teacher=teacher(splits, algorithm),
    )  # fmt: skip


def teacher(splits: Splits, algorithm: Algorithm) -> Features | None:
    """Give an algorithm that needs one a teacher that mostly knows: each class has a direction of its own, from which
    its pictures are not far.
    """
    if "teacher" not in algorithm.needs:
        return None
    key = keys.fold(keys.key(2718), "teacher")
    texts = keys.normal(keys.fold(key, "texts"), 6, 24)
    return Features(texts[splits.train_y] + keys.normal(keys.fold(key, "images"), len(splits.train_y), 24), texts)


def reserve(splits: Splits, split: Split, algorithm: Algorithm) -> Reserve | None:
    """Give an algorithm that needs some the pictures that no client has: ten of each class labelled."""
    if not algorithm.needs & NEEDS:
        return None
    dealt = torch.cat(split.clients).numpy()
    labelled, public = part_off(Origin(None, 10), algorithm.needs, splits.train_y, dealt, 6)
    return Reserve(splits.train_x, labelled, splits.train_y[labelled], public)


def _true_labels(splits: Splits, dataset: Toy) -> Splits:
    """Give the splits with the true test labels, so that the partition is the same whatever the test images
    are.
    """
    return replace(splits, test_y=replace(dataset, garbage=False).load().test_y)


def finish(run: Run) -> Run:
    """Take the steps that are left."""
    while run.progress.round < run.setting.rounds:
        run.step()
    return run


def states(run: Run) -> Tree:
    """Give all that a run keeps, as one tree."""
    return {"server": run.progress.server, **{f"client {k}": run.store[k] for k in run.store.clients()}}


def received(run: Run, client: int, round: int = 0, exchange: Exchange = Exchange()) -> Tree:  # noqa: B008 - a value
    """Give all that a client is sent in an exchange of a round."""
    shared, (own,) = run.algorithm.sends(exchange, run.task_at(round), run.progress.server, (client,))
    return {**shared, **own}


def trips(run: Run) -> Iterator[tuple[Task, Exchange]]:
    """Go through a run, and stop before each exchange that is the first of its kind."""
    seen: set[Exchange] = set()
    for round in range(run.setting.rounds):
        task = run.task_at(round)
        for exchange in run.algorithm.exchanges(task):
            if exchange not in seen:
                seen.add(exchange)
                yield task, exchange
            run.exchange(task, exchange)


def upload_once(
    run: Run, client: int = 0, task: Task | None = None, exchange: Exchange | None = None
) -> tuple[Tree, Tree]:
    """Run one exchange, by default the first of the first round, at one client."""
    task = run.task_at(0) if task is None else task
    exchange = run.algorithm.exchanges(task)[0] if exchange is None else exchange
    population = run.population
    if "pooled" in run.algorithm.needs:
        visit = population.pooled_visit(task.round, run.store[-1])
    else:
        visit = population.visit(client, task.round, run.store[client])
    verb, shared = run.algorithm.client_verb(exchange.client), received(run, client, task.round, exchange)
    results, _ = engines.serial(verb, task, shared, population.images, [visit])
    upload, private = results[0]
    return upload, private


def tested_models(run: Run, client: int) -> dict[str, Tree]:
    """Give the personal models of a client as they are tested after a run, by name."""
    task = run.task_at(run.setting.rounds - 1)
    server = run.progress.server
    named = run.evaluator.models(task, server, run.algorithm.broadcast(task, server), run.store, [client], True)
    return {name: model for name, (model,) in named.items()}
