"""Readers of the lists that say which photographs a dataset has: `path label` lines, COCO-like JSON, CSV tables, and
folders of classes; and what datasets that are read from such lists share.

What is wrong with a list is said in one sentence, with the first bad entry and how many there are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Interval
from torch import Tensor

from bench.dataset import DataDamaged, DataMissing
from bench.files.download import Remote, fetch_all
from bench.files.listing import Listing, Part
from bench.files.photographs import Photographs
from bench.plugins.registry import label, name
from bench.system import reading
from bench.system.text import plain

PACKED = ("", ".xz", ".gz")
"""Endings that a list may have on the disk; the first that is there is read."""
_ODD = re.compile(r"[\x00-\x1f\\\ud800-\udfff]")


@dataclass(frozen=True)
class Entries:
    """What the list of one part says, in its order."""

    source: Path
    """The file or folder that it was read from."""
    paths: list[str]
    """(N,) below the dataset's folder, with `/`."""
    labels: npt.NDArray[np.int64]
    """(N,) from 0."""
    users: list[str] | None = None
    """(N,) whose photographs they are, if the list says so."""

    def kept(self, classes: int) -> Entries:
        """Leave out the classes from `classes` on."""
        rows = np.flatnonzero(self.labels < classes).tolist()
        users = None if self.users is None else [self.users[row] for row in rows]
        return Entries(self.source, [self.paths[row] for row in rows], self.labels[rows], users)

    def digest(self) -> str:
        """Give the id that git has for a file of the `path label` lines, whatever form the list has."""
        lines = zip(self.paths, self.labels.tolist(), strict=True)
        content = "".join(f"{path} {label}\n" for path, label in lines).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of the complete official list of one part.

    Without a digest an altered path goes unnoticed until its photograph is found missing, and whose photograph it is
    is always checked by the number of people only.
    """

    images: int
    per_class: tuple[int, int] | None = None
    """Images of the smallest and of the largest class."""
    users: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    """File name to the list's `Entries.digest`, of files that were published where their id can be seen, or that we
    had in our hands.
    """


@dataclass(frozen=True, kw_only=True)
class Listed(Photographs):
    """What datasets share that are read from published lists, with the photographs below the same folder.

    Subclasses give `home`, `all_classes`, `known`, `parts` and the facts of `Dataset`.
    """

    one_folder_per_class: ClassVar[bool] = True
    """Whether the folders below the part's show the class: then they are compared with the labels."""
    archives_have_home: ClassVar[bool] = False
    """Whether what is downloaded has the folder `home` inside."""
    by_hand: ClassVar[str] = ""
    """What a person can do where `bench data fetch` cannot be used; {home} stands for the dataset's folder."""

    classes: Annotated[int, Interval(ge=0, le=100_000)] = 0
    """Only the first so many classes; 0: all, and the lists must be the complete official ones. Lists that hold more
    classes than this must be complete as well; lists cut to just these are taken as they are.
    """

    def __post_init__(self) -> None:
        if self.classes and not 2 <= self.classes < self.all_classes:
            raise ValueError(f"classes = {self.classes}: must be in 2..{self.all_classes - 1}, or 0 for all")

    @property
    @abstractmethod
    def home(self) -> str:
        """The folder of lists and photographs below the data root."""

    @property
    @abstractmethod
    def all_classes(self) -> int:
        """Of the complete dataset."""

    @property
    @abstractmethod
    def known(self) -> tuple[Known, Known]:
        """What is known of the complete training and test lists."""

    @abstractmethod
    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """Read the lists of the training and the test part, all classes that they hold.

        Raises:
            DataMissing: A list is not there. DataDamaged: It cannot be read.
        """

    @property
    def remotes(self) -> tuple[Remote, ...]:
        """What `fetch` downloads to `home`; empty: there is nothing that could be downloaded."""
        return ()

    @property
    def num_classes(self) -> int:
        """C."""
        return self.classes or self.all_classes

    @property
    def folder_name(self) -> str:
        """As the dataset, with the number of classes if they are not all."""
        return name(self) + (f"-{self.classes}-classes" if self.classes else "")

    @property
    def expected(self) -> tuple[int, int] | None:
        """Training and test images of the official lists; None where classes are left out."""
        train, test = self.known
        return None if self.classes else (train.images, test.images)

    def listing(self, root: Path) -> Listing:
        """Read and check the lists; photographs need not be there."""
        folder = root / self.home
        parts = self.parts(folder)
        for part in parts:
            self._check_form(part)
        # One part that holds more classes says what the other must be: a list sorted by class may be cut anywhere.
        whole = not self.classes or any(bool((part.labels >= self.classes).any()) for part in parts)
        for part, known in zip(parts, self.known, strict=True) if whole else ():
            self._check_complete(part, known)
        train, test = (part.kept(self.num_classes) for part in parts)
        for part in (train, test):
            empty = np.flatnonzero(np.bincount(part.labels, minlength=self.num_classes) == 0).tolist()
            self.refuse(part.source, "classes without a photograph", empty)
        self.refuse(test.source, "photographs for training and test at once", set(train.paths) & set(test.paths))
        if self.one_folder_per_class:
            self._check_folders(train, test)
        return listing(folder, train, test)

    def fetch(self, root: Path) -> None:
        """Download and unpack the official files."""
        if not self.remotes:
            raise DataMissing(f"{name(self)} cannot be downloaded without a person; {self._how_by_hand(root)}")
        fetch_all(self.remotes, root if self.archives_have_home else root / self.home)

    def find(self, folder: Path, *wanted: tuple[str, ...]) -> list[Path]:
        """Find lists (or folders) by their names, packed or not.

        Args:
            folder: Of the dataset.
            *wanted: For each list the names it may have, the best first.

        Raises:
            DataMissing: One is not there under any name; the message says what to do.
        """
        found = [_first(folder, names) for names in wanted]
        absent = [
            " or ".join(dict.fromkeys(Path(each).name for each in names))
            for names, path in zip(wanted, found, strict=True)
            if path is None
        ]
        if absent:
            self.miss(folder, ", nor ".join(absent))
        return [path for path in found if path is not None]

    def miss(self, folder: Path, what: str) -> None:
        """Say that something is not there, and what to do."""
        root = folder.parent
        fetch = f"'bench data fetch {label(self, without=('pixels', 'classes'))}' downloads {self.size} to {root}"
        way = f"{fetch} (elsewhere: --data-root or $BENCH_DATA), or do it by hand: " if self.remotes else ""
        raise DataMissing(f"{name(self)}: {folder} has no {what}; {way}{self._how_by_hand(root)}")

    def read(self, path: Path) -> Entries:
        """Read a list in JSON or lines, by its name."""
        return (read_coco if ".json" in path.name else read_lines)(path, self.again())

    def refuse(self, source: Path, what: str, found: Iterable[object]) -> None:
        """Raise `DataDamaged` if anything was found, with the first and how many."""
        refuse(source, what, found, self.again())

    def again(self) -> str:
        """Say where the official files are had."""
        return f"get the official files again ({self.source})"

    def _how_by_hand(self, root: Path) -> str:
        return self.by_hand.format(home=root / self.home)

    def _check_form(self, part: Entries) -> None:
        """Refuse what no list may have."""
        self.refuse(part.source, "paths that lead out of the folder", (path for path in part.paths if leads_out(path)))
        self.refuse(part.source, "paths that stand there twice", repeated(part.paths))
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= self.all_classes)).tolist()
        range_of = f"photographs whose label is not in 0..{self.all_classes - 1}"
        self.refuse(part.source, range_of, (f"{part.paths[row]} ({part.labels[row]})" for row in wrong))

    def _check_complete(self, part: Entries, known: Known) -> None:
        """Refuse what is not the complete official list."""
        if len(part.paths) != known.images:
            present = len(np.unique(part.labels))
            cut = 2 <= present < self.all_classes and bool((part.labels < present).all())
            call = label(replace(self, classes=present), without=("pixels",)) if cut else ""
            raise DataDamaged(
                f"{part.source} has {len(part.paths):,} photographs of {present:,} classes, and {name(self)} has "
                f"{known.images:,} of {self.all_classes:,} there; {self.again()}"
                + (f", or say that only the first classes are meant: {call}" if cut else "")
            )
        counts = np.bincount(part.labels, minlength=self.all_classes)
        sizes = (int(counts.min()), int(counts.max()))
        if known.per_class not in (None, sizes):
            smallest, largest = known.per_class or sizes
            raise DataDamaged(
                f"{part.source} has {sizes[0]:,} to {sizes[1]:,} photographs of a class, and {name(self)} has "
                f"{smallest:,} to {largest:,} there; {self.again()}"
            )
        digest = known.digests.get(part.source.name.removesuffix(".xz").removesuffix(".gz"))
        if digest not in (None, part.digest()):
            raise DataDamaged(
                f"{part.source} is not the published list: its paths, labels or their order differ; {self.again()}"
            )
        users = known.users if part.users is not None else None
        if users not in (None, len(set(part.users or ()))):
            found = len(set(part.users or ()))
            raise DataDamaged(f"{part.source} names {found:,} people, and there are {users:,}; {self.again()}")

    def _check_folders(self, train: Entries, test: Entries) -> None:
        """Refuse labels that contradict the folders of classes."""
        shown = [
            [("/".join(path.split("/")[1:-1]), label) for path, label in zip(part.paths, part.labels, strict=True)]
            for part in (train, test)
        ]
        usual: dict[str, int] = {}
        for (folder, label_of), _ in Counter(pair for pairs in shown for pair in pairs).most_common():
            usual.setdefault(folder, label_of)
        for part, pairs in zip((train, test), shown, strict=True):
            wrong = (path for path, pair in zip(part.paths, pairs, strict=True) if usual[pair[0]] != pair[1])
            self.refuse(part.source, "photographs whose label is not that of their folder", wrong)
        self.refuse(train.source, "labels that several folders have", repeated(usual.values()))


def listing(
    folder: Path, train: Entries, test: Entries, sizes: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
) -> Listing:
    """Make a listing of checked entries; users are numbered by their names' order, common to both parts."""
    names = {user: None for part in (train, test) for user in part.users or ()}
    number = {user: row for row, user in enumerate(sorted(names))}
    return Listing(
        folder,
        *(
            Part(
                part.paths,
                torch.from_numpy(part.labels),
                None if part.users is None else torch.tensor([number[user] for user in part.users]),
                size,
            )
            for part, size in zip((train, test), sizes, strict=True)
        ),
    )


# Formats ----------------------------------------------------------------------------------------------------


def contents(path: Path, advice: str) -> bytes:
    """Read a list, unpacked.

    Raises:
        DataDamaged: It cannot be read or unpacked.
    """
    try:
        return reading.unpacked(reading.contents(path), path.suffix)
    except (OSError, reading.TooLarge) as error:
        raise DataDamaged(f"{path} cannot be read ({error}); {advice}") from error


def text_lines(path: Path, advice: str) -> list[str]:
    """Read a list as lines without their ends.

    Raises:
        DataDamaged: It cannot be read, or is no text.
    """
    try:
        lines = contents(path, advice).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataDamaged(f"{path} is not text ({error}); {advice}") from error
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: Path, advice: str) -> Entries:
    """Read `path label` lines.

    Raises:
        DataDamaged: A line is something else.
    """
    rows = [line.rpartition(" ") for line in text_lines(path, advice)]
    wrong = (number for number, (where, _, label) in enumerate(rows, 1) if not where or not is_number(label))
    refuse(path, "lines that are not a path and a label", (f"line {number}" for number in wrong), advice)
    return Entries(path, [where for where, _, _ in rows], np.array([int(label) for _, _, label in rows]))


def read_coco(path: Path, advice: str) -> Entries:
    """Read the JSON of an iNaturalist competition: `images`, `annotations`, one class each, and rights holders.

    Photographs whose rights holder is empty are one user's.

    Raises:
        DataDamaged: It is not complete JSON of that form, or images and annotations do not belong together.
    """
    try:
        images, annotations = _records(path, advice, "images", "annotations")
        ids = [image["id"] for image in images]
        paths = [image["file_name"] for image in images]
        users = [image["rights_holder"] or "" for image in images]
        labelled = [annotation["image_id"] for annotation in annotations]
        classes = [annotation["category_id"] for annotation in annotations]
        refuse(path, "image ids that stand there twice", repeated(ids), advice)
        refuse(path, "images with several annotations", repeated(labelled), advice)
        known, class_of = set(ids), dict(zip(labelled, classes, strict=True))
        refuse(path, "annotations of images that are not there", (id for id in labelled if id not in known), advice)
        refuse(path, "images without an annotation", (id for id in ids if id not in class_of), advice)
    except (KeyError, TypeError) as error:
        raise _other_form(path, error, advice) from error
    named = zip(ids, paths, users, strict=True)
    unnamed = (id for id, where, user in named if type(where) is not str or type(user) is not str)
    refuse(path, "images whose file name or rights holder is no text", unnamed, advice)
    odd = (f"{class_of[id]!r}, of {id}" for id in ids if not _is_class(class_of[id]))
    refuse(path, "labels that are no class", odd, advice)
    return Entries(path, paths, np.array([class_of[id] for id in ids], dtype=np.int64), users)


def read_names(path: Path, advice: str) -> list[str]:
    """Read the `file_name` of every image of a JSON in COCO's form.

    Raises:
        DataDamaged: It is not complete JSON of that form.
    """
    try:
        (images,) = _records(path, advice, "images")
        names = [image["file_name"] for image in images]
    except (KeyError, TypeError) as error:
        raise _other_form(path, error, advice) from error
    refuse(path, "images whose file name is no text", (name for name in names if type(name) is not str), advice)
    return names


def read_table(path: Path, columns: Sequence[str], advice: str) -> dict[str, list[str]]:
    """Read columns of a CSV with a header, as text.

    Raises:
        DataDamaged: It is no CSV, or has other columns.
    """
    try:
        text = io.StringIO(contents(path, advice).decode("utf-8-sig"), newline="")
        header, *rows = (row for row in csv.reader(text, strict=True) if row)
    except (ValueError, csv.Error) as error:
        raise DataDamaged(f"{path} is no CSV with a header ({error}); {advice}") from error
    if not set(columns) <= set(header):
        found = plain(", ".join(header))
        raise DataDamaged(f"{path} has the columns {found}, and {', '.join(columns)} are wanted; {advice}")
    uneven = (", ".join(row) for row in rows if len(row) != len(header))
    refuse(path, f"rows without {len(header)} columns", uneven, advice)
    places = [header.index(column) for column in columns]
    return {column: [row[place] for row in rows] for column, place in zip(columns, places, strict=True)}


def _records(path: Path, advice: str, *parts: str) -> list[list[dict[str, Any]]]:
    try:
        document = json.loads(contents(path, advice))
    except (ValueError, RecursionError) as error:
        raise DataDamaged(f"{path} is not complete JSON ({error}); {advice}") from error
    records = [document[part] for part in parts]
    for part, listed in zip(parts, records, strict=True):
        if type(listed) is not list or not listed:
            raise TypeError(f"{part} is no list with something in it")
    return records


def _other_form(path: Path, error: Exception, advice: str) -> DataDamaged:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return DataDamaged(f"{path} is not in the official form ({what}); {advice}")


# Checks -----------------------------------------------------------------------------------------------------


def refuse(source: Path, what: str, found: Iterable[object], advice: str) -> None:
    """Raise `DataDamaged` if anything was found, with the first and how many."""
    entries = list(found)
    if entries:
        first = plain(str(entries[0]))
        raise DataDamaged(f"{source}: {what}: {len(entries):,}, the first is {first}; {advice}")


def repeated(values: Iterable[Hashable]) -> list[Hashable]:
    """List the values that are there several times, each once."""
    return [value for value, times in Counter(values).items() if times > 1]


def leads_out(path: str) -> bool:
    """Tell whether a path of a list is not one below the folder: absolute, with `..`, or with odd characters."""
    steps = path.split("/")
    return any(step in ("", ".", "..") for step in steps) or _ODD.search(path) is not None


def is_number(text: str) -> bool:
    """Tell whether text is a whole number of nine digits at most."""
    return text.isascii() and text.isdigit() and len(text) < 10


def _is_class(value: object) -> bool:
    return type(value) is int and abs(value) < 2**31


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    places = (folder / f"{name}{ending}" for name in names for ending in PACKED)
    return next((place for place in places if place.exists()), None)
