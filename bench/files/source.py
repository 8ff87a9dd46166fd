"""Where a run's data come from: the folder of all datasets, or one packed file in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bench.dataset import DataMissing, Dataset, Labels, Splits
from bench.files import pack


def load(dataset: Dataset, root: Path) -> Splits:
    """Read a dataset from a folder or a pack; errors of `Dataset.load` and of `pack.load`."""
    return pack.load(root, dataset) if _is_pack(root) else dataset.load(root)


def labels(dataset: Dataset, root: Path) -> Labels:
    """Read the labels only; same errors as `load`."""
    return pack.labels(root, dataset) if _is_pack(root) else dataset.labels(root)


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
