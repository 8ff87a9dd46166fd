"""What `bench speed` measures, by name: federations of which everything but the machine is fixed.

Digits are real, as they ship with scikit-learn. All else is drawn, of the shape and the sizes of the real dataset, so
that a workload needs no file: an example is noise and, fainter, a pattern of its class, which can be learnt, so that
the accuracy after some rounds says whether two programs have done the same. Classes have a long tail, and clients are
dealt by Dirichlet, hence unequal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.dataset import Dataset
from bench.plugins.registry import DATASETS
from bench.protocol.settings import Setting
from bench.splits.longtail import class_sizes
from bench.sweep.resolving import resolve_setting

FILE = "examples.npz"
SEED = 0
"""Of splits, weights, cohorts and data order."""
ENDLESS = 100_000
"""Rounds of a federation that is measured for as long as somebody likes."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A federation, and what of it is measured."""

    what: str
    """In words."""
    measures: Literal["training", "heads", "sweep"] = "training"
    """"training": local training, evaluation, start, and whole runs beside those of peers; "heads": the evaluation of a
    personal head for each client; "sweep": twelve runs."""
    model: str
    norm: str = "group"
    engines: tuple[str, ...] = ("serial",)
    shape: tuple[int, ...] | None
    """Of a drawn example: of uint8 pixels if it has three axes, else of floating numbers; None: digits."""
    classes: int = 10
    largest: int = 0
    """Training examples of the first class, where they are drawn."""
    imbalance: float = 1.0
    """Largest class over smallest, where they are drawn."""
    tested: int = 100
    """Test examples of each class, where they are drawn."""
    clients: int
    cohort: int
    epochs: int = 1
    batch: int
    rounds: int
    """Of a whole run, after which accuracies are compared."""
    warm: int = 1
    """Rounds before those that are timed: where clients are stacked, their shapes must have come a few times."""
    partition: str = "dirichlet"

    def dataset(self, folder: Path) -> Dataset:
        """Give the examples; what is drawn is written to a file in a folder, unless it is there."""
        if self.shape is None:
            digits: Dataset = DATASETS["digits"]()
            return digits
        file = folder / FILE
        if not file.exists():
            np.savez(file, allow_pickle=False, **draw(self.shape, self.sizes(), self.tested))
        drawn: Dataset = DATASETS["arrays"](path=str(file))
        return drawn

    def sizes(self) -> list[int]:
        """Give the training examples of each class."""
        return class_sizes("exponential", self.largest, self.imbalance, self.classes)

    def fields(self, rounds: int) -> dict[str, object]:
        """Give the fields in which the protocol differs from `quick`; only the last of the rounds is evaluated."""
        tail = {"imbalance": 1.0} if self.shape is None else {}
        dealt = {"alpha": 0.5} if self.partition == "dirichlet" else {}
        return {
            "model": self.model, "norm": self.norm, "clients": self.clients,
            "participation": self.cohort / self.clients, "epochs": self.epochs, "batch_size": self.batch, "lr": 0.05,
            "momentum": 0.5, "augment": "none", "partition": self.partition, "rounds": rounds,
            "eval_every": rounds, **tail, **dealt,
        }  # fmt: skip

    def setting(self, dataset: Dataset, rounds: int = ENDLESS) -> Setting:
        """Give the protocol."""
        return resolve_setting("quick", dataset, self.fields(rounds))


def draw(shape: tuple[int, ...], sizes: list[int], tested: int) -> Mapping[str, npt.NDArray[np.generic]]:
    """Draw examples as `arrays` reads them.

    Args:
        shape: Of an example: three axes are pixels, uint8; otherwise floating numbers, float32.
        sizes: Training examples of each class.
        tested: Test examples of each class.

    Returns:
        `train_x`, `train_y`, `test_x` and `test_y`, in a random order.
    """
    random = np.random.default_rng(0)
    classes = len(sizes)
    pixels = len(shape) == 3
    coarse = (shape[0], *(-(-side // 4) for side in shape[1:])) if pixels else shape
    patterns = random.random((classes, *coarse), dtype=np.float32)
    if pixels:  # of 4 by 4 pixels, which a convolution sees
        height, width = shape[1:]
        patterns = patterns.repeat(4, 2).repeat(4, 3)[:, :, :height, :width]
    drawn: dict[str, npt.NDArray[np.generic]] = {}
    for part, counts in (("train", sizes), ("test", [tested] * classes)):
        y = random.permutation(np.repeat(np.arange(classes), counts))
        if pixels:
            noise = np.frombuffer(random.bytes(len(y) * int(np.prod(shape))), dtype=np.uint8).reshape(len(y), *shape)
            drawn[f"{part}_x"] = noise // 4 * 3 + (patterns * 63).astype(np.uint8)[y]
        else:
            drawn[f"{part}_x"] = random.standard_normal((len(y), *shape), dtype=np.float32) + patterns[y]
        drawn[f"{part}_y"] = y
    return drawn


_CNN = (3, 32, 32)

WORKLOADS: Mapping[str, Workload] = {
    "tiny": Workload(
        what="digits, MLP, 100 clients, 10 a round, 2 epochs, batch 10", model="mlp", shape=None, clients=100,
        cohort=10, epochs=2, batch=10, rounds=200, warm=100, engines=("serial", "stacked"),
    ),
    "small": Workload(
        what="Fashion-MNIST's shape, small CNN, 20 clients, 8 a round, batch 32", model="small_cnn", shape=(1, 28, 28),
        largest=6000, imbalance=10.0, tested=1000, clients=20, cohort=8, batch=32, rounds=10,
    ),
    "cnn": Workload(
        what="CIFAR-10-LT's shape, FedAvg CNN, 40 clients, 8 a round, 2 epochs, batch 32", model="fedavg_cnn",
        shape=_CNN, largest=5000, imbalance=100.0, tested=1000, clients=40, cohort=8, epochs=2, batch=32, rounds=10,
    ),
    "resnet8": Workload(
        what="CIFAR-10-LT's shape, a quarter of its size, ResNet-8, 20 clients, 4 a round, batch 32", model="resnet8",
        shape=_CNN, largest=1250, imbalance=50.0, tested=50, clients=20, cohort=4, batch=32, rounds=5,
    ),
    "fedloge": Workload(
        what="CIFAR-10-LT's shape, a tenth of its size, ResNet-18 with batch norm, 40 clients, 2 a round, batch 8",
        model="resnet18", norm="batch", shape=_CNN, largest=500, imbalance=100.0, tested=10, clients=40, cohort=2,
        batch=8, rounds=3,
    ),
    "adapter": Workload(
        what="features of 1,280, 100 classes, a hidden layer of 256, 40 clients, 8 a round, batch 32", model="adapter",
        shape=(1280,), classes=100, largest=500, imbalance=50.0, tested=50, clients=40, cohort=8, batch=32, rounds=10,
        engines=("serial", "stacked"),
    ),
    "personal": Workload(
        what="CIFAR-10-LT's shape, FedAvg CNN: 40 personal heads on a shared body against one generic model",
        measures="heads", model="fedavg_cnn", shape=_CNN, largest=500, imbalance=100.0, tested=500, clients=40,
        cohort=40, batch=32, rounds=1,
    ),
    "sweep": Workload(
        what="12 runs of 30 rounds of tiny's federation, on both cores", measures="sweep", model="mlp", shape=None,
        clients=100, cohort=10, epochs=2, batch=10, rounds=30,
    ),
}  # fmt: skip
"""By name."""
