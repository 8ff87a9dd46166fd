"""A teacher that stands still: what it makes of images and classes, from a file that the user names.

The file (`bench run --teacher`) is one of safetensors with two tensors of floats, d being the width of its space:

    images   (N, d)   a row for each image of the official training part, in the dataset's order
    texts    (C, d)   a row for each class, such as what CLIP makes of "a photo of a dog"
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from bench.system import reading

_WANTED = "a file of safetensors with `images` and `texts` is wanted"


class BadTeacher(ValueError):
    """A file of features cannot be read, or they are those of other images or classes."""


class Features(NamedTuple):
    """What a teacher makes of a dataset: float32, on the CPU."""

    images: Tensor
    """(N, d), of the official training part."""
    texts: Tensor
    """(C, d), of the classes."""


@dataclass(frozen=True)
class Teacher:
    """A file of features, which is known by its content."""

    file: Path
    """Where it lies; its name is a remark in results."""
    digest: str
    """SHA-256 of its content, 64 hexadecimal digits: what a run's identity says of it."""

    def __str__(self) -> str:
        """Name it by the beginning of its digest, as labels do."""
        return f"teacher {self.digest[:8]}"

    def read(self, images: int, classes: int) -> Features:
        """Read the features.

        Args:
            images: N, of the official training part.
            classes: C.

        Raises:
            BadTeacher: The file cannot be read, is another than it was, or does not fit the dataset.
        """
        content = _content(self.file)
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise BadTeacher(f"{self.file} has changed since it was named; run the same command again")
        try:
            found = load(content)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # as of types that torch has not
            raise BadTeacher(f"{self.file} cannot be read ({type(error).__name__}); {_WANTED}") from error
        if found.keys() != set(Features._fields):
            named = ", ".join(sorted(found)[:5]) or "nothing"
            raise BadTeacher(f"{self.file} holds {named}; {_WANTED}, and no more")
        width = found["texts"].shape[-1] if found["texts"].ndim else 0
        for name, rows in (("images", images), ("texts", classes)):
            tensor = found[name]
            if tensor.shape != (rows, width) or not width or not tensor.is_floating_point():
                there = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
                of = {"images": "training image", "texts": "class"}[name]
                wanted = f"({rows}, d) floats are wanted, a row for each {of} of the dataset, d alike for both"
                raise BadTeacher(f"{self.file}: {name} is {there}, and {wanted}")
            found[name] = tensor.to(torch.float32)
            if not found[name].isfinite().all():
                raise BadTeacher(f"{self.file}: {name} is not finite; make the file anew")
        return Features(**found)


def named(file: Path) -> Teacher:
    """Look at a file that a person named.

    Raises:
        BadTeacher: It cannot be read.
    """
    return Teacher(file, hashlib.sha256(_content(file)).hexdigest())


def _content(file: Path) -> bytes:
    try:
        return reading.contents(file)
    except (OSError, reading.TooLarge) as error:
        raise BadTeacher(f"{file} cannot be read ({reading.why(error)}); {_WANTED}") from error
