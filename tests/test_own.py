"""One's own photographs as most people have them: classes alone, no preparation, and folders that were re-sorted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import DataDamaged, DataMissing, Dataset
from bench.command.data import data_command
from bench.command.main import main
from bench.files.listing import Listing
from bench.plugins.registry import DATASETS
from bench.preparing import at_once
from bench.preparing.preparation import prepare
from tests import trees
from tests.kinds import complaint
from tests.shots import Heard


def bare(path: Path, *, classes: int = 3, largest: int = 20, smallest: int = 4) -> Path:
    """Write photographs in folders of classes, without parts."""
    trees.folder(path, classes=classes, largest=largest, smallest=smallest, users=None)
    shutil.rmtree(path / "test")
    for folder in sorted((path / "train").iterdir()):
        folder.rename(path / folder.name)
    (path / "train").rmdir()
    return path


def folder(path: Path, share: float = 0.2) -> Dataset:
    dataset: Dataset = DATASETS["folder"](path=str(path), pixels=8, test_share=share)
    return dataset


def listed(path: Path, share: float = 0.2) -> Listing:
    listing: Listing = DATASETS["folder"](path=str(path), test_share=share).listing(Path("/nowhere"))
    return listing


# Classes alone ----------------------------------------------------------------------------------------------


def test_a_share_of_each_class_is_set_aside_by_name(tmp_path: Path) -> None:
    path = tmp_path / "own"
    for name in ("cats", "dogs"):
        (path / name / "garden").mkdir(parents=True)
        for number in range(1000):
            (path / name / ("garden" if number % 2 else "") / f"{number}.png").touch()
    for share in (0.2, 0.5):
        listing = listed(path, share)
        for part in (listing.train, listing.test):
            assert list(part.paths) == sorted(part.paths) and part.sizes is not None
            assert part.labels.tolist() == [int(one.startswith("dogs/")) for one in part.paths]
        assert not set(listing.train.paths) & set(listing.test.paths)
        assert sorted([*listing.train.paths, *listing.test.paths]) == sorted(
            str(file.relative_to(path)) for file in path.rglob("*.png")
        )
        for tested in listing.test.labels.bincount().tolist():
            assert abs(tested - 1000 * share) < 4 * (1000 * share * (1 - share)) ** 0.5
    numbers = [
        {one.split("/", 1)[1] for one in listing.test.paths if one.startswith(name)} for name in ("cats", "dogs")
    ]
    assert len(numbers[0] & numbers[1]) < 0.6 * len(numbers[0])  # the class is part of the name
    assert set(listed(path).test.paths) < set(listed(path, 0.5).test.paths)


def test_to_add_and_remove_photographs_moves_no_other(tmp_path: Path) -> None:
    path = bare(tmp_path / "own", largest=60, smallest=40)
    before = set(listed(path).test.paths)
    stays = {*before, *listed(path).train.paths}
    for number in range(40):
        (path / "kind 1" / f"new {number}.png").touch()
    assert set(listed(path).test.paths) & stays == before
    for file in [*trees.files(path / "kind 0", ".JPG")][:10]:
        file.unlink()
    left = {one for one in stays if (path / one).exists()}
    assert len(left) < len(stays) and set(listed(path).test.paths) & left == before & left
    assert set(listed(path.rename(tmp_path / "moved")).test.paths) & left == before & left


def test_every_class_has_an_image_in_both_parts_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own"
    for label in range(40):
        (path / f"class {label:02}").mkdir(parents=True)
        for number in range(2 + label % 3):
            (path / f"class {label:02}" / f"{number}.png").touch()
    for share in (0.01, 0.5, 0.99):
        listing = listed(path, share)
        for part in (listing.train, listing.test):
            assert len(part.labels.bincount()) == 40 and int(part.labels.bincount().min()) >= 1
    (path / "class 00" / "0.png").unlink()
    said = complaint(DATASETS["folder"](path=str(path)), path)
    assert "classes without 2 images: 1, the first is class 00; each needs one for training and one for testing" in said


def test_classes_alone_may_have_clients(tmp_path: Path) -> None:
    path = bare(tmp_path / "own")
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    trees.write_table(path / "clients.csv", ["path", "client"], [[name, f"client {len(name)}"] for name in names])
    listing = listed(path)
    assert listing.train.users is not None and listing.test.users is not None
    users = [*zip(listing.train.paths, listing.train.users, strict=True)]
    assert len({(len(name), int(user)) for name, user in users}) == len({len(name) for name, _ in users})


def test_a_share_is_for_folders_without_parts_and_between_zero_and_one(tmp_path: Path) -> None:
    parted = trees.folder(tmp_path / "parted", users=None)
    assert "has train and test of its own, which no test_share changes" in complaint(
        DATASETS["folder"](path=str(parted), test_share=0.3), parted
    )
    shutil.rmtree(parted / "test")
    with pytest.raises(DataMissing, match=r"there is no .*parted/test; put your images in .*/<class>/, or in .*/train"):
        listed(parted)
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"test_share must be a number above 0 and below 1"):
            folder(parted, share)
    own = bare(tmp_path / "own")
    stores = {folder(own, share).folder_name for share in (0.2, 0.3)}  # type: ignore[attr-defined]
    assert len(stores) == 2 and folder(own).identity() != folder(own, 0.9).identity()


def test_stats_say_what_was_set_aside(tmp_path: Path) -> None:
    own, parted = bare(tmp_path / "own"), trees.folder(tmp_path / "parted", users=None)

    def said(path: Path) -> str:
        words = ["stats", f"folder(path='{path}')", "--clients", "2"]
        return CliRunner().invoke(data_command, words, catch_exceptions=False, standalone_mode=False).stdout

    tested = len(listed(own).test.paths)
    assert f"{tested} of 33 images, set aside by their names (test_share 0.2 of each class, one at least)" in said(own)
    assert "test part" not in said(parted)


# Prepared when they are needed ------------------------------------------------------------------------------


def test_a_run_prepares_few_photographs_itself_and_those_that_were_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's line, with the fastest model."""
    own = bare(tmp_path / "my" / "photographs")

    def run() -> tuple[str, str]:
        where = ("--data-root", str(tmp_path / "root"), "--out", str(tmp_path / "runs"), "--json")
        short = ("--rounds", "1", "--model", "linear", "--clients", "2", "--ray", "off", "--tracking-uri", "off")
        with pytest.raises(SystemExit) as ended:
            main(["run", "--algos", "fedavg", "--dataset", f"folder(path='{own}', pixels=8)", *where, *short])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        (cell,) = json.loads(printed.out)["runs"]
        return cell["status"], printed.err

    status, said = run()
    assert status == "done" and "33 photographs are few, and are prepared now; that is done once\n" in said
    status, said = run()
    assert status == "cached" and "are prepared now" not in said
    shutil.copy(next(trees.files(own, ".png")), own / "kind 1" / "new.png")
    status, said = run()
    assert status == "done" and "34 photographs are few" in said


@pytest.mark.parametrize(
    "command",
    [
        "data pack CALL --out OUT --data-root ROOT",
        "data embed CALL --model mlp --random-weights --data-root ROOT",
        "tune --algos fedavg --dataset CALL --trials 1 --rounds 1 --model linear --clients 2 --ray off --out OUT "
        "--data-root ROOT",
    ],
)
def test_whatever_reads_few_photographs_prepares_them(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, root = bare(tmp_path / "own", classes=2), tmp_path / "root"
    given = {"CALL": f"folder(path='{own}', pixels=8)", "OUT": str(tmp_path / "out.npz"), "ROOT": str(root)}
    words = [given.get(word, word) for word in command.split()]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert "24 photographs are few" in said and folder(own).load(root).train_x.shape[1:] == (3, 8, 8)


def test_many_photographs_and_those_of_others_keep_the_printed_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, heard = folder(bare(tmp_path / "own")), Heard()
    trees.inat(tmp_path, classes=3, largest=5, smallest=3, tested=2)
    monkeypatch.setattr(at_once, "MOST", 32)
    at_once.prepare_few([own, DATASETS["inat"](classes=3), DATASETS["digits"]()], tmp_path, heard)
    assert not heard.said and not (tmp_path / "prepared").exists()
    with pytest.raises(DataMissing, match=r"is not prepared in .*; run once: bench data prepare"):
        own.require(tmp_path)
    monkeypatch.setattr(at_once, "MOST", 33)
    (tmp_path / "pack.npz").touch()
    at_once.prepare_few([own], tmp_path / "pack.npz", heard)
    assert not heard.said
    at_once.prepare_few([own, own], tmp_path, heard)
    assert heard.done == 33
    own.require(tmp_path)


def test_a_broken_photograph_of_few_is_named_as_by_prepare(tmp_path: Path) -> None:
    path = bare(tmp_path / "own")
    (path / "kind 0" / "no.png").write_text("no picture")
    with pytest.raises(
        DataDamaged, match=r"^folder\(.*\): missing or broken photographs: 1, all named in .*\.broken\.txt"
    ):
        at_once.prepare_few([folder(path)], tmp_path, Heard())


def test_a_damaged_store_of_few_is_made_anew(tmp_path: Path) -> None:
    own = folder(bare(tmp_path / "own"))
    at_once.prepare_few([own], tmp_path, Heard())
    store = own.store(tmp_path)  # type: ignore[attr-defined]
    (store / "train.bin").write_bytes(b"")
    at_once.prepare_few([own], tmp_path, Heard())
    own.require(tmp_path)


# Re-sorted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "images"])
def test_a_part_that_was_re_sorted_into_class_folders_is_recognised(below: str, tmp_path: Path) -> None:
    tree = trees.tiny_imagenet(tmp_path, classes=3)
    dataset = DATASETS["tiny_imagenet"](classes=3, pixels=8)
    for line in (tree / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (tree / "val" / wnid / below).mkdir(parents=True, exist_ok=True)
        (tree / "val" / "images" / name).rename(tree / "val" / wnid / below / name)
    for gone in (False, True):  # many a script takes the empty folder away
        if gone:
            (tree / "val" / "images").rmdir()
        done = prepare(dataset, tmp_path, 1, Heard())
        said = done.complaint("tiny_imagenet")
        assert len(done.broken) == 9 and "missing or broken photographs: 9" in said
        assert f"JPEG of {tree / 'val' / 'images'} lies in {tree / 'val' / 'n'}" in said
        assert "were they re-sorted into class folders? put them back as the official archive has them; else" in said


def test_what_is_nowhere_was_not_re_sorted(tmp_path: Path) -> None:
    tree = trees.tiny_imagenet(tmp_path, classes=3)
    next(trees.files(tree / "val", ".JPEG")).unlink()
    done = prepare(DATASETS["tiny_imagenet"](classes=3, pixels=8), tmp_path, 1, Heard())
    assert len(done.broken) == 1 and "re-sorted" not in done.complaint("tiny_imagenet")


def test_photographs_that_all_lie_elsewhere_are_recognised_too(tmp_path: Path) -> None:
    tree = trees.places_lt(tmp_path, classes=3)
    for part in ("train", "val"):
        for file in list(trees.files(tree / part, ".jpg")):
            file.rename(tree / part / file.name)
    with pytest.raises(DataMissing, match=r"none of the photographs .* lies in .*/train: were they re-sorted"):
        prepare(DATASETS["places_lt"](classes=3, pixels=8), tmp_path, 1, Heard())


# Said once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["inat", "inat(version=2019)", "tiny-imagenet", "folder(path='{root}/nothing')"])
def test_a_check_says_once_whose_files_are_missing(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = call.format(root=tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", call, "--data-root", str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 3
    assert said.startswith(f"bench: {call}: ") and said.count(call.partition("(")[0].replace("-", "_") + ": ") <= 1
    assert not said.removeprefix(f"bench: {call}: ").startswith(("inat", "tiny_imagenet:", "folder"))
