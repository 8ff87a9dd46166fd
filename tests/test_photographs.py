"""Datasets of photographs: the lists that say which there are, and everything that can be wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dataset import DataDamaged, DataMissing
from bench.files.listing import Listing
from bench.files.lists import Known, Listed, images_below
from bench.preparation import Progress, prepare
from bench.registry import DATASETS, label
from bench.settings import SETTINGS
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


class Silent(Progress):
    """Tells nobody."""

    def say(self, sentence: str) -> None:
        pass

    def begin(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, photographs: int) -> None:
        pass


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


# Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_small_tree_is_read_whole(kind: Kind, tmp_path: Path) -> None:
    folder = kind.write(tmp_path)
    dataset = kind.make(classes=CLASSES)
    listing = dataset.listing(tmp_path)
    assert listing.folder == folder and dataset.num_classes == CLASSES and dataset.expected is None
    if kind.name == "cinic10" or kind.name == "tiny_imagenet":
        train, test = [5] * 6, [5] * 6 if kind.name == "cinic10" else [2] * 6
    else:
        train, test = np.round(np.geomspace(40, 5, 6)).astype(int).tolist(), [4] * 6
    assert listing.train.labels.bincount().tolist() == train
    assert listing.test.labels.bincount().tolist() == test
    for part in (listing.train, listing.test):
        assert len(part.paths) == len(part.labels) == len(set(part.paths))
        assert part.labels.dtype == torch.int64
        assert part.users is None or part.users.dtype == torch.int64
    labels = dataset.labels(tmp_path)
    assert torch.equal(labels.train, listing.train.labels) and torch.equal(labels.test, listing.test.labels)


def test_photographs_lie_where_the_lists_say(tmp_path: Path) -> None:
    writers = (trees.inat, trees.inat_users, trees.imagenet_lt, trees.places_lt, trees.cinic10, trees.tiny_imagenet)
    for write in writers:
        write(tmp_path, classes=3)
    trees.inat(tmp_path, classes=3, version=2019, forms=("txt", "json"))
    trees.folder(tmp_path / "mine", classes=3)
    names = ["inat", "inat_users", "imagenet_lt", "places_lt", "cinic10", "tiny_imagenet"]
    datasets = [DATASETS[name](classes=3) for name in names]
    for dataset in (*datasets, DATASETS["inat"](classes=3, version=2019), DATASETS["folder"](path=f"{tmp_path}/mine")):
        listing = dataset.listing(tmp_path)
        for part in (listing.train, listing.test):
            assert all((listing.folder / path).is_file() for path in part.paths), label(dataset)


def test_a_list_and_the_json_that_it_was_made_from_are_the_same(tmp_path: Path) -> None:
    for form in ("json", "txt"):
        trees.inat(tmp_path / form, forms=(form, form), photographs=False)
    dataset = DATASETS["inat"](classes=CLASSES)
    listed, complete = dataset.listing(tmp_path / "txt"), dataset.listing(tmp_path / "json")
    for one, other in ((listed.train, complete.train), (listed.test, complete.test)):
        assert list(one.paths) == list(other.paths) and torch.equal(one.labels, other.labels)
        assert one.users is None and other.users is not None


def test_json_comes_before_a_list_and_lists_may_be_packed(tmp_path: Path) -> None:
    dataset = DATASETS["inat"](classes=CLASSES)
    folder = trees.inat(tmp_path, photographs=False)
    expected = contents(dataset.listing(tmp_path))
    (folder / INAT_TEXT[0]).write_text("not read")
    assert contents(dataset.listing(tmp_path)) == expected
    for name, pack, ending in ((INAT_JSON[0], lzma.compress, ".xz"), (INAT_JSON[1], gzip.compress, ".gz")):
        (folder / (name + ending)).write_bytes(pack((folder / name).read_bytes()))
        (folder / name).unlink()
    assert contents(dataset.listing(tmp_path)) == expected
    (folder / INAT_JSON[0]).write_text("read before the packed one")
    with pytest.raises(DataDamaged, match=r"train2018\.json is not complete JSON"):
        dataset.listing(tmp_path)


def test_users_are_the_rights_holders_with_numbers_common_to_both_parts(tmp_path: Path) -> None:
    folder = trees.inat(tmp_path, photographs=False, users=8)
    listing = DATASETS["inat"](classes=CLASSES).listing(tmp_path)
    for name, part in zip(INAT_JSON, (listing.train, listing.test), strict=True):
        document = json.loads((folder / name).read_text())
        holders = {image["file_name"]: image["rights_holder"] for image in document["images"]}
        assert part.users is not None
        named = [f"User {user} é" for user in part.users.tolist()]  # eight names: their order is that of the digits
        assert named == [holders[path] for path in part.paths]


def test_users_have_the_same_numbers_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    folder = trees.inat(tmp_path, photographs=False)
    dataset = DATASETS["inat"](classes=CLASSES)
    before = dataset.listing(tmp_path).train
    document = json.loads((folder / INAT_JSON[0]).read_text())
    document["images"].reverse()
    (folder / INAT_JSON[0]).write_text(json.dumps(document))
    after = dataset.listing(tmp_path).train
    assert list(after.paths) == list(before.paths)[::-1]
    assert after.labels.tolist() == before.labels.tolist()[::-1]
    assert after.users.tolist() == before.users.tolist()[::-1]


def test_a_photograph_without_a_named_holder_is_nobodys(tmp_path: Path) -> None:
    folder = trees.inat(tmp_path, photographs=False, users=8)
    edit(folder / INAT_JSON[0], lambda document: document["images"][3].update(rights_holder=None))
    edit(folder / INAT_JSON[0], lambda document: document["images"][9].update(rights_holder=""))
    users = DATASETS["inat"](classes=CLASSES).listing(tmp_path).train.users
    assert users[3] == users[9] == 0 and int(users.max()) == 8


def test_users_of_the_user_split_are_the_clients(tmp_path: Path) -> None:
    folder = trees.inat_users(tmp_path, photographs=False)
    dataset = DATASETS["inat_users"](classes=CLASSES)
    listing = dataset.listing(tmp_path)
    assert dataset.own_clients and listing.test.users is None
    with (folder / USERS[0]).open(newline="") as source:
        rows = list(csv.DictReader(source))
    assert [Path(path).stem for path in listing.train.paths] == [row["image_id"] for row in rows]
    assert [f"User {user} é" for user in listing.train.users.tolist()] == [row["user_id"] for row in rows]
    assert listing.train.labels.tolist() == [int(row["class"]) for row in rows]
    (folder / "federated_train_user_120k.csv").write_bytes((folder / USERS[0]).read_bytes())
    (folder / "test.csv").write_bytes((folder / USERS[1]).read_bytes())
    shutil.rmtree(folder / "inaturalist-user-120k")
    assert contents(dataset.listing(tmp_path)) == contents(listing)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fewer_classes_are_the_complete_lists_without_the_others(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path)
    with official(kind, tmp_path) as dataset:
        complete = dataset.listing(tmp_path)
        assert dataset.expected == (len(complete.train.paths), len(complete.test.paths))
        few = kind.make(classes=2)
        cut = few.listing(tmp_path)
    for part, whole in ((cut.train, complete.train), (cut.test, complete.test)):
        rows = [row for row, label in enumerate(whole.labels.tolist()) if label < 2]
        assert list(part.paths) == [whole.paths[row] for row in rows]
        assert torch.equal(part.labels, whole.labels[rows])
    assert (few.num_classes, few.expected) == (2, None)
    assert few.folder_name == f"{dataset.folder_name}-2-classes"


def test_the_number_of_classes_must_leave_something_and_leave_something_out() -> None:
    for fields in ({"classes": 1}, {"classes": 8142}, {"classes": -3}, {"version": 2019, "classes": 1010}):
        with pytest.raises(ValueError, match=r"^classes = -?\d+: must be in 2\.\.\d+, or 0 for all$"):
            DATASETS["inat"](**fields)
    with pytest.raises(ValueError, match=r"^version = 2017: must be one of 2018, 2019$"):
        DATASETS["inat"](version=2017)


def test_what_is_not_prepared_says_how(tmp_path: Path) -> None:
    trees.inat(tmp_path, photographs=False)
    with pytest.raises(DataMissing, match=r"^inat\(classes=6\) is not prepared .* data prepare 'inat\(classes=6\)'"):
        DATASETS["inat"](classes=CLASSES).load(tmp_path)


# Facts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("inat", 437_513, 24_426, 8_142),
        ("inat_users", 120_300, 35_641, 1_203),
        ("imagenet_lt", 115_846, 50_000, 1_000),
        ("places_lt", 62_500, 36_500, 365),
        ("cinic10", 90_000, 90_000, 10),
        ("tiny_imagenet", 100_000, 10_000, 200),
    ],
)
def test_every_dataset_says_what_it_is(name: str, train: int, test: int, classes: int) -> None:
    dataset = DATASETS[name]()
    assert dataset.expected == (train, test) and dataset.num_classes == classes
    assert dataset.size and dataset.licence and dataset.citation and dataset.source and dataset.by_hand
    assert dataset.tail == ("made" if name in ("cinic10", "tiny_imagenet") else "natural")
    assert set(dataset.quick) <= set(SETTINGS["quick"](dataset).__dataclass_fields__)
    assert dataset.image_shape == ((3, 32, 32) if name == "cinic10" else (3, 64, 64))
    assert DATASETS[name](pixels=224).image_shape == (3, 224, 224)


def test_the_versions_of_inat_differ_in_all_they_should() -> None:
    old, new = DATASETS["inat"](), DATASETS["inat"](version=2019)
    for fact in ("home", "folder_name", "num_classes", "expected", "size", "source", "remotes", "known"):
        assert getattr(old, fact) != getattr(new, fact), fact
    assert new.expected == (265_213, 3_030)


def test_fetching_downloads_the_official_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], Path]] = []
    monkeypatch.setattr(
        "bench.files.lists.fetch_all", lambda remotes, folder: asked.append(([each.url for each in remotes], folder))
    )
    for name, home, count in (
        ("inat", "inat2018", 3),
        ("inat_users", "inat2017", 3),
        ("cinic10", "cinic10", 1),
        ("tiny_imagenet", ".", 1),  # these archives have the folder inside
        ("places_lt", ".", 3),
    ):
        DATASETS[name]().fetch(tmp_path)
        urls, folder = asked.pop()
        assert len(urls) == count and all(url.startswith("http") for url in urls)
        assert folder == tmp_path / home
    with pytest.raises(DataMissing, match=r"imagenet_lt cannot be downloaded .* register at https://image-net\.org"):
        DATASETS["imagenet_lt"]().fetch(tmp_path)
    assert not asked


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_not_there_is_named_with_what_to_do(kind: Kind, tmp_path: Path) -> None:
    dataset = kind.make()
    with pytest.raises(DataMissing) as caught:
        dataset.listing(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{kind.name}: {tmp_path / dataset.home} has no ")
    for name in kind.lists:
        assert Path(name).name in said
    assert str(tmp_path / dataset.home) in said.partition("has no")[2]
    if kind.name == "imagenet_lt":
        assert "bench data fetch" not in said and "https://image-net.org" in said
    else:
        call = "inat(version=2019)" if kind.fields else kind.name
        assert f"'bench data fetch {call}' downloads {dataset.size} to {tmp_path}" in said


# From lists to runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["inat", "inat_users", "imagenet_lt", "places_lt", "cinic10", "tiny_imagenet", "folder"]
)
def test_a_small_tree_is_prepared_and_shows_its_classes(name: str, tmp_path: Path) -> None:
    write = getattr(trees, name)
    if name == "folder":
        dataset = DATASETS[name](path=str(write(tmp_path / "own", classes=3)), pixels=8)
    else:
        write(tmp_path, classes=3)
        dataset = DATASETS[name](classes=3, pixels=8)
    prepare(dataset, tmp_path, 1, Silent())
    splits, listing = dataset.load(tmp_path), dataset.listing(tmp_path)
    assert splits.train_x.shape == (len(listing.train.paths), 3, 8, 8) and splits.train_x.dtype == torch.uint8
    assert torch.equal(splits.train_y, listing.train.labels) and torch.equal(splits.test_y, listing.test.labels)
    for stored, listed in ((splits.users, listing.train.users), (splits.test_users, listing.test.users)):
        assert (stored is None) == (listed is None)
        assert stored is None or torch.equal(stored, listed)
    train, test = (x[torch.arange(len(x))].double().mean((2, 3)) for x in (splits.train_x, splits.test_x))
    centres = torch.stack([train[splits.train_y == label].mean(0) for label in range(3)])
    assert torch.equal(torch.cdist(test, centres).argmin(1), splits.test_y)


def test_own_images_that_changed_after_preparation_ask_for_another(tmp_path: Path) -> None:
    own = trees.folder(tmp_path / "own", classes=2, users=None)
    dataset = DATASETS["folder"](path=str(own), pixels=8)
    prepare(dataset, tmp_path, 1, Silent())
    assert len(dataset.load(tmp_path).train_x) == 24
    (own / "train" / "kind 0" / "new.png").write_bytes(next(trees.files(own, ".png")).read_bytes())
    for read in (dataset.load, dataset.labels):
        with pytest.raises(DataDamaged, match="photographs were added, removed or replaced since it was prepared"):
            read(tmp_path)
    prepare(dataset, tmp_path, 1, Silent())
    assert len(dataset.load(tmp_path).train_x) == 25


# Bad input --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("form", ["json", "text"])
def test_half_a_dataset_is_named_with_the_numbers_found_and_expected(form: str, tmp_path: Path) -> None:
    kind = LISTED[form]
    folder = kind.write(tmp_path)
    said = complaint(kind.make(), tmp_path)
    assert f"{kind.lists[0]} has 107 photographs of 6 classes, and inat has 437,513 of 8,142 there" in said
    assert said.endswith("say that only the first classes are meant: inat(classes=6)")
    with official(kind, tmp_path):
        if form == "json":
            edit(folder / kind.lists[1], lambda document: [document[part].pop() for part in ("images", "annotations")])
        else:
            lines = (folder / kind.lists[1]).read_text().splitlines(keepends=True)
            (folder / kind.lists[1]).write_text("".join(lines[:-1]))
        said = complaint(kind.make(), tmp_path)
        assert f"{kind.lists[1]} has 23 photographs of 6 classes, and inat has 24 of 6 there" in said
        assert "classes are meant" not in said
        assert "has 23 photographs" in complaint(kind.make(classes=3), tmp_path)  # more classes: must be complete


def test_one_part_with_more_classes_asks_for_both_whole(tmp_path: Path) -> None:
    folder = trees.places_lt(tmp_path, photographs=False)
    with official(LISTED["places"], tmp_path):
        lines = (folder / PLACES[0]).read_text().splitlines(keepends=True)
        (folder / PLACES[0]).write_text("".join(line for line in lines if line.endswith((" 0\n", " 1\n"))))
        said = complaint(LISTED["places"].make(classes=3), tmp_path)
        assert "Places_LT_train.txt has 66 photographs of 2 classes, and places_lt has 107 of 6 there" in said


def test_lists_of_another_year_are_named_with_both_years(tmp_path: Path) -> None:
    folder = trees.inat(tmp_path, photographs=False)
    other = trees.inat(tmp_path, photographs=False, version=2019, forms=("json", "txt"))
    (folder / INAT_JSON[0]).write_bytes((other / "train2019.json").read_bytes())
    said = complaint(DATASETS["inat"](classes=CLASSES), tmp_path)
    assert (
        "train2018.json: photographs that are not of 2018, in train_val2018/: 107, the first is train_val2019/" in said
    )
    trees.inat(tmp_path, photographs=False)
    (folder / INAT_JSON[1]).unlink()
    (folder / INAT_TEXT[1]).write_bytes((other / "iNaturalist19_val.txt").read_bytes())
    said = complaint(DATASETS["inat"](classes=CLASSES), tmp_path)
    assert "iNaturalist18_val.txt: photographs that are not of 2018, in train_val2018/: 24," in said


JSON_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an image id twice": (
        lambda d: d["images"][5].update(id=d["images"][2]["id"]),
        "image ids that stand there twice: 1",
    ),
    "a path twice": (
        lambda d: d["images"][5].update(file_name=d["images"][2]["file_name"]),
        "paths that stand there twice: 1, the first is train_val2018/",
    ),
    "two labels": (
        lambda d: d["annotations"].append(dict(d["annotations"][0])),
        "images with several annotations: 1",
    ),
    "an annotation of nothing": (
        lambda d: d["annotations"].append({"id": 0, "image_id": 10**9, "category_id": 0}),
        "annotations of images that are not there: 1, the first is 1000000000",
    ),
    "no annotation": (lambda d: d["annotations"].pop(), "images without an annotation: 1"),
    "a label too large": (lambda d: d["annotations"][4].update(category_id=8142), "whose label is not in 0..8141: 1"),
    "a label below zero": (lambda d: d["annotations"][4].update(category_id=-1), "whose label is not in 0..8141: 1"),
    "a label beyond all numbers": (
        lambda d: d["annotations"][4].update(category_id=10**30),
        "labels that are no class",
    ),
    "a label that is no number": (lambda d: d["annotations"][4].update(category_id="3"), "labels that are no class: 1"),
    "a label of the wrong folder": (
        lambda d: d["annotations"][4].update(category_id=(d["annotations"][4]["category_id"] + 1) % 6),
        "photographs whose label is not that of their folder: 1, the first is train_val2018/",
    ),
    "a path upwards": (lambda d: d["images"][0].update(file_name="train_val2018/../../x.jpg"), "out of the folder: 1"),
    "an absolute path": (lambda d: d["images"][0].update(file_name="/etc/passwd"), "not of 2018"),
    "an odd path": (lambda d: d["images"][0].update(file_name="train_val2018/a\nb.jpg"), "out of the folder: 1"),
    "no path": (lambda d: d["images"][0].update(file_name=None), "file name or rights holder is no text: 1"),
    "a holder that is no text": (lambda d: d["images"][0].update(rights_holder=7), "rights holder is no text: 1"),
    "no holder": (lambda d: d["images"][0].pop("rights_holder"), "not in the official form (no 'rights_holder')"),
    "an id that is a list": (lambda d: d["images"][0].update(id=[1]), "not in the official form (unhashable"),
    "no images": (lambda d: d.update(images=[]), "images is no list with something in it"),
    "no annotations at all": (lambda d: d.pop("annotations"), "not in the official form (no 'annotations')"),
    "other things": (lambda d: d.update(images=[1, 2]), "not in the official form"),
    "a class too few": (
        lambda d: d.update(
            images=[image for image in d["images"] if "/3/" not in image["file_name"]],
            annotations=[each for each in d["annotations"] if each["category_id"] != 3],
        ),
        "classes without a photograph: 1, the first is 3",
    ),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
@pytest.mark.parametrize("name", INAT_JSON)
def test_a_fault_in_a_json_is_named(fault: str, name: str, tmp_path: Path) -> None:
    change, expected = JSON_FAULTS[fault]
    folder = trees.inat(tmp_path, photographs=False)
    edit(folder / name, change)
    said = complaint(DATASETS["inat"](classes=CLASSES), tmp_path)
    assert said.startswith(str(folder / name)) and expected in said
    assert said.endswith("; get the official files again (https://github.com/visipedia/inat_comp/tree/master/2018)")


@pytest.mark.parametrize(
    "content", [b"", b"[" * 10**5, b'{"images": [{"id', b"\xff\xfe", b"null", b"[1]", b'{"images": 3}']
)
def test_what_is_no_json_of_that_form_is_named(content: bytes, tmp_path: Path) -> None:
    folder = trees.inat(tmp_path, photographs=False)
    (folder / INAT_JSON[1]).write_bytes(content)
    said = complaint(DATASETS["inat"](classes=CLASSES), tmp_path)
    assert said.startswith(f"{folder / INAT_JSON[1]} is not ")


TEXT_FAULTS: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "no label": (
        lambda rows: rows.insert(3, "train/place_001/00000001.jpg"),
        "not a path and a label: 1, the first is line 4",
    ),
    "an empty line": (lambda rows: rows.insert(7, ""), "not a path and a label: 1, the first is line 8"),
    "a label in words": (lambda rows: rows.append("train/place_001/1.jpg one"), "not a path and a label: 1"),
    "a label below zero": (lambda rows: rows.append("train/place_001/1.jpg -1"), "not a path and a label: 1"),
    "a label too large": (lambda rows: rows.append("train/place_001/1.jpg 365"), "label is not in 0..364: 1"),
    "a path twice": (lambda rows: rows.extend(rows[:2]), "paths that stand there twice: 2"),
    "a path upwards": (lambda rows: rows.append("../place_001/1.jpg 1"), "paths that lead out of the folder: 1"),
    "an absolute path": (lambda rows: rows.append("/place_001/1.jpg 1"), "paths that lead out of the folder: 1"),
    "a backslash": (lambda rows: rows.append("train\\place_001\\1.jpg 1"), "paths that lead out of the folder: 1"),
    "a wrong label": (lambda rows: rows.append("train/place_001/1.jpg 2"), "label is not that of their folder: 1"),
    "a second folder": (lambda rows: rows.append("train/place/1.jpg 2"), "labels that several folders have: 1"),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_a_fault_in_a_list_is_named(fault: str, tmp_path: Path) -> None:
    change, expected = TEXT_FAULTS[fault]
    folder = trees.places_lt(tmp_path, photographs=False)
    rows = (folder / PLACES[0]).read_text().splitlines()
    change(rows)
    (folder / PLACES[0]).write_text("\r\n".join(rows))  # other ends of lines are no fault
    said = complaint(DATASETS["places_lt"](classes=CLASSES), tmp_path)
    assert said.startswith(f"{folder / PLACES[0]}: ") and expected in said


def test_a_list_with_other_ends_of_lines_is_the_same(tmp_path: Path) -> None:
    folder = trees.places_lt(tmp_path, photographs=False)
    with official(LISTED["places"], tmp_path) as dataset:
        expected = contents(dataset.listing(tmp_path))
        (folder / PLACES[0]).write_text((folder / PLACES[0]).read_text().replace("\n", "\r\n"))
        assert contents(dataset.listing(tmp_path)) == expected


def test_a_list_in_another_order_is_not_the_published_one(tmp_path: Path) -> None:
    folder = trees.places_lt(tmp_path, photographs=False)
    with official(LISTED["places"], tmp_path) as dataset:
        rows = (folder / PLACES[0]).read_text().splitlines(keepends=True)
        (folder / PLACES[0]).write_text("".join(reversed(rows)))
        assert "Places_LT_train.txt is not the published list" in complaint(dataset, tmp_path)


@pytest.mark.parametrize("key", ["json", "users"])
def test_other_people_than_there_are_is_named(key: str, tmp_path: Path) -> None:
    kind = LISTED[key]
    folder = kind.write(tmp_path)
    with official(kind, tmp_path) as dataset:
        path = folder / kind.lists[0]
        path.write_text(path.read_text().replace("User 3", "User 4").replace("User 5", "User 4"))
        assert f"{path} names 6 people, and there are 8; get the official" in complaint(dataset, tmp_path)


def test_a_photograph_for_training_and_test_at_once_is_named(tmp_path: Path) -> None:
    folder = trees.places_lt(tmp_path, photographs=False)
    row = (folder / PLACES[0]).read_text().splitlines()[0]
    with (folder / PLACES[1]).open("a") as file:
        file.write(f"{row}\n")
    said = complaint(DATASETS["places_lt"](classes=CLASSES), tmp_path)
    assert f"photographs for training and test at once: 1, the first is {row.rpartition(' ')[0]};" in said


@pytest.mark.parametrize(("pack", "ending"), [(lzma.compress, ".xz"), (gzip.compress, ".gz")])
def test_a_broken_packed_list_is_named(pack: Callable[[bytes], bytes], ending: str, tmp_path: Path) -> None:
    folder = trees.places_lt(tmp_path, photographs=False)
    packed = pack((folder / PLACES[0]).read_bytes())
    (folder / PLACES[0]).unlink()
    for damaged in (packed[:-6], b"neither", packed[:60] + b"\xff" * 30 + packed[90:]):
        (folder / (PLACES[0] + ending)).write_bytes(damaged)
        said = complaint(DATASETS["places_lt"](classes=CLASSES), tmp_path)
        assert said.startswith(f"{folder / PLACES[0]}{ending} cannot be read (")


CSV_FAULTS: dict[str, tuple[Callable[[list[list[str]]], object], str]] = {
    "other columns": (lambda rows: rows[0].__setitem__(0, "author"), "author, image_id, class, label, and user_id"),
    "an image of nowhere": (
        lambda rows: rows[4].__setitem__(1, "0" * 32),
        "in train2017.json or val2017.json: 1, the first is 000000",
    ),
    "a class in words": (
        lambda rows: rows[4].__setitem__(2, "bird"),
        "classes that are no numbers: 1, the first is bird",
    ),
    "a class too large": (lambda rows: rows[4].__setitem__(slice(2, 4), ["1203", "new"]), "label is not in 0..1202: 1"),
    "a class of another species": (
        lambda rows: rows[4].__setitem__(2, str((int(rows[4][2]) + 1) % 6)),
        "labels of the CSVs with several classes: 1",
    ),
    "an image twice": (lambda rows: rows.append(rows[4]), "paths that stand there twice: 1"),
    "a row too long": (
        lambda rows: rows.__setitem__(4, [*rows[4], "more"]),
        "rows without 4 columns: 1, the first is User",
    ),
    "rows too short": (
        lambda rows: (rows.__setitem__(4, rows[4][:2]), rows.__setitem__(6, [])),
        "rows without 4 columns: 1, the first is User",
    ),
    "nothing": (lambda rows: rows.clear(), "is no CSV with a header (not enough values"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_a_fault_in_the_user_split_is_named(fault: str, tmp_path: Path) -> None:
    change, expected = CSV_FAULTS[fault]
    folder = trees.inat_users(tmp_path, photographs=False)
    with (folder / USERS[0]).open(newline="") as source:
        rows = list(csv.reader(source))
    change(rows)
    with (folder / USERS[0]).open("w", newline="") as sink:
        csv.writer(sink).writerows(rows)
    said = complaint(DATASETS["inat_users"](classes=CLASSES), tmp_path)
    assert said.startswith(str((folder / USERS[0]).parent)) and expected in said


def test_a_user_split_with_a_quote_left_open_or_odd_bytes_is_named(tmp_path: Path) -> None:
    folder = trees.inat_users(tmp_path, photographs=False)
    whole = (folder / USERS[0]).read_bytes()
    for content in (whole + b'"Ann,', whole[:90] + b"\xff" + whole[91:], b"", b"\n"):
        (folder / USERS[0]).write_bytes(content)
        said = complaint(DATASETS["inat_users"](classes=CLASSES), tmp_path)
        assert said.startswith(f"{folder / USERS[0]} is no CSV with a header (")


def test_an_image_id_that_two_photographs_have_is_named(tmp_path: Path) -> None:
    folder = trees.inat_users(tmp_path, photographs=False)
    edit(
        folder / "train2017.json",
        lambda document: document["images"][-1].update(
            file_name=f"other/{Path(document['images'][0]['file_name']).name}"
        ),
    )
    said = complaint(DATASETS["inat_users"](classes=CLASSES), tmp_path)
    assert "image ids of the CSVs that several photographs have: 1" in said


def test_photographs_of_the_competitions_test_part_are_found_too(tmp_path: Path) -> None:
    folder = trees.inat_users(tmp_path, photographs=False)
    document = json.loads((folder / "val2017.json").read_text())
    moved = document["images"].pop(0)
    (folder / "val2017.json").write_text(json.dumps(document))
    dataset = DATASETS["inat_users"](classes=CLASSES)
    assert "test.csv: image ids that are not in" in complaint(dataset, tmp_path)
    (folder / "test2017.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": f"test2017/{Path(moved['file_name']).name}"}]})
    )
    assert sum(path.startswith("test2017/") for path in dataset.listing(tmp_path).test.paths) == 1


def test_cinic_is_trained_on_train_and_tested_on_test(tmp_path: Path) -> None:
    trees.cinic10(tmp_path)
    listing = DATASETS["cinic10"](classes=4).listing(tmp_path)
    for part, name in ((listing.train, "train"), (listing.test, "test")):
        shown = [f"{name}/{trees.CINIC_CLASSES[label]}" for label in part.labels.tolist()]
        assert [path.rpartition("/")[0] for path in part.paths] == shown


def test_tiny_imagenet_numbers_its_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = trees.tiny_imagenet(tmp_path)
    wnids = (folder / "wnids.txt").read_text().split()
    assert wnids != sorted(wnids)
    listing = DATASETS["tiny_imagenet"](classes=4).listing(tmp_path)
    shown = [sorted(wnids).index(path.split("/")[1]) for path in listing.train.paths]
    assert shown == listing.train.labels.tolist() == sorted(shown)
    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    assert listing.test.labels.tolist() == [sorted(wnids).index(row[1]) for row in rows]


def test_a_class_of_pictures_with_one_missing_is_named(tmp_path: Path) -> None:
    for kind in FOLDERS.values():
        folder = kind.write(tmp_path)
        with official(kind, tmp_path) as dataset:
            dataset.listing(tmp_path)
            next(trees.files(folder / "train", ".png", ".JPEG")).unlink()
            said = complaint(dataset, tmp_path)
            assert f"{folder / 'train'} has 29 photographs of 6 classes, and {kind.name} has 30 of 6 there" in said


def test_a_class_of_another_size_is_named(tmp_path: Path) -> None:
    folder = FOLDERS["cinic"].write(tmp_path)
    with official(FOLDERS["cinic"], tmp_path) as dataset:
        picture = next(trees.files(folder / "train" / "bird", ".png"))
        picture.rename(folder / "train" / "cat" / "another.png")
        said = complaint(dataset, tmp_path)
        assert f"{folder / 'train'} has 4 to 6 photographs of a class, and cinic10 has 5 to 5 there" in said


def test_faults_in_the_lists_of_tiny_imagenet_are_named(tmp_path: Path) -> None:
    dataset = DATASETS["tiny_imagenet"](classes=CLASSES)
    for name, line, expected in (
        ("wnids.txt", "../val", "lines that are no class, or one twice: 1, the first is ../val"),
        ("wnids.txt", "n01440764", "lines that are no class, or one twice: 1, the first is n01440764"),
        ("wnids.txt", "n99999999", "has 30 photographs of 6 classes"),
        (
            "val/val_annotations.txt",
            "val_99.JPEG\tn99999999",
            "lines that are not a picture and a class: 1, the first is line 13",
        ),
        (
            "val/val_annotations.txt",
            "val_0.JPEG\tn01440764",
            "paths that stand there twice: 1, the first is val/images/val_0.JPEG",
        ),
        ("val/val_annotations.txt", "val_99.JPEG", "lines that are not a picture and a class: 1"),
    ):
        folder = FOLDERS["tiny"].write(tmp_path)
        with (folder / name).open("a") as file:
            file.write(f"{line}\n")
        if "n9999999" in line and name == "wnids.txt":
            continue  # a class more without pictures is left out by `classes`
        assert expected in complaint(dataset, tmp_path), line


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats").mkdir()
    scan = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("cats"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataDamaged, match=r"cats cannot be read \(Permission denied\);"):
        images_below(tmp_path)


# Any damage -------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a tree of every kind."""
    roots = {}
    for key, kind in KINDS.items():
        roots[key] = tmp_path_factory.mktemp(key)
        kind.write(roots[key])
    return roots


@pytest.mark.parametrize("key", [*LISTED, "tiny"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_lists_give_an_error_that_names_a_file_or_what_they_gave_before(
    key: str, data: st.DataObject, small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where nothing but numbers is known of a list, a path in it may still become one that is no photograph's."""
    kind = KINDS[key]
    root = tmp_path_factory.mktemp("damaged")
    with official(kind, small[key]) as dataset:
        complete = dataset.listing(small[key])
        shutil.copytree(small[key], root, dirs_exist_ok=True)
        folder = root / dataset.home
        harm = data.draw(damages(kind.lists))
        for name, how in harm.items():
            damage(folder / name, *how)
        try:
            listing = dataset.listing(root)
        except (DataMissing, DataDamaged) as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            assert (
                any(Path(name).name in str(error) for name in kind.lists)
                or str(folder / "train") in str(error)
                or key == "users"
            )
            return
        finally:
            shutil.rmtree(root)
    before = {*complete.train.paths, *complete.test.paths}
    for part, whole in ((listing.train, complete.train), (listing.test, complete.test)):
        assert part.labels.tolist() == whole.labels.tolist()
        pairs = list(zip(part.paths, whole.paths, strict=True))
        assert all(path == original or path not in before for path, original in pairs)
        if key not in ("users", "tiny"):
            assert list(part.paths) == list(whole.paths)
        assert (part.users is None) == (whole.users is None)
        if part.users is not None and whole.users is not None:
            assert len(part.users.unique()) == len(whole.users.unique())


@pytest.mark.parametrize("ending", [".xz", ".gz"])
@given(place=st.integers(0, 2**16 - 1), value=st.integers(0, 255), what=st.sampled_from(["truncated", "altered"]))
@settings(max_examples=40, deadline=None)
def test_a_damaged_packed_list_gives_an_error_or_what_it_gave_before(
    ending: str, place: int, value: int, what: str, small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The sums within the packed file show it, whatever is known of the list."""
    root = tmp_path_factory.mktemp("packed")
    dataset = DATASETS["inat"](classes=CLASSES)
    shutil.copytree(small["json"], root, dirs_exist_ok=True)
    path = root / "inat2018" / INAT_JSON[0]
    packed = path.with_name(path.name + ending)
    packed.write_bytes((lzma.compress if ending == ".xz" else gzip.compress)(path.read_bytes()))
    path.unlink()
    damage(packed, what, place, value)
    try:
        assert contents(dataset.listing(root)) == contents(dataset.listing(small["json"]))
    except DataDamaged as error:
        assert str(packed) in str(error)
    finally:
        shutil.rmtree(root)


# One's own images -------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Write a person's own images."""
    return trees.folder(tmp_path / "own")


def test_own_images_are_read_by_class_folder_with_their_clients(own: Path) -> None:
    dataset = DATASETS["folder"](path=str(own))
    listing = dataset.listing(Path("/nowhere"))
    assert dataset.num_classes == 4 and dataset.tail == "either" and not dataset.own_clients
    assert listing.train.labels.bincount().tolist() == [20, 12, 7, 4]
    assert listing.test.labels.bincount().tolist() == [3] * 4
    for part in (listing.train, listing.test):
        assert list(part.paths) == sorted(part.paths)
        assert [int(path.split("/")[1].split()[1]) for path in part.paths] == part.labels.tolist()
        assert part.users is not None and part.sizes is not None
        assert part.sizes.tolist() == [(own / path).stat().st_size for path in part.paths]
    with (own / "clients.csv").open(newline="") as source:
        client = {row["path"]: row["client"] for row in csv.DictReader(source)}
    named = {f"User {user} é" for user in range(5)}
    assert {client[path] for path in listing.train.paths} == named
    both = (
        *zip(listing.train.paths, listing.train.users, strict=True),
        *zip(listing.test.paths, listing.test.users, strict=True),
    )
    assert all(client[path] == f"User {user} é" for path, user in both)
    assert any("/day 2/" in path for path in listing.train.paths)
    assert {Path(path).suffix for path in listing.train.paths} == {".JPG", ".png"}


def test_own_images_need_no_clients_and_test_images_may_have_none(own: Path) -> None:
    dataset = DATASETS["folder"](path=str(own))
    rows = (own / "clients.csv").read_text().splitlines(keepends=True)
    (own / "clients.csv").write_text("".join(row for row in rows if not row.startswith("test/")))
    listing = dataset.listing(own)
    assert listing.train.users is not None and listing.test.users is None
    (own / "clients.csv").unlink()
    assert dataset.listing(own).train.users is None


def test_own_images_stand_for_themselves_wherever_they_lie(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DATASETS["folder"](path=str(own))
    monkeypatch.chdir(own.parent)
    assert DATASETS["folder"](path="own") == first and DATASETS["folder"]().path == str(own.parent / "folder")
    identity = first.identity()
    assert set(identity) == {"pixels", "listing"}
    moved = own.rename(own.with_name("moved"))
    second = DATASETS["folder"](path=str(moved))
    assert second.identity() == identity and second.folder_name != first.folder_name
    next(trees.files(moved / "test", ".JPG")).unlink()
    (moved / "clients.csv").unlink()
    assert second.identity() != identity


def test_a_replaced_image_is_another_identity(own: Path) -> None:
    dataset = DATASETS["folder"](path=str(own))
    before = dataset.identity()
    with next(trees.files(own / "train", ".png")).open("ab") as file:
        file.write(b"more")
    assert dataset.identity() != before


def test_own_images_that_are_not_there_are_missing(tmp_path: Path) -> None:
    dataset = DATASETS["folder"](path=str(tmp_path / "nothing"))
    for ask in (
        lambda: dataset.num_classes,
        lambda: dataset.listing(tmp_path),
        dataset.identity,
        lambda: dataset.fetch(tmp_path),
    ):
        with pytest.raises(DataMissing, match=r"there is no .*nothing/train; put your images in .*/train/<class>/"):
            ask()


def test_a_class_that_lacks_images_is_named_with_the_part(own: Path) -> None:
    dataset = DATASETS["folder"](path=str(own))
    (own / "clients.csv").unlink()
    (own / "test" / "kind 2").rename(own / "set aside")
    assert f"{own / 'test'} has no class 'kind 2'" in complaint(dataset, own)
    (own / "train" / "kind 2").rename(own / "set aside too")
    (own / "set aside").rename(own / "test" / "kind 2")
    assert f"{own / 'train'} has no class 'kind 2'" in complaint(dataset, own)
    (own / "train" / "kind 2").mkdir()
    (own / "train" / "kind 2" / "notes.txt").touch()
    (own / "train" / "kind 2" / ".hidden.png").touch()
    assert f"{own / 'train'}: classes without an image: 1, the first is kind 2" in complaint(dataset, own)
    for name in ("kind 1", "kind 2", "kind 3"):
        shutil.rmtree(own / "train" / name)
    assert f"{own / 'train'} has 1 folders" in complaint(dataset, own)


def test_a_link_to_nothing_is_named(own: Path) -> None:
    (own / "clients.csv").unlink()
    (own / "train" / "kind 0" / "lost.png").symlink_to("nowhere.png")
    assert "lost.png cannot be read (No such file" in complaint(DATASETS["folder"](path=str(own)), own)


def test_a_name_that_cannot_be_written_down_is_named(own: Path) -> None:
    (own / "clients.csv").unlink()
    shutil.copy(next(trees.files(own / "train", ".png")), own / "train" / "kind 0" / "two\nlines.png")
    said = complaint(DATASETS["folder"](path=str(own)), own)
    assert r"images with odd characters in their names: 1, the first is 'train/kind 0/two\nlines.png'" in said


CLIENT_FAULTS: dict[str, tuple[Callable[[list[list[str]]], object], str]] = {
    "other columns": (
        lambda rows: rows[0].__setitem__(1, "user"),
        "has the columns path, user, and path, client are wanted",
    ),
    "no such image": (
        lambda rows: rows[3].__setitem__(0, "train/kind 0/gone.png"),
        "no image: 1, the first is train/kind 0/gone.png",
    ),
    "an image without a client": (
        lambda rows: rows[3].__setitem__(1, ""),
        "images without a client: 1, the first is train/",
    ),
    "an image without a row": (lambda rows: rows.pop(3), "images without a client: 1, the first is train/"),
    "a test image without a row": (lambda rows: rows.pop(), "images without a client: 1, the first is test/"),
    "a client without an image": (
        lambda rows: rows.append(["", "Ann"]),
        "clients without an image: 1, the first is Ann",
    ),
    "an image twice": (lambda rows: rows.append(rows[3]), "paths that stand there twice: 1"),
    "a path from elsewhere": (lambda rows: rows[3].__setitem__(0, "/" + rows[3][0]), "where there is no image: 1"),
}


@pytest.mark.parametrize("fault", CLIENT_FAULTS)
def test_a_fault_in_the_clients_is_named(fault: str, own: Path) -> None:
    change, expected = CLIENT_FAULTS[fault]
    with (own / "clients.csv").open(newline="") as source:
        rows = list(csv.reader(source))
    change(rows)
    trees.write_table(own / "clients.csv", rows[0], rows[1:])
    said = complaint(DATASETS["folder"](path=str(own)), own)
    assert said.startswith(str(own / "clients.csv")) and expected in said


@given(harm=damages(("clients.csv",)))
@settings(max_examples=60, deadline=None)
def test_damaged_clients_give_an_error_or_the_same_clients(
    harm: dict[str, tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A changed name is another client: nothing else says who it was. Without the file there are no clients."""
    own = trees.folder(tmp_path_factory.mktemp("own") / "own", classes=2, largest=5, smallest=3, tested=2)
    dataset = DATASETS["folder"](path=str(own))
    before = dataset.listing(own)
    damage(own / "clients.csv", *harm["clients.csv"])
    try:
        after = dataset.listing(own)
    except DataDamaged as error:
        assert str(own / "clients.csv") in str(error)
        return
    assert contents(after)[0][:2] == contents(before)[0][:2] and contents(after)[1][:2] == contents(before)[1][:2]
    assert before.train.users is not None
    if after.train.users is not None:
        assert len(after.train.users) == len(before.train.users)
        moved = sum(int((after.train.users == user).sum() < (before.train.users == user).sum()) for user in range(5))
        assert moved <= 5
    shutil.rmtree(own)


# The real lists ---------------------------------------------------------------------------------------------


def real(*names: str) -> Path:
    """Give $BENCH_DATA, or skip and name the list that it has not."""
    root = Path(os.environ.get("BENCH_DATA", "$BENCH_DATA"))
    for name in names:
        if not any((root / (name + ending)).is_file() for ending in ("", ".xz", ".gz")):
            pytest.skip(f"{root / name} is not there, packed or not")
    return root


@pytest.mark.real
def test_the_lists_of_inat_2019_are_read_whole() -> None:
    root = real("inat2019/iNaturalist19_train.txt", "inat2019/val2019.json")
    listing = DATASETS["inat"](version=2019).listing(root)
    counts = listing.train.labels.bincount()
    assert (len(listing.train.paths), len(counts), int(counts.min()), int(counts.max())) == (265_213, 1_010, 16, 500)
    assert counts.tolist()[:6] == [65, 240, 181, 113, 334, 500]
    assert listing.test.labels.bincount().tolist() == [3] * 1010
    assert listing.train.users is None and len(listing.test.users.unique()) == 2_109
    few = DATASETS["inat"](version=2019, classes=20).listing(root)
    assert few.train.labels.bincount().tolist() == counts[:20].tolist()


@pytest.mark.real
def test_the_validation_list_of_inat_2018_is_the_published_one_and_a_part_of_the_training_list_is_not() -> None:
    root = real("inat2018/iNaturalist18_val.txt")
    dataset = DATASETS["inat"]()
    part = dataset.read(dataset.find(root / "inat2018", ("iNaturalist18_val.txt",))[0])
    assert part.digest() == dataset.known[1].digests["val2018.json"]
    assert np.bincount(part.labels).tolist() == [3] * 8142
    real("inat2018/iNaturalist18_train.txt")
    said = complaint(dataset, root)
    assert "has 6,583 photographs of 2,974 classes, and inat has 437,513 of 8,142 there" in said


@pytest.mark.real
def test_the_lists_of_places_lt_are_read_whole() -> None:
    root = real("places365_standard/Places_LT_train.txt", "places365_standard/Places_LT_test.txt")
    listing = DATASETS["places_lt"]().listing(root)
    counts = listing.train.labels.bincount()
    assert (len(listing.train.paths), len(counts), int(counts.min()), int(counts.max())) == (62_500, 365, 5, 4980)
    assert listing.test.labels.bincount().tolist() == [100] * 365


@pytest.mark.real
def test_the_test_list_of_imagenet_lt_is_the_published_one() -> None:
    root = real("imagenet/ImageNet_LT_test.txt")
    dataset = DATASETS["imagenet_lt"]()
    part = dataset.read(dataset.find(root / "imagenet", ("ImageNet_LT_test.txt",))[0])
    assert part.digest() == dataset.known[1].digests["ImageNet_LT_test.txt"]
    assert np.bincount(part.labels).tolist() == [50] * 1000


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "fields", "home", "file"),
    [
        ("inat", {"version": 2019}, "inat2019", "iNaturalist19_train.txt"),
        ("inat", {"version": 2019}, "inat2019", "val2019.json"),
        ("places_lt", {}, "places365_standard", "Places_LT_train.txt"),
    ],
)
def test_a_real_list_with_one_changed_byte_is_refused(
    name: str, fields: dict[str, Any], home: str, file: str, tmp_path: Path
) -> None:
    root = real(f"{home}/{file}")
    shutil.copytree(root / home, tmp_path / home, ignore=shutil.ignore_patterns("train", "val", "train_val*"))
    packed = next(path for path in (tmp_path / home).iterdir() if path.name.startswith(file))
    content = bytearray(lzma.decompress(packed.read_bytes()) if packed.suffix == ".xz" else packed.read_bytes())
    where = content.index(b".jpg", len(content) // 3) - 2
    content[where] = ord("0") if content[where] != ord("0") else ord("1")
    packed.unlink()
    (tmp_path / home / file).write_bytes(content)
    assert f"{file} is not the published list" in complaint(DATASETS[name](**fields), tmp_path)
