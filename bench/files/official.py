"""How the official files of small datasets are read: checked, and with errors that say what to do."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.dataset import DataDamaged, DataMissing, Labels, Splits
from bench.files.download import Remote, fetch_all
from bench.system import reading


@dataclass(frozen=True, kw_only=True)
class Official:
    """The official files of a dataset."""

    name: str
    """As on the command line."""
    folder: str
    """Below the data root, as torchvision lays it out."""
    checksums: Mapping[str, str]
    """File name to the SHA-256 of its contents (if it may lie there packed by gzip: of the unpacked ones); or to their
    MD5, where nothing else was published and the file was never in our hands."""
    of_packed: bool = False
    """Whether the checksums are those of the files as gzip packed them: an unpacked one is known by its shape."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """File name to the shape of the idx array in it, where checksums cannot vouch for it."""
    unpacked_to: str = ""
    """Folder below `folder` in which the downloaded archive has them, packed; they may lie there as well."""
    remotes: tuple[Remote, ...] = ()
    """What `bench data fetch` downloads; names are below the data root."""
    size: str
    """Of the download, in words."""
    by_hand: str
    """What a person can do instead of `bench data fetch`; {root} stands for the data root."""

    def read(self, root: Path, name: str) -> bytes:
        """Give the contents of a file, unpacked, if its checksum is right.

        The checksum is computed at every reading: 0.3 s for all of CIFAR, so nothing need be remembered.

        Raises:
            DataMissing: A file of the dataset is not there.
            DataDamaged: This one is not the official one.
        """
        absent = [file for file in self.checksums if not self._path(root, file).is_file()]
        if absent:
            raise DataMissing(
                f"{self.name}: {root / self.folder} has no {', '.join(absent)}; "
                f"'bench data fetch {self.name}' downloads {self.size} to {root} (elsewhere: --data-root or "
                f"$BENCH_DATA), or do it by hand: {self.by_hand.format(root=root)}"
            )
        path = self._path(root, name)
        advice = f"delete it and run 'bench data fetch {self.name}' again"
        try:
            stored = reading.contents(path)
            contents = reading.unpacked(stored, path.suffix)
        except (OSError, reading.TooLarge) as error:
            raise DataDamaged(f"{path} cannot be read ({error}); {advice}") from error
        summed = stored if self.of_packed else contents
        unknown = self.of_packed and path.suffix != ".gz"
        if not unknown and not agrees(summed, self.checksums[name]):
            raise DataDamaged(f"{path} is not the official file, its checksum is wrong; {advice}")
        return contents

    def verify(self, root: Path) -> None:
        """Read all files, where labels and images lie apart; errors of `array`."""
        for name in self.checksums:
            self.array(root, name)

    def array(self, root: Path, name: str) -> Tensor:
        """Read a file in the idx format: uint8; errors of `read`, and `DataDamaged` if it has another shape."""
        contents, expected = self.read(root, name), self.shapes.get(name)
        try:
            values = read_idx(contents)
        except (ValueError, IndexError, RuntimeError):  # cut short, or in another format
            values = torch.empty(0)
        if expected not in (None, tuple(values.shape)):
            found = " x ".join(map(str, values.shape))
            wanted = " x ".join(map(str, expected or ()))
            raise DataDamaged(
                f"{self._path(root, name)} is not the official file, it holds {found} bytes in place of {wanted}; "
                f"delete it and run 'bench data fetch {self.name}' again"
            )
        return values

    def fetch(self, root: Path) -> None:
        """Download what is not there yet, and go on where an earlier call was interrupted.

        Raises:
            DataMissing: That failed; the message says what to do by hand.
            DataDamaged: What the server sent, or a file that was there, is not the official one.
        """
        fetch_all(self.remotes, root)

    def _path(self, root: Path, name: str) -> Path:
        path = root / self.folder / name
        places = (path, path.with_name(name + ".gz"), path.parent / self.unpacked_to / f"{name}.gz")
        return next((place for place in places if place.is_file()), path)


def agrees(contents: bytes, checksum: str) -> bool:
    """Tell whether contents have a checksum: SHA-256, or, if it is of 32 hexadecimal digits, MD5."""
    digest = hashlib.md5(contents, usedforsecurity=False) if len(checksum) == 32 else hashlib.sha256(contents)
    return digest.hexdigest() == checksum


class _Batches(pickle.Unpickler):
    """Knows the names that a batch of CIFAR has, and no others: they could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Give what a name of the pickle stands for."""
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch has") from None


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # as NumPy 2 has it
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def unpickle(contents: bytes) -> dict[str, Any]:
    """Read a batch of CIFAR, pickled by Python 2, after its checksum was found right.

    Raises:
        DataDamaged: It names what no batch has, and is not read further.
    """
    with warnings.catch_warnings():
        # NumPy dislikes how the arrays of 2009 spell their dtype.
        warnings.filterwarnings("ignore", message=".*align should be passed as Python or NumPy boolean")
        try:
            batch = _Batches(io.BytesIO(contents), encoding="latin1").load()
            if not isinstance(batch, dict):
                raise TypeError(f"it is a {type(batch).__name__}")
        except Exception as error:  # a damaged pickle may raise anything
            raise DataDamaged(f"a batch of CIFAR cannot be read ({error}); fetch the official files again") from error
    return batch


def images_of(batches: list[dict[str, Any]]) -> Tensor:
    """Join the images of CIFAR batches: (N, 3, 32, 32) uint8."""
    return torch.cat([torch.from_numpy(batch["data"]) for batch in batches]).view(-1, 3, 32, 32)


def labels_of(batches: list[dict[str, Any]], key: str) -> Tensor:
    """Join the labels of CIFAR batches: (N,) int64."""
    return torch.tensor([label for batch in batches for label in batch[key]])


def idx_splits(files: Official, root: Path, *, transposed: bool = False) -> Splits:
    """Read grey images and labels from the four idx files of MNIST and its kin, in the order of their checksums:
    training images and labels, test images and labels.

    Args:
        files: Which.
        root: The data root.
        transposed: Whether images are stored by columns.
    """
    train_x, train_y, test_x, test_y = (files.array(root, name) for name in files.checksums)
    if transposed:
        train_x, test_x = (images.transpose(1, 2).contiguous() for images in (train_x, test_x))
    return Splits(train_x[:, None], train_y.long(), test_x[:, None], test_y.long())


def idx_labels(files: Official, root: Path) -> Labels:
    """Read the two small ones of the four files."""
    _, train, _, test = files.checksums
    return Labels(files.array(root, train).long(), files.array(root, test).long())


def read_idx(contents: bytes) -> Tensor:
    """Read an array of unsigned bytes in the idx format of MNIST: uint8 of the shape that it states.

    Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    rank = contents[3]
    shape = np.frombuffer(contents, dtype=">u4", count=rank, offset=4).tolist()
    return torch.frombuffer(bytearray(contents), dtype=torch.uint8, offset=4 + 4 * rank).view(shape)
