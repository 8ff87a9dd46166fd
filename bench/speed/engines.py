"""Both engines for one network, on made-up images of a dataset's shape: `bench speed --model`."""

from __future__ import annotations

import torch

from bench import keys
from bench.dataset import Dataset, Splits
from bench.protocol.settings import Setting
from bench.speed.federation import Average
from bench.speed.sides import federated
from bench.speed.turns import Ratio, described, take_turns
from bench.splits.split import Split
from bench.training.engine import choose
from bench.training.job import Job
from bench.training.rounds import Run

_WARM = 6
"""Rounds of each engine before those that are timed: what is stacked is written down in one of them."""


def _federated(dataset: Dataset, model: str, clients: int, examples: int, batch: int, engine: str) -> Run:
    """Set up a run over random images, each client with as many, that is not tested."""
    n, shape, classes = clients * examples, dataset.image_shape, dataset.num_classes
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
        eval_every=100_000,
    )
    return Run(Job(Average(), dataset, Splits(x, y, x[:1], y[:1]), split, setting, 0, engine))


def compare(dataset: Dataset, model: str, batch: int, repeats: int = 7) -> dict[str, dict[str, float | str]]:
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
        stacked, serial = (_federated(dataset, model, 16, 64, batch, each) for each in ("stacked", "serial"))
        sides = [federated("stacked", stacked), federated("serial", serial)]
        found = described(take_turns(sides, repeats, warm=_WARM), [Ratio("stacked", "serial")])
        (ratio,) = found["ratios"]
        compared = {
            "images_per_second": found["sides"]["stacked"]["median"],
            "reference_images_per_second": found["sides"]["serial"]["median"],
            "ratio": ratio["median"],
            "ratio_min": ratio["least"],
            "ratio_max": ratio["most"],
            "pairs": float(repeats),
        }
        of = f"stacked {model}, {'×'.join(map(str, shape))}, {classes} classes, batch {batch}, against serial"
        return {of: {**compared, "auto is": choose("auto", serial.task.model, batch, "cpu")}}
    finally:
        torch.set_num_threads(threads)
