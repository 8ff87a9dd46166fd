"""Datasets of photographs: what their lists say, and how they become runs."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.dataset import DataDamaged, DataMissing
from bench.plugins.registry import DATASETS, label
from bench.preparing.preparation import Progress, prepare
from bench.protocol.bundles import SETTINGS
from tests import trees
from tests.kinds import CLASSES, INAT_JSON, INAT_TEXT, KINDS, USERS, Kind, complaint, contents, edit, official


class Silent(Progress):
    """Tells nobody."""

    def say(self, sentence: str) -> None:
        pass

    def begin(self, what: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, photographs: int) -> None:
        pass


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
    for fields in ({"classes": 1}, {"classes": 8142}, {"version": 2019, "classes": 1010}):
        with pytest.raises(ValueError, match=r"^classes = \d+: must be in 2\.\.\d+, or 0 for all$"):
            DATASETS["inat"](**fields)
    with pytest.raises(ValueError, match=r"version must be 2018 or 2019$"):
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
