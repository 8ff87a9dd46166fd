"""Folders of photographs with links, loops, pipes and devices: each photograph once, and nothing is waited for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import DataDamaged
from bench.command.main import main
from bench.files.decode import BadPhotograph, decode
from bench.files.listing import Listing
from bench.files.walk import Seen, images_below
from bench.plugins.registry import DATASETS
from bench.preparing.preparation import prepare
from tests import trees
from tests.shots import Heard
from tests.trees import odd


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Write photographs in two classes, without parts."""
    for kind in ("cats", "dogs"):
        (tmp_path / "own" / kind / "garden").mkdir(parents=True)
        for number in range(4):
            (tmp_path / "own" / kind / "garden" / f"{number}.jpg").write_bytes(f"{kind} {number}".encode())
    return tmp_path / "own"


def listed(path: Path) -> Listing:
    listing: Listing = DATASETS["folder"](path=str(path)).listing(Path("/nowhere"))
    return listing


def complaint(path: Path) -> str:
    with pytest.raises(DataDamaged) as caught:
        listed(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(path: Path) -> list[str]:
    listing = listed(path)
    return sorted([*listing.train.paths, *listing.test.paths])


# Links ------------------------------------------------------------------------------------------------------

LOOPS: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    "to itself": lambda own: (own / "cats" / "loop", own / "cats" / "loop"),
    "to its folder": lambda own: (own / "cats" / "loop", "."),
    "to the class": lambda own: (own / "cats" / "garden" / "loop", own / "cats"),
    "to the root": lambda own: (own / "cats" / "loop", own),
    "above the root": lambda own: (own / "cats" / "garden" / "loop", own.parent),
    "to everything": lambda own: (own / "cats" / "loop", "/"),
    "a class to the root": lambda own: (own / "loop", own),
    "up by way of another": lambda own: (own / "cats" / "garden" / "loop", own / "dogs" / "back"),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_ends_in_a_sentence(loop: str, own: Path) -> None:
    """The report's: 48 photographs became 1,008."""
    before = images(own)
    if loop == "up by way of another":
        (own / "dogs" / "back").symlink_to(own / "cats")
    link, target = LOOPS[loop](own)
    link.symlink_to(target)
    if loop == "to itself":
        assert images(own) == before  # it leads nowhere
        return
    said = complaint(own)
    if loop == "up by way of another":
        assert said == f"{own}/dogs/back and {own}/cats are the same folder; take the link away and try again" or (
            said.startswith(f"{link} leads up to {own}/cats, in which it lies; take it away")
        )
    else:
        assert said.startswith(f"{link} leads up to {link.resolve()}, in which it lies; take it away and try again")


def test_links_to_another_disk_are_followed(own: Path, tmp_path: Path) -> None:
    before = images(own)
    (tmp_path / "disk").mkdir()
    (own / "cats").rename(tmp_path / "disk" / "cats")
    (own / "cats").symlink_to(tmp_path / "disk" / "cats")  # a class
    (own / "dogs" / "garden").rename(tmp_path / "disk" / "garden")
    (own / "dogs" / "garden").symlink_to("../../disk/garden")  # a folder
    (tmp_path / "disk" / "garden" / "0.jpg").rename(tmp_path / "disk" / "0")
    (own / "dogs" / "garden" / "0.jpg").symlink_to(tmp_path / "disk" / "0")  # a photograph
    assert images(own) == before
    (tmp_path / "whole").symlink_to(own)
    assert images(tmp_path / "whole") == before
    (tmp_path / "o").mkdir()  # whose name begins that of the folder, and which is none above it
    (tmp_path / "o" / "new.jpg").touch()
    (own / "dogs" / "more").symlink_to(tmp_path / "o")
    assert len(images(own)) == 9


@pytest.mark.parametrize("kind", ["folder", "file", "class", "both links"])
def test_nothing_is_there_twice_by_links(kind: str, own: Path, tmp_path: Path) -> None:
    if kind == "folder":
        (own / "dogs" / "more").symlink_to(own / "cats" / "garden")
        said = f"{own}/dogs/more and {own}/cats/garden are the same folder"
    elif kind == "file":
        (own / "cats" / "a dog.jpg").symlink_to(own / "dogs" / "garden" / "2.jpg")
        said = f"{own}/cats/a dog.jpg and {own}/dogs/garden/2.jpg are the same photograph"
    elif kind == "class":
        (own / "felines").symlink_to("cats")
        said = f"{own}/felines and {own}/cats are the same folder"
    else:
        (tmp_path / "picture").touch()
        for name in ("a.jpg", "b.jpg"):
            (own / "cats" / name).symlink_to(tmp_path / "picture")
        said = f"{own}/cats/b.jpg and {own}/cats/a.jpg are the same photograph"
    assert complaint(own) == f"{said}; take the link away and try again"


def test_two_names_without_links_are_two_images(own: Path, tmp_path: Path) -> None:
    """Tools that save space make one file of equal ones."""
    os.link(own / "cats" / "garden" / "0.jpg", own / "cats" / "same.jpg")
    (tmp_path / "picture").touch()
    (own / "cats" / "linked.jpg").symlink_to(tmp_path / "picture")
    assert len(images(own)) == 10


def test_one_photograph_is_not_for_training_and_test_by_a_link(tmp_path: Path) -> None:
    path = trees.folder(tmp_path / "own", users=None)
    shutil.rmtree(path / "test")
    (path / "test").symlink_to(path / "train")
    assert f"{path}/test/kind 0 and {path}/train/kind 0 are the same folder" in complaint(path)
    (path / "test").unlink()
    shutil.copytree(path / "train", path / "test")
    picture = next(trees.files(path / "train", ".png"))
    (path / "test" / "kind 0" / "again.png").symlink_to(picture)
    assert f"{path}/test/kind 0/again.png and {picture} are the same photograph; take the link away" in complaint(path)


def test_what_leads_nowhere_is_named(own: Path) -> None:
    (own / "cats" / "gone.jpg").symlink_to("nowhere")
    assert (
        complaint(own) == f"{own}/cats/gone.jpg cannot be read (No such file or directory); take it away and try again"
    )
    (own / "cats" / "gone.jpg").unlink()
    (own / "cats" / "round.jpg").symlink_to("round.jpg")
    assert "round.jpg cannot be read (Too many levels of symbolic links)" in complaint(own)


def test_a_deep_folder_is_no_loop(own: Path) -> None:
    deep = own / "cats"
    for _ in range(300):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "deep.png").touch()
    assert sum("deep.png" in image for image in images(own)) == 1
    assert images_below(own, seen=Seen()) == images_below(own)


# No photographs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a device"])
def test_what_is_no_file_is_neither_waited_for_nor_read(
    kind: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd(own / "cats" / "notes", kind)
    assert len(images(own)) == 8  # not named as an image
    path = odd(own / "cats" / "9.JPG", kind)
    said = f"{path} is a pipe or a device, and no photograph; take it away and try again"
    assert complaint(own) == said
    with pytest.raises(SystemExit) as ended:
        main(["data", "prepare", f"folder(path='{own}')", "--size", "8", "--data-root", str(own.parent)])
    assert ended.value.code == 3 and capsys.readouterr().err == f"bench: {said}\n"
    with pytest.raises(BadPhotograph, match=r"it is a pipe or a device, and no file|No such device"):
        decode(path, 8)


def test_a_pipe_in_a_published_dataset_is_a_broken_photograph(tmp_path: Path) -> None:
    tree = trees.places_lt(tmp_path, classes=3)
    picture = next(trees.files(tree / "train", ".jpg"))
    picture.unlink()
    os.mkfifo(picture)
    done = prepare(DATASETS["places_lt"](classes=3, pixels=8), tmp_path, 1, Heard())
    assert [(path, why) for path, why in done.broken] == [(picture, "it is a pipe or a device, and no file")]


def test_a_pipe_in_place_of_a_list_is_named(own: Path, tmp_path: Path) -> None:
    os.mkfifo(own / "clients.csv")
    assert "clients.csv cannot be read (it is a pipe or a device, and no file)" in complaint(own)
    tree = trees.places_lt(tmp_path, classes=3)
    (tree / "Places_LT_train.txt").unlink()
    os.mkfifo(tree / "Places_LT_train.txt")
    with pytest.raises(DataDamaged, match=r"Places_LT_train\.txt cannot be read \(it is a pipe or a device"):
        DATASETS["places_lt"](classes=3).listing(tmp_path)
