"""How much memory many clients and many images take, and what reading images from a file costs: `bench speed --scale`.

Everything is generated. Memory is that of a process which does nothing else, at its highest.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.dataset import Dataset, Labels, Splits
from bench.files import prepared, unfinished
from bench.protocol.settings import Setting
from bench.speed.federation import Heads
from bench.splits.split import Split, make_split
from bench.training.job import Job
from bench.training.memory import peak_memory
from bench.training.rounds import Run

CLIENTS, IMAGES_EACH, CLASSES = 10_000, 5, 100
STORED, SIDE, CLASSES_STORED = 200_000, 64, 100


@dataclass(frozen=True, kw_only=True)
class _Generated(Dataset):
    """Noise with labels."""

    num_classes: ClassVar[int] = CLASSES
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.25, 0.25, 0.25)
    side: int = 16

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Three channels, square."""
        return 3, self.side, self.side

    def load(self, root: Path) -> Splits:
        """Make five images for each of ten thousand users."""
        n = CLIENTS * IMAGES_EACH
        random = np.random.RandomState(0)
        users = torch.arange(CLIENTS).repeat_interleave(IMAGES_EACH)
        y = torch.from_numpy(random.randint(0, CLASSES, n))
        test_y = torch.arange(CLASSES).repeat(100)
        x, test_x = (_noise(random, (len(labels), *self.image_shape)) for labels in (y, test_y))
        return Splits(x, y, test_x, test_y, users)


def _noise(random: np.random.RandomState, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(random.bytes(int(np.prod(shape)))), dtype=torch.uint8).view(shape)


def measure(repeats: int = 5) -> dict[str, dict[str, float]]:
    """Measure many clients, and a store of many images; some minutes, 2.5 GB of disk, 4 GB of memory.

    Args:
        repeats: Pairs of rounds that are timed.

    Returns:
        By measurement, its numbers.
    """
    with _scratch() as folder:
        store = folder / "store"
        _prepare(store)
        alone: list[tuple[str, Callable[[Path], dict[str, float]], Path]] = [
            (f"{CLIENTS:,} clients with personal heads, ResNet-8", many_clients, folder / "run"),
            (f"{STORED:,} images of {SIDE} pixels, read from a store", from_store, store),
        ]
        found = {name: _apart(function, argument) for name, function, argument in alone}
        found["images/s from the store against memory"] = against_memory(store, repeats)
        return found


def many_clients(folder: Path) -> dict[str, float]:
    """Run forty rounds of fifty clients out of ten thousand, and test all ten thousand personal models."""
    torch.set_num_threads(1)
    dataset = _Generated()
    setting = Setting(
        name="scale", model="resnet8", clients=None, participation=50 / CLIENTS, rounds=40, epochs=1, batch_size=5,
        lr=0.01, partition="users", alpha=None, imbalance=None, eval_every=40,
    )  # fmt: skip
    started = time.perf_counter()
    splits = dataset.load(folder)
    split = make_split(splits.labels, CLASSES, setting, 0)
    dealt = time.perf_counter()
    run = Run(Job(Heads(generic=False), dataset, splits, split, setting, 0, "serial"), folder / "checkpoint.pt")
    measured: dict[str, float | None] | None = None
    while run.progress.round < setting.rounds:
        measured = run.step()
    assert measured is not None and measured["personal"] is not None
    cost = run.outcome().cost
    return {
        "clients": float(run.population.size),
        "clients that took part": float(len(run.store.clients())),
        "MB of client state": (cost["client_state_bytes"] or 0.0) / 1e6,
        "seconds for data and split": dealt - started,
        "seconds in all": time.perf_counter() - started,
        "peak GiB of memory": (cost["peak_memory_bytes"] or 0.0) / 2**30,
    }


def _prepare(folder: Path) -> None:
    """Write a store of noise."""
    random = np.random.RandomState(0)
    plan = prepared.Plan(listing="scale", shape=(3, SIDE, SIDE), train=STORED, test=1000, chunk=5000)
    with unfinished.writing(folder, plan) as store:
        for chunk in store.todo():
            store.write(chunk, _noise(random, (len(chunk), SIDE, SIDE, 3)).numpy())
        store.finish(Labels(torch.arange(STORED) % CLASSES_STORED, torch.arange(1000) % CLASSES_STORED))


def _stored_run(splits: Splits) -> Run:
    """Set up a run over the store's images: 400 clients, 8 a round, a small network that waits for nothing."""
    rows = tuple(torch.from_numpy(np.random.RandomState(0).permutation(STORED)).split(STORED // 400))
    tests = tuple(torch.arange(0) for _ in rows)
    split = Split(class_counts=torch.bincount(splits.train_y), clients=rows, tests=tests, fingerprint="scale")
    setting = Setting(
        name="scale", model="small_cnn", clients=400, participation=8 / 400, rounds=100_000, epochs=1, batch_size=32,
        lr=0.01, augment="crop_flip",
    )  # fmt: skip
    return Run(Job(Heads(generic=False), _Generated(side=SIDE), splits, split, setting, 0, "serial"))


def from_store(folder: Path) -> dict[str, float]:
    """Train three rounds from a store, in a process that has nothing else in memory."""
    torch.set_num_threads(1)
    run = _stored_run(_open(folder))
    speeds = [_round(run) for _ in range(3)]
    return {"images/s": statistics.median(speeds), "peak GiB of memory": (peak_memory("cpu") or 0.0) / 2**30}


def against_memory(folder: Path, repeats: int) -> dict[str, float]:
    """Let the same rounds from the store and from memory take turns, in one process.

    The system has the store in its cache, as it has after a first round; then the cache is dropped before each round,
    so that images come from the disk.
    """
    torch.set_num_threads(1)
    splits = _open(folder)
    assert not isinstance(splits.train_x, Tensor) and not isinstance(splits.test_x, Tensor)
    loaded = [images[torch.arange(len(images))] for images in (splits.train_x, splits.test_x)]
    stored = _stored_run(splits)
    memory = _stored_run(Splits(loaded[0], splits.train_y, loaded[1], splits.test_y))
    _round(stored), _round(memory)
    warm = [(_round(stored), _round(memory)) for _ in range(repeats)]
    cold = []
    for _ in range(repeats):
        _drop_cache(folder / "train.bin")
        cold.append((_round(stored), _round(memory)))
    result = {"images/s from memory": statistics.median(b for _, b in warm)}
    for name, pairs in (("store in the system's cache", warm), ("store on disk", cold)):
        ratios = [a / b for a, b in pairs]
        result |= {f"{name}: ratio": statistics.median(ratios), f"{name}: least": min(ratios)}
    return result


def _open(folder: Path) -> Splits:
    store = prepared.find(folder)
    assert store is not None
    return store.splits()


def _round(run: Run) -> float:
    """Do one round without testing, and give images per second."""
    r = run.progress.round
    started = time.perf_counter()
    run.population.prefetch(r, r + 1)
    task = run.task_at(r)
    for exchange in run.algorithm.exchanges(task):
        run.exchange(task, exchange)
    run.progress.round += 1
    return float(run.population.sizes(run.population.cohort(r)).sum()) / (time.perf_counter() - started)


def _drop_cache(file: Path) -> None:
    """Have the system forget a file's content, where it can be asked to."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _apart(function: Callable[[Path], dict[str, float]], argument: Path) -> dict[str, float]:
    """Call a function in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, argument).result()


@contextmanager
def _scratch() -> Iterator[Path]:
    """Make a folder on a disk (not in memory, where a temporary one may be) that goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=Path.cwd()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
