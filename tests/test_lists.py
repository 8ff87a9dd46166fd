"""Everything that can be wrong with the lists of photographs, by hand and by chance."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.dataset import DataDamaged, DataMissing
from bench.files.walk import images_below
from bench.plugins.registry import DATASETS
from tests import trees
from tests.kinds import (
    CLASSES,
    FOLDERS,
    INAT_JSON,
    INAT_TEXT,
    KINDS,
    LISTED,
    PLACES,
    USERS,
    complaint,
    contents,
    damage,
    damages,
    edit,
    official,
)

# Bad input --------------------------------------------------------------------------------------------------


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
