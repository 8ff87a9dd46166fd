"""A user's own examples in one npz file: train_x, train_y, test_x, test_y, and maybe train_users and test_users."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench import DataDamaged, DataMissing, Dataset, Splits, register
from bench.dataset import DataTooLarge
from bench.files import npz
from bench.files.moments import moments

Array = npt.NDArray[Any]

IMAGES, LABELS, USERS = ("train_x", "test_x"), ("train_y", "test_y"), ("train_users", "test_users")


@register("arrays")
@dataclass(frozen=True, kw_only=True)
class Arrays(Dataset):
    """Examples and labels as NumPy writes them: `np.savez("arrays.npz", train_x=..., train_y=..., test_x=..., ...)`.

    Images are uint8: grey (N, height, width), or with 1 or 3 channels, first or last. All else is floating numbers of
    any shape, with channels or features first: rows of a table (N, d), windows of sensors (N, channels, time),
    embeddings, spectrograms (N, 1, height, width); they are neither shifted nor mirrored, and held as float32. Labels
    are whole numbers from 0, and every class up to the largest is needed in both parts. `train_users`, and `test_users`
    if there are any, are whole numbers that say whose each example is; with `--partition users` they are the clients.
    Results belong to the contents of the file, wherever it lies. Take the file itself to other machines: a run from a
    pack needs it too.
    """

    tail: ClassVar[Literal["made", "natural", "either"]] = "either"
    size: ClassVar[str] = "nothing to download"
    licence: ClassVar[str] = "your own"
    citation: ClassVar[str] = "your own"
    source: ClassVar[str] = "your own file"

    path: str = "arrays.npz"
    """The file, absolute or below the working directory; not below the data root."""
    normalise: Literal["standard", "none"] = "standard"
    """`standard`: mean 0 and deviation 1 of each channel or feature over the training part, a constant one is 0;
    `none`: floating numbers as they are, pixels from 0 to 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(Path(self.path).expanduser().absolute()))

    @property
    def num_classes(self) -> int:
        """As many as the largest label says."""
        return int(self._contents.splits.train_y.max()) + 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width; or as in the file."""
        return tuple(self._contents.splits.train_x.shape[1:])

    @property
    def pictures(self) -> bool:
        """Whether they are pixels."""
        return super().pictures and self._contents.splits.train_x.dtype == torch.uint8

    @property  # of the file; a fact of a dataset is only ever read
    def scale(self) -> float:  # type: ignore[override]
        """Pixels are 255 at most."""
        return 255.0 if self._contents.splits.train_x.dtype == torch.uint8 else 1.0

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of the training part."""
        return self._contents.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of the training part."""
        return self._contents.std

    def load(self, root: Path) -> Splits:
        """Read the file; `root` is not used."""
        return self._contents.splits

    def identity(self) -> dict[str, Any]:
        """Give the SHA-256 of the file, and what is not usual."""
        own = {"sha256": _sum(*_stamp(self.path))}
        return own if self.normalise == "standard" else {**own, "normalise": self.normalise}

    @property
    def _contents(self) -> Contents:
        try:
            return _read(*_stamp(self.path), self.normalise)
        except MemoryError as error:
            raise DataTooLarge(f"{self.path}: it does not fit in memory; write fewer or smaller examples") from error


@dataclass(frozen=True)
class Contents:
    """What is in a file."""

    splits: Splits
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _stamp(path: str) -> tuple[str, int, int]:
    """Tell this state of the file from others."""
    try:
        state = Path(path).stat()
    except OSError as error:
        raise DataMissing(
            f"arrays: {path} is not there; write it with np.savez, or say where it is with arrays(path='...')"
        ) from error
    if not S_ISREG(state.st_mode):
        raise _damaged(path, "it is a folder, a pipe or a device; name a file, as np.savez writes it")
    return path, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=4)
def _sum(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def _read(path: str, size: int, modified: int, normalise: str) -> Contents:
    """Read a file once for its facts, labels and examples.

    Raises:
        DataDamaged: It is not as `Arrays` wants it; a sentence for each way.
    """
    given = _load(path)
    kinds = {given[key].dtype == np.uint8 for key in IMAGES}
    if len(kinds) == 2:
        found = f"train_x is of type {given['train_x'].dtype} and test_x of {given['test_x'].dtype}"
        raise _damaged(path, f"{found}; both must be pixels, uint8, or floating numbers")
    read = _images if True in kinds else _numbers
    x = {key: read(path, key, given[key]) for key in IMAGES}
    y = {key: _whole_numbers(path, key, given[key], len(x[image])) for key, image in zip(LABELS, IMAGES, strict=True)}
    shapes = [tuple(images.shape[1:]) for images in x.values()]
    if shapes[0] != shapes[1]:
        raise _damaged(path, f"train_x has examples of {shapes[0]} and test_x of {shapes[1]}; they must be alike")
    classes = int(y["train_y"].max()) + 1
    if classes > len(y["train_y"]):
        found = f"train_y has labels up to {classes - 1:,}, and {len(y['train_y']):,} examples"
        raise _damaged(path, f"{found}; labels are numbers of classes from 0, and each class needs an example")
    for key, labels in y.items():
        low, high, present = int(labels.min()), int(labels.max()), set(labels.tolist())
        if low < 0 or high >= classes:
            raise _damaged(path, f"{key} has labels from {low} to {high}; it must be 0..{classes - 1}, as in train_y")
        if len(present) < classes:
            lacking = min(set(range(classes)) - present)
            raise _damaged(
                path, f"{key} has no example of class {lacking}; both parts need every class to {classes - 1}"
            )
    if "test_users" in given and "train_users" not in given:
        raise _damaged(path, "it has test_users and no train_users; leave them out, or say both")
    users = {
        key: _whole_numbers(path, key, given[key], len(x[image]))
        for key, image in zip(USERS, IMAGES, strict=True)
        if key in given
    }
    channels = shapes[0][0]
    mean, std = (0.0,) * channels, (1.0,) * channels
    if normalise == "standard":
        mean, std = (_moments if True in kinds else moments)(x["train_x"])
    if min(std) == 0:
        raise _damaged(path, "train_x has a channel in which all pixels are equal; leave that channel out")
    return Contents(Splits(x["train_x"], y["train_y"], x["test_x"], y["test_y"], *_numbered(users)), mean, std)


def _load(path: str) -> dict[str, Array]:
    try:
        with npz.opened(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            given = {key: npz.read(archive, key) for key in (*IMAGES, *LABELS, *USERS) if key in names}
    except MemoryError:
        raise
    except npz.BadArray as error:
        raise _damaged(path, f"{error}; write it with np.savez, arrays of plain numbers") from error
    except Exception as error:  # a damaged archive may raise anything
        raise _damaged(path, f"it is no whole npz file of plain arrays ({error}); write it with np.savez") from error
    absent = [key for key in (*IMAGES, *LABELS) if key not in given]
    if absent:
        raise _damaged(path, f"it has no {', '.join(absent)}; {', '.join((*IMAGES, *LABELS))} are needed")
    strange = [key for key in names if key not in given]
    if strange:
        raise _damaged(
            path, f"it has {', '.join(strange)}; besides what is needed, only {', '.join(USERS)} may be there"
        )
    return given


def _images(path: str, key: str, array: Array) -> Tensor:
    """Bring images to (N, channels, height, width)."""
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise _damaged(path, f"{key} is of shape {array.shape}; (N, height, width) is wanted, or with 1 or 3 channels")
    if array.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(array))[:, None]
    first, last = (array.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        why = "the first and the last could be" if first else "neither the first nor the last is 1 or 3"
        found = f"{key} has images of {array.shape[1:]}, where {why} channels"
        raise _damaged(path, f"{found}; grey ones can be (N, height, width)")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, 3, 1) if last else array))


def _numbers(path: str, key: str, array: Array) -> Tensor:
    """Bring floating examples to float32."""
    if array.dtype.kind != "f":
        found = f"{key} is of type {array.dtype}"
        raise _damaged(path, f"{found}; pixels must be uint8, 0 to 255, and all else floating numbers, such as float32")
    if array.ndim < 2 or 0 in array.shape:
        raise _damaged(path, f"{key} is of shape {array.shape}; (N, features) is wanted, or more axes after the first")
    with np.errstate(over="ignore"):  # said below
        numbers = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    whole = numbers.flatten(1).isfinite().all(1)
    if not whole.all():
        row = int((~whole).nonzero()[0])
        values = array[row].ravel()
        wrong = values[~numbers[row].flatten().isfinite().numpy()][0]
        raise _damaged(
            path,
            f"{key} has {wrong} in row {row:,}, where a finite number of float32 is wanted "
            f"(such rows: {int((~whole).sum()):,}); fill them in, or leave them out",
        )
    return numbers


def _whole_numbers(path: str, key: str, array: Array, images: int) -> Tensor:
    """Bring labels or users to (N,) int64."""
    if array.dtype.kind not in "iu" or array.shape != (images,):
        found = f"{key} is of type {array.dtype} and shape {array.shape}"
        raise _damaged(path, f"{found}; {images:,} whole numbers are wanted, one for each example")
    return torch.from_numpy(array.astype(np.int64))


def _numbered(users: dict[str, Tensor]) -> list[Tensor]:
    """Number users from 0, in the order of their numbers in the file, alike in both parts."""
    if not users:
        return []
    names = torch.cat(list(users.values())).unique()
    return [torch.searchsorted(names, part) for part in users.values()]


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation per channel, of pixels in [0, 1], from whole numbers: exactly rounded."""
    values = torch.arange(256)
    mean, std = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256)
        n, first, second = (int((counts * power).sum()) for power in (torch.ones(256).long(), values, values**2))
        mean.append(first / n / 255)
        std.append(math.sqrt((second * n - first**2) / n**2) / 255)
    return tuple(mean), tuple(std)


def _damaged(path: str, what: str) -> DataDamaged:
    return DataDamaged(f"{path}: {what}")
