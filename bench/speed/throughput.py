"""How fast the engines are against the bare training loop, measured in one run: `bench speed`.

Ratios are what counts: the two sides take turns, so that a machine that slows down slows both. The federated side is
the real thing: keyed shuffling, normalisation from uint8, per-client copies, momentum, uploads, aggregation. The bare
side is the loop a practitioner would write for one model: float images ready in memory, `torch.optim.SGD`, nothing
else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, models, tree
from bench.algorithm import Algorithm
from bench.data import LocalData
from bench.dataset import Dataset, Splits
from bench.protocol.settings import Setting
from bench.splits.split import Split
from bench.task import Task
from bench.training.engine import choose
from bench.training.job import Job
from bench.training.rounds import Run
from bench.tree import Tree


@dataclass(frozen=True, kw_only=True)
class _Average(Algorithm):
    """Plain federated averaging, the least a method does."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private


@dataclass(frozen=True)
class _Noise(Dataset):
    """Random images of any shape."""

    shape: tuple[int, ...]
    num_classes: int = 10

    @property
    def image_shape(self) -> tuple[int, ...]:
        """As asked for."""
        return self.shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Half way."""
        return (0.5,) * self.shape[0]

    std = mean

    def load(self, root: object = None) -> Splits:
        """Not used."""
        raise NotImplementedError


def _federated(
    model: str, shape: tuple[int, ...], clients: int, examples: int, batch: int, engine: str, classes: int = 10
) -> Run:
    """Set up a run over random images, each client with as many."""
    n = clients * examples
    key = keys.key(7)
    x = keys.integers(key, 256, n, *shape).to(torch.uint8)
    y = keys.integers(keys.fold(key, "y"), classes, n)
    rows = tuple(torch.arange(n).split(examples))
    none = tuple(torch.arange(0) for _ in rows)
    split = Split(class_counts=torch.bincount(y, minlength=classes), clients=rows, tests=none, fingerprint="speed")
    setting = Setting(
        name="speed",
        model=model,
        clients=clients,
        rounds=100_000,
        epochs=1,
        batch_size=batch,
        lr=0.01,
        momentum=0.5,
    )
    return Run(Job(_Average(), _Noise(shape, classes), Splits(x, y, x[:1], y[:1]), split, setting, 0, engine))


def _round(run: Run) -> Callable[[], float]:
    """Make a function that does one round without testing and gives images per second."""
    images = len(run.population.images)

    def once() -> float:
        started = time.perf_counter()
        task = run.task_at(run.progress.round)
        run.population.prefetch(task.round, task.round + 1)
        for exchange in run.algorithm.exchanges(task):
            run.exchange(task, exchange)
        run.progress.round += 1
        return images / (time.perf_counter() - started)

    return once


def _bare(run: Run) -> Callable[[], float]:
    """Make a function that does one epoch of plain PyTorch over the same images and gives images per second."""
    network = _Module(run.task.model, run.task.init())
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.5)
    images = run.population.images
    x = images.plain(torch.arange(len(images))).contiguous(memory_format=torch.channels_last)
    y, batch = images.y, run.setting.batch_size

    def once() -> float:
        started = time.perf_counter()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        for rows in order.split(batch):
            optimiser.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimiser.step()
        return len(x) / (time.perf_counter() - started)

    return once


class _Module(torch.nn.Module):
    """A network of `bench.models` as an ordinary module."""

    def __init__(self, model: models.Model, params: Tree) -> None:
        super().__init__()
        self.model = model
        leaves = {
            path: torch.nn.Parameter(leaf.clone(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf.clone())
            for path, leaf in tree.flatten(params).items()
        }
        self.leaves = torch.nn.ParameterList(leaves.values())
        self.params = tree.unflatten(dict(zip(leaves, self.leaves, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        """Score images."""
        return self.model.logits(self.params["head"], self.model.features(self.params["body"], x))


def _compare(one: Callable[[], float], other: Callable[[], float], repeats: int) -> dict[str, float]:
    """Let two functions take turns; give the medians of both and of their ratio pair by pair."""
    one(), other()
    pairs = [(one(), other()) for _ in range(repeats)]
    return {
        "images_per_second": statistics.median(a for a, _ in pairs),
        "reference_images_per_second": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratio_min": min(a / b for a, b in pairs),
        "ratio_max": max(a / b for a, b in pairs),
        "pairs": float(repeats),
    }


def measure(repeats: int = 7) -> dict[str, dict[str, float]]:
    """Measure three ratios on one thread of this machine's CPU; about a minute and a half.

    Returns:
        By name of the comparison: images per second of the engine and of its reference, and their ratio.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = {}
        for model, clients, examples in (("fedavg_cnn", 8, 128), ("resnet8", 4, 64)):
            run = _federated(model, (3, 32, 32), clients, examples, 32, "serial")
            result[f"serial {model} against the bare loop"] = _compare(_round(run), _bare(run), repeats)
        stacked, serial = (_federated("mlp", (1, 8, 8), 64, 24, 16, engine) for engine in ("stacked", "serial"))
        result["stacked mlp, 64 clients, against serial"] = _compare(_round(stacked), _round(serial), repeats)
        return result
    finally:
        torch.set_num_threads(threads)


def engines(dataset: Dataset, model: str, batch: int, repeats: int = 7) -> dict[str, dict[str, float | str]]:
    """Let both engines take turns on one thread of this machine's CPU: rounds of 16 clients with 64 images each.

    Args:
        dataset: Whose shape and classes made-up images have; its files are not read.
        model: Name in `bench.models.MODELS`.
        batch: Images of an optimiser step.
        repeats: Rounds of each engine that are timed.

    Returns:
        By name of the comparison: images per second stacked and serial, their ratio, and what "auto" takes.

    Raises:
        BadModel: The images are too small for the model.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shape, classes = dataset.image_shape, dataset.num_classes
        stacked, serial = (_federated(model, shape, 16, 64, batch, each, classes) for each in ("stacked", "serial"))
        compared = _compare(_round(stacked), _round(serial), repeats)
        of = f"stacked {model}, {'×'.join(map(str, shape))}, {classes} classes, batch {batch}, against serial"
        return {of: {**compared, "auto is": choose("auto", serial.task.model, "cpu")}}
    finally:
        torch.set_num_threads(threads)
