"""One's own images: class folders, with or without a list of clients."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings

from bench.dataset import DataDamaged, DataMissing
from bench.plugins.registry import DATASETS
from tests import trees
from tests.kinds import complaint, contents, damage, damages


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
