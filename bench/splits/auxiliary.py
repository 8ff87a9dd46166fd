"""Images that no client has: labelled ones at the server, and unlabelled ones that everybody has.

    own:10          ten of each class among the training images that the tail cut away, the rest of them without labels
    cinic10:10      likewise of another dataset of the same classes
    cinic10         all of that dataset with labels

They do not depend on the seed, as the tail does not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.dataset import Dataset, Labels, Splits, Streamed
from bench.files import source
from bench.plugins.registry import label, name
from bench.protocol.settings import BadConfig, Setting
from bench.protocol.spelling import parse_dataset
from bench.splits.longtail import Rows, shuffled, subsample

NEEDS = frozenset({"auxiliary", "public"})
"""What an algorithm declares that wants such images."""
_OWN = "own"
_AT_ONCE = 1024  # images that are read from a file together


@dataclass(frozen=True)
class Origin:
    """Where such images come from."""

    dataset: Dataset | None
    """None: the run's own."""
    each: int | None
    """Labelled ones of each class; None: all."""

    def __str__(self) -> str:
        """Spell it in the one way that is stored."""
        images = _OWN if self.dataset is None else label(self.dataset)
        return images if self.each is None else f"{images}:{self.each}"


@dataclass(frozen=True)
class Reserve:
    """The images themselves; of a kind that the algorithm does not need there are none."""

    x: Tensor | Streamed
    """(N, channels, height, width), among others."""
    labelled: Tensor
    """(n,) int64, rows of `x`."""
    y: Tensor
    """(n,) int64, labels of these."""
    public: Tensor
    """(m,) int64, rows of `x`, unlabelled."""


def parse(text: str) -> Origin:
    """Read where images at the server come from.

    Raises:
        BadConfig: It is spelt otherwise, or the images are somebody's own, which others could not check.
        UnknownPlugin: There is no such dataset.
    """
    match = re.fullmatch(r"\s*(?P<images>\w.*?)\s*(:\s*(?P<each>[0-9]{1,12})\s*)?", text)
    if match is None or (match["images"] == _OWN and match["each"] is None) or match["images"].startswith(f"{_OWN}:"):
        raise BadConfig(f"auxiliary = {text!r}: own:N, DATASET or DATASET:N is wanted, such as own:10")
    dataset = None if match["images"] == _OWN else parse_dataset(match["images"])
    if dataset is not None and type(dataset).identity is not Dataset.identity:
        raise BadConfig(f"auxiliary = {text}: those are somebody's own files; a published dataset is wanted")
    return Origin(dataset, None if match["each"] is None else int(match["each"]))


def check(origin: Origin, dataset: Dataset) -> None:
    """Compare another dataset with that of a run, by what both say of themselves.

    Raises:
        BadConfig: Its images are not of the same kind.
    """
    other = origin.dataset
    if other is None:
        return
    said = f"auxiliary = {origin}"
    if name(other) == name(dataset):
        raise BadConfig(f"{said}: those are the run's own images; say own:N, and what the tail cut away is taken")
    for what in ("num_classes", "image_shape", "scale"):
        mine, theirs = getattr(dataset, what), getattr(other, what)
        if mine != theirs:
            raise BadConfig(f"{said}: its {what} is {theirs}, that of {label(dataset)} {mine}; they must be equal")


def check_needs(origin: Origin, needs: Set[str], algorithm: str) -> None:
    """See that an origin gives what an algorithm declares.

    Raises:
        BadConfig: It gives no image of one kind.
    """
    said = f"auxiliary = {origin}, and {algorithm} needs"
    if "auxiliary" in needs and origin.each == 0:
        raise BadConfig(f"{said} labelled images; ask for one of each class or more")
    if "public" in needs and origin.each is None:
        raise BadConfig(f"{said} public images, without labels; say how many of each class are labelled: {origin}:0")


def part_off(origin: Origin, needs: Set[str], labels: Tensor, taken: Rows, num_classes: int) -> tuple[Tensor, Tensor]:
    """Choose images that nobody has.

    Args:
        origin: Says how many are labelled.
        needs: Of the algorithm.
        labels: (N,) int64, of a training part.
        taken: Rows that are not to be chosen.
        num_classes: C.

    Returns:
        Ascending rows: `each` of every class, and all others; none of a kind that is not needed.

    Raises:
        BadConfig: There are not so many; the message says how many there are.
    """
    free = [rows[~np.isin(rows, taken)] for rows in shuffled(labels, num_classes)]
    sizes = [len(rows) for rows in free]
    each, fewest = origin.each, min(sizes)
    said, instead = f"auxiliary = {origin}", "those of another dataset (DATASET:N)"
    if each is not None and fewest < each:
        left = f"of class {sizes.index(fewest)} there are {fewest}"
        advice = f"ask for {fewest} at most, or for {instead}" if fewest else f"use {instead}"
        raise BadConfig(f"{said}: {each} images of each class are wanted that nobody has, and {left}; {advice}")
    chosen, others = np.concatenate([rows[:each] for rows in free]), np.concatenate([rows[each:] for rows in free])
    if each is None:
        others = others[:0]
    if "public" in needs and not len(others):
        raise BadConfig(f"{said}: no public image is left, without a label; label fewer, or use {instead}")
    found = {"auxiliary": chosen, "public": others}
    labelled, public = (torch.from_numpy(np.sort(rows[: None if kind in needs else 0])) for kind, rows in found.items())
    return labelled, public


def rows_wanted(
    origin: Origin, needs: Set[str], dataset: Dataset, labels: Labels, setting: Setting, root: Path
) -> list[Tensor]:
    """See from labels alone that there are such images.

    Returns:
        Rows of the run's own training part which must be there, as those of clients must.

    Raises:
        BadConfig: There are not enough.
        DataMissing, DataDamaged: As of `Dataset.labels`, of another dataset.
    """
    if origin.dataset is None:
        kept = subsample(labels.train, dataset.num_classes, setting.profile, setting.imbalance)
        return list(part_off(origin, needs, labels.train, kept, dataset.num_classes))
    known = source.labels(origin.dataset, root)
    source.require(origin.dataset, root, [])
    part_off(origin, needs, known.train, np.empty(0, dtype=np.int64), dataset.num_classes)
    return []


def reserve(origin: Origin, needs: Set[str], dataset: Dataset, splits: Splits, setting: Setting, root: Path) -> Reserve:
    """Find the images.

    All those of another dataset are read, and what the run trains and tests on: what both have is left out, by the
    SHA-256 of the pixels.

    Args:
        origin: Where they come from.
        needs: Of the algorithm.
        dataset: Of the run.
        splits: Its official images.
        setting: Its long tail is read.
        root: Of all datasets.

    Raises:
        BadConfig: There are not enough.
        DataMissing, DataDamaged: As of `Dataset.load`, of another dataset.
    """
    taken, images = subsample(splits.train_y, dataset.num_classes, setting.profile, setting.imbalance), splits
    if origin.dataset is not None:
        images = source.load(origin.dataset, root)
        known = {*_digests(splits.train_x, _places(splits, torch.from_numpy(taken)))}
        known |= {*_digests(splits.test_x, torch.arange(len(splits.test_y)))}
        everything = _digests(images.train_x, torch.arange(len(images.train_y)))
        taken = np.flatnonzero([digest in known for digest in everything])
    labelled, public = part_off(origin, needs, images.train_y, taken, dataset.num_classes)
    return Reserve(images.train_x, _places(images, labelled), images.train_y[labelled], _places(images, public))


def _places(splits: Splits, rows: Tensor) -> Tensor:
    """Give where in `train_x` official training rows lie."""
    return rows if splits.held is None else torch.searchsorted(splits.held, rows)


def _digests(x: Tensor | Streamed, rows: Tensor) -> Iterator[bytes]:
    """Give the SHA-256 of images, a few of which are read at a time."""
    for part in rows.split(_AT_ONCE):
        for image in x[part]:
            yield hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
