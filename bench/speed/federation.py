"""A workload as a run of this suite: what it trains, and two methods that do the least that a method does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.algorithm import Algorithm
from bench.data import LocalData
from bench.speed.workloads import SEED, Workload
from bench.splits.split import make_split
from bench.task import Task
from bench.training.crew import Surroundings
from bench.training.job import Job, surroundings
from bench.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Average(Algorithm):
    """Plain federated averaging."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private


@dataclass(frozen=True, kw_only=True)
class Heads(Algorithm):
    """A shared body and a personal head, trained together."""

    generic: bool = True
    """Whether there is a model of all, with the head that everybody starts from."""

    def init_client(self, task: Task) -> Tree:
        """Start from the common head."""
        return {"head": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train both; send the body."""
        model = {"body": shared["body"], "head": private["head"]}
        model = task.sgd(task.loss, model, data.batches(task.epochs))
        return {"body": model["body"]}, {"head": model["head"]}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Join the body and the common head."""
        return super().global_model(task, server) if self.generic else None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        """Join the body and the client's head."""
        return {"body": shared["body"], "head": private["head"]}


def job(
    workload: Workload,
    folder: Path,
    engine: str = "serial",
    precision: str = "fp32",
    algorithm: Algorithm | None = None,
) -> Job:
    """Give what a run of a workload is given.

    Args:
        workload: Which.
        folder: Of its examples.
        engine: "serial" or "stacked".
        precision: "fp32" or "bf16".
        algorithm: None: federated averaging.
    """
    dataset = workload.dataset(folder)
    splits, setting = dataset.load(folder), workload.setting(dataset)
    split = make_split(splits.labels, dataset.num_classes, setting, SEED)
    return Job(algorithm or Average(), dataset, splits, split, setting, SEED, engine, precision)


def elsewhere(workload: Workload, folder: Path, engine: str, precision: str) -> Surroundings:
    """Set up another process of a crew."""
    return surroundings(job(workload, folder, engine, precision))
