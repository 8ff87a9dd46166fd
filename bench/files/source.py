"""Where a run's data come from: the folder of all datasets, or one packed file in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from bench.dataset import DataMissing, Dataset, DataTooLarge, Labels, Splits
from bench.files import pack
from bench.plugins.registry import label


def load(dataset: Dataset, root: Path) -> Splits:
    """Read a dataset from a folder or a pack; errors of `Dataset.load` and of `pack.load`, and `DataTooLarge`."""
    with _in_memory(dataset):
        return pack.load(root, dataset) if _is_pack(root) else dataset.load(root)


def labels(dataset: Dataset, root: Path) -> Labels:
    """Read the labels only; same errors as `load`."""
    with _in_memory(dataset):
        return pack.labels(root, dataset) if _is_pack(root) else dataset.labels(root)


def verify(dataset: Dataset, root: Path) -> None:
    """Compare all images with their checksums, where `labels` has not: before a sweep begins, so that damage is told
    once, and is no run's failure.

    A pack and small files are read whole, with as many bytes a second as SHA-256 takes; of a prepared store it is
    remembered which state of its files was compared.

    Raises:
        DataDamaged: They are not what was written. DataMissing: They are not there.
    """
    with _in_memory(dataset):
        if _is_pack(root):
            pack.verify(root)
        else:
            dataset.verify(root)


def require(dataset: Dataset, root: Path, clients: Sequence[Tensor]) -> None:
    """Make sure that the images of a split are there, where labels may be without them.

    Args:
        dataset: Whose.
        root: Folder or pack.
        clients: Official training rows of each client.

    Raises:
        DataMissing: Photographs are not prepared, or the pack does not hold them; the message says what to do.
    """
    if _is_pack(root):
        pack.require(root, clients)
    else:
        dataset.require(root)


def _is_pack(root: Path) -> bool:
    if root.suffix == ".npz" and not root.exists():  # never fall back to what a dataset has without its files
        raise DataMissing(f"{root} is not there; 'bench data pack' makes such a file from the official ones")
    return root.is_file()


@contextmanager
def _in_memory(dataset: Dataset) -> Iterator[None]:
    try:
        yield
    except DataTooLarge:
        raise
    except MemoryError as error:
        raise DataTooLarge(
            f"{label(dataset)} does not fit in memory; end what else uses it, choose a part of the dataset, or a "
            "machine with more"
        ) from error
