"""The datasets that are read from lists or folders of photographs, and how to write small trees of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from bench.dataset import DataDamaged
from bench.files.listing import Listing
from bench.files.lists import Known, Listed
from bench.plugins.registry import DATASETS
from tests import trees


@dataclass(frozen=True)
class Kind:
    """A dataset, and how to write a small tree of it."""

    name: str
    write: Callable[[Path], Path]
    fields: Mapping[str, Any]
    lists: tuple[str, ...]
    """Files that are no photographs."""

    def make(self, **fields: Any) -> Any:
        return DATASETS[self.name](**self.fields, **fields)


INAT_JSON = ("train2018.json", "val2018.json")
INAT_TEXT = ("iNaturalist18_train.txt", "iNaturalist18_val.txt")
USERS = ("inaturalist-user-120k/federated_train_user_120k.csv", "inaturalist-user-120k/test.csv")
INAT_USERS = (*USERS, "train2017.json", "val2017.json")
PLACES = ("Places_LT_train.txt", "Places_LT_test.txt")
LISTED = {
    "json": Kind("inat", partial(trees.inat, photographs=False), {}, INAT_JSON),
    "text": Kind("inat", partial(trees.inat, photographs=False, forms=("txt", "txt")), {}, INAT_TEXT),
    "mixed": Kind(
        "inat",
        partial(trees.inat, photographs=False, version=2019, forms=("txt", "json")),
        {"version": 2019},
        ("iNaturalist19_train.txt", "val2019.json"),
    ),
    "users": Kind("inat_users", partial(trees.inat_users, photographs=False), {}, INAT_USERS),
    "imagenet": Kind(
        "imagenet_lt",
        partial(trees.imagenet_lt, photographs=False),
        {},
        ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
    ),
    "places": Kind("places_lt", partial(trees.places_lt, photographs=False), {}, PLACES),
}
FOLDERS = {
    "cinic": Kind("cinic10", partial(trees.cinic10, classes=6, each=5), {}, ()),
    "tiny": Kind(
        "tiny_imagenet",
        partial(trees.tiny_imagenet, classes=6, each=5, tested=2),
        {},
        ("wnids.txt", "val/val_annotations.txt"),
    ),
}
KINDS = {**LISTED, **FOLDERS}
CLASSES = 6


def contents(listing: Listing) -> tuple[list[Any], ...]:
    """Everything but the folder."""
    parts = (listing.train, listing.test)
    return tuple(
        [list(part.paths), part.labels.tolist(), None if part.users is None else part.users.tolist()] for part in parts
    )


@contextmanager
def official(kind: Kind, root: Path) -> Iterator[Listed]:
    """Take a small tree for the complete official one, with all that could be known of it."""
    dataset = kind.make(classes=CLASSES)
    parts = dataset.parts(root / dataset.home)
    counts = [np.bincount(part.labels) for part in parts]
    known = tuple(
        Known(
            images=len(part.paths),
            per_class=(int(count.min()), int(count.max())),
            users=None if part.users is None else len(set(part.users)),
            digests={part.source.name: part.digest()},
        )
        for part, count in zip(parts, counts, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(dataset), "all_classes", CLASSES)
        patch.setattr(type(dataset), "known", known)
        yield kind.make()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def complaint(dataset: Any, root: Path) -> str:
    """Say what is wrong with a tree."""
    with pytest.raises(DataDamaged) as caught:
        dataset.listing(root)
    said = str(caught.value)
    assert "\n" not in said and said.count("; ") >= 1  # one sentence, that ends in what to do
    return said


@st.composite
def damages(draw: st.DrawFn, lists: tuple[str, ...]) -> dict[str, tuple[str, int, int]]:
    """For some of the lists what happens to them, and where, in 2^16 parts of the file."""
    hurt = draw(st.sets(st.sampled_from(lists), min_size=1))
    what = st.tuples(
        st.sampled_from(["removed", "truncated", "altered", "altered"]), st.integers(0, 2**16 - 1), st.integers(0, 255)
    )
    return {name: draw(what) for name in sorted(hurt)}


def damage(path: Path, what: str, place: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    where = place * len(content) >> 16
    if what == "removed":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(content[:where])
    else:
        content[where] = value
        path.write_bytes(content)
