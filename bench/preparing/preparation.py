"""What is done with the files of a dataset before any run: decode photographs into a store, or look for bad ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.dataset import DataDamaged, DataMissing, Dataset, Labels, Splits
from bench.files import source
from bench.files.decode import BadPhotograph, decode, versions
from bench.files.download import free
from bench.files.listing import Listing, Part
from bench.files.photographs import Photographs
from bench.files.prepared import PARTS, Chunk, Plan, Store, find
from bench.files.unfinished import Unfinished, explained, in_words, tidy, writing
from bench.plugins.registry import label
from bench.sweep.cluster import spread
from bench.system.durable import put

CHUNK = 128
"""Photographs that one task decodes; not a matter of speed, but of how much is done again after a kill."""
_SAMPLE = 200
"""Photographs that are looked for before anything is written."""


_FEW = 1000
"""Photographs that are decoded sooner than Ray starts."""


class Progress(Protocol):
    """Somebody who is told how far the work is, always in the driver's process."""

    def say(self, sentence: str) -> None:
        """Hear something of interest."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Learn that so many pieces are to be gone through, some of which were done earlier."""

    def advance(self, pieces: int) -> None:
        """Learn that some more are done."""


@dataclass(frozen=True)
class Prepared:
    """How a preparation ended."""

    folder: Path
    """Of the store."""
    store: Store | None
    """None: photographs are broken."""
    decoded: int
    """Photographs decoded now, not earlier."""
    broken: Sequence[tuple[Path, str]] = ()
    """Photographs that could not be decoded, and why."""

    @property
    def broken_file(self) -> Path:
        """Where all broken photographs are listed."""
        return self.folder.with_name(f"{self.folder.name}.broken.txt")

    def complaint(self, call: str) -> str:
        """Say that photographs are broken, of the dataset that is called so, and what to do."""
        return (
            f"{call}: missing or broken photographs: {len(self.broken):,}, all named in {self.broken_file}; "
            f"{_elsewhere(path for path, _ in self.broken)}replace them and run the same command: only they are "
            "decoded again"
        )


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    contents: str
    """What the dataset has, in words."""
    problems: Sequence[str]


def prepare(dataset: Photographs, root: Path, jobs: int | None, progress: Progress, chunk: int = CHUNK) -> Prepared:
    """Decode all photographs of a dataset into its store; what an earlier call has done is not done again.

    The bytes of the store depend on the photographs, on `chunk` and on the versions of the decoders: not on `jobs`, nor
    on interruptions. Broken photographs do not keep the others; the next call decodes only them.

    Args:
        dataset: What to prepare.
        root: The data root.
        jobs: Processes at once; None for what this machine holds and the work is worth, 1 for this process only.
        progress: Told how far it is.
        chunk: Photographs that one task decodes.

    Raises:
        DataMissing: The lists, or all photographs, are not there. DataDamaged: The lists are not what they should be.
        StoreUnwritable: The disk is full, or the data root cannot be written, or another process prepares the same.
    """
    folder, call = dataset.store(root), label(dataset, without=("pixels",))
    present = _present(folder, progress)
    try:
        listing = dataset.listing(root)
    except DataMissing:
        if present is None or dataset.mutable:
            raise
        return Prepared(folder, present, 0)  # a store can do without the official files
    digest = listing.digest()
    if present is not None and present.listing == digest:
        tidy(folder)
        return Prepared(folder, present, 0)
    if present is not None:
        progress.say(f"{folder} was made from other lists; it stays until the new one is complete")
    _require_photographs(listing, call)
    channels, height, width = dataset.image_shape
    plan = Plan(
        listing=digest,
        shape=(channels, height, width),
        train=len(listing.train.paths),
        test=len(listing.test.paths),
        chunk=chunk,
        made_by=versions(),
    )
    total = plan.train + plan.test
    progress.say(
        f"{call}: {total:,} photographs at {dataset.pixels} pixels take {in_words(plan.nbytes)} in {folder}, "
        f"where {in_words(free(folder))} are free"
    )
    with writing(folder, plan, progress.say) as unfinished:
        decoded = _decode_all(unfinished, listing, jobs, progress)
        broken = _broken(unfinished, listing)
        result = Prepared(folder, None, decoded, broken)
        with explained(folder):
            if broken:
                put(result.broken_file, "".join(f"{path}: {why}\n" for path, why in broken).encode())
                return result
            result.broken_file.unlink(missing_ok=True)
        return Prepared(folder, unfinished.finish(listing.labels), decoded)


def check(dataset: Dataset, root: Path, jobs: int | None, progress: Progress) -> Checked:
    """Read all files of a dataset and collect all that is wrong with them.

    Photographs are decoded, each of them; if a store was prepared, it is compared with its checksums.

    Args:
        dataset: What to check.
        root: The data root, or a pack.
        jobs: As for `prepare`.
        progress: Told how far it is.

    Raises:
        DataMissing: A dataset that is not of photographs is not there. DataDamaged: One of its files is not what it
        should be.
    """
    if isinstance(dataset, Photographs) and not root.is_file():
        return _check_photographs(dataset, root, jobs, progress)
    splits = source.load(dataset, root)
    return Checked(_contents(dataset, splits.labels, root), _wrong_splits(dataset, splits))


# Preparing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A chunk and where its photographs are."""

    chunk: Chunk
    paths: tuple[str, ...]


def _decode_all(unfinished: Unfinished, listing: Listing, jobs: int | None, progress: Progress) -> int:
    """Decode what is to do, and count it."""
    plan = unfinished.plan
    tasks, rest, decoded = [], 0, 0
    for chunk in unfinished.todo():
        marker = unfinished.marker(chunk)
        rest += len(chunk) if marker is None else len(marker.broken)
        tasks.append(_Task(chunk, tuple(map(str, _paths(listing, chunk.part, range(chunk.start, chunk.stop))))))
    progress.begin("decoding", plan.train + plan.test, plan.train + plan.test - rest)

    def done(task: _Task, photographs: int) -> None:
        nonlocal decoded
        decoded += photographs
        progress.advance(photographs)

    spread(partial(_decode_chunk, unfinished, plan.shape[-1]), tasks, _enough(jobs, rest), done)
    return decoded


def _decode_chunk(unfinished: Unfinished, pixels: int, task: _Task) -> int:
    """Decode a chunk, or those of its photographs that were broken the last time; give how many it was."""
    chunk, marker = task.chunk, unfinished.marker(task.chunk)
    images = None if marker is None else unfinished.read(chunk)
    if marker is None or images is None:
        images = np.zeros((len(chunk), pixels, pixels, 3), dtype=np.uint8)
        rows = list(range(chunk.start, chunk.stop))
    else:
        rows = list(marker.broken)
    broken = {}
    for row in rows:
        try:
            images[row - chunk.start] = decode(task.paths[row - chunk.start], pixels)
        except BadPhotograph as error:
            broken[row] = str(error)
    unfinished.write(chunk, images, broken)
    return len(rows)


def _broken(unfinished: Unfinished, listing: Listing) -> list[tuple[Path, str]]:
    markers = [(chunk.part, unfinished.marker(chunk)) for chunk in unfinished.todo()]
    return [
        (path, why)
        for part, marker in markers
        if marker is not None
        for path, why in zip(_paths(listing, part, marker.broken), marker.broken.values(), strict=True)
    ]


def _elsewhere(paths: Iterable[Path]) -> str:
    """Say where the first photograph that is missing lies instead, if it does: many scripts re-sort folders."""
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        for folder, _, names in os.walk(missing.parent.parent):
            if missing.name in names:
                return (
                    f"{missing.name} of {missing.parent} lies in {folder}: were they re-sorted into class folders? put "
                    "them back as the official archive has them; else "
                )
    return ""


def _present(folder: Path, progress: Progress) -> Store | None:
    """Open the store that is there; a damaged one is as good as none."""
    try:
        return find(folder)
    except DataDamaged:
        progress.say(f"what is prepared in {folder} is damaged; it is made anew")
        return None


def _require_photographs(listing: Listing, call: str) -> None:
    """Look for some photographs before space is taken for all of them."""
    total = sum(len(_part(listing, part).paths) for part in PARTS)
    first = None
    for part in PARTS:
        rows = range(0, len(_part(listing, part).paths), max(1, total // _SAMPLE))
        for path in _paths(listing, part, rows):
            if path.exists():
                return
            first = first or path
    raise DataMissing(
        f"{call}: the lists are there, and none of the photographs that were looked for, such as {first}; "
        f"{_elsewhere([first] if first else [])}'bench data fetch {call}' gets them, or says where they are to be had"
    )


def _enough(jobs: int | None, photographs: int) -> int | None:
    return 1 if jobs is None and photographs <= _FEW else jobs


def _paths(listing: Listing, part: str, rows: Iterable[int]) -> list[Path]:
    folder, paths = listing.folder.absolute(), _part(listing, part).paths
    return [folder / paths[row] for row in rows]


def _part(listing: Listing, part: str) -> Part:
    return listing.train if part == "train" else listing.test


# Checking ---------------------------------------------------------------------------------------------------


def _check_photographs(dataset: Photographs, root: Path, jobs: int | None, progress: Progress) -> Checked:
    problems: list[str] = []
    listing, store = None, None
    try:
        listing = dataset.listing(root)
        problems += _wrong_labels(dataset, listing.labels)
        problems += _bad_photographs(listing, dataset.pixels, jobs, progress)
    except (DataMissing, DataDamaged) as error:
        problems.append(str(error))
    try:
        store = find(dataset.store(root))
    except DataDamaged as error:
        problems.append(str(error))
    if store is not None:
        progress.begin("comparing the prepared store", store.plan.train + store.plan.test)
        problems += store.verify(progress.advance)
        if listing is not None and store.listing != listing.digest():
            command = dataset.prepare_command(root)
            problems.append(f"{store.folder} was made from other lists than those in {root}; run again: {command}")
    labels = listing.labels if listing is not None else store.labels if store is not None else None
    contents = "nothing of it" if labels is None else _contents(dataset, labels, root)
    return Checked(contents if store is None else f"{contents}; prepared in {store.folder}", problems)


def _bad_photographs(listing: Listing, pixels: int, jobs: int | None, progress: Progress) -> list[str]:
    found: dict[str, str] = {}
    every = [str(path) for part in PARTS for path in _paths(listing, part, range(len(_part(listing, part).paths)))]
    progress.begin("decoding", len(every))

    def done(paths: Sequence[str], bad: dict[str, str]) -> None:
        found.update(bad)
        progress.advance(len(paths))

    pieces = [every[start : start + CHUNK] for start in range(0, len(every), CHUNK)]
    spread(partial(_try_to_decode, pixels), pieces, _enough(jobs, len(every)), done)
    return [f"{path}: {found[path]}" for path in every if path in found]  # in the order of the lists


def _try_to_decode(pixels: int, paths: Sequence[str]) -> dict[str, str]:
    bad = {}
    for path in paths:
        try:
            decode(path, pixels)
        except BadPhotograph as error:
            bad[path] = str(error)
    return bad


def _wrong_splits(dataset: Dataset, splits: Splits) -> list[str]:
    problems = []
    for part, x, y in (("training", splits.train_x, splits.train_y), ("test", splits.test_x, splits.test_y)):
        if tuple(x.shape[1:]) != dataset.image_shape or len(x) != len(y):
            found = f"{len(y)} labels and images of {tuple(x.shape)}"
            problems.append(f"{part} part: {found}; each must be {dataset.image_shape}")
    return problems + _wrong_labels(dataset, splits.labels)


def _wrong_labels(dataset: Dataset, labels: Labels) -> list[str]:
    problems = []
    for part, y, users in (("training", labels.train, labels.users), ("test", labels.test, labels.test_users)):
        classes, expected = set(y.tolist()), set(range(dataset.num_classes))
        # Natural test parts may lack a class; a class that nothing is learnt of is a mistake everywhere.
        whole = part == "training" or dataset.tail == "made"
        if not classes <= expected or (whole and classes != expected):
            found = f"{len(classes)} classes, {min(classes, default=None)} to {max(classes, default=None)}"
            problems.append(f"{part} part: {found}; there must be {dataset.num_classes} from 0")
        if users is not None and (len(users) != len(y) or users.min() < 0):
            problems.append(f"{part} part: {len(y)} labels and {len(users)} users, from {users.min()}")
    return problems


def _contents(dataset: Dataset, labels: Labels, root: Path) -> str:
    shape = " x ".join(map(str, dataset.image_shape))
    what = "images" if len(dataset.image_shape) == 3 else "examples"
    return (
        f"{len(labels.train):,} training and {len(labels.test):,} test {what} of {shape}, "
        f"{dataset.num_classes} classes (data root {root})"
    )
