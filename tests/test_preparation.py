"""Preparing photographs: what kills, bad files and full disks leave, and what the commands say."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from bench import DataDamaged, DataMissing
from bench.command.prepare import check_command, prepare_command
from bench.files import unfinished
from bench.files.decode import decode
from bench.files.photographs import Photographs
from bench.files.prepared import Plan, find
from bench.files.unfinished import StoreBusy, StoreUnwritable, writing
from bench.plugins.registry import DATASETS
from bench.preparing import preparation
from bench.sweep.cluster import spread
from tests import trees
from tests.shots import CHUNK, PIXELS, TEST, TRAIN, Heard, Shots, contents, damage, decoded, prepare, write_shots

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def shots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter `Shots` for one test."""
    monkeypatch.setitem(DATASETS._classes, "shots", Shots)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shots(tmp_path / "data")


# Preparing --------------------------------------------------------------------------------------------------


def test_a_second_preparation_finds_it_done(root: Path) -> None:
    first = Heard()
    done = prepare(root, heard=first)
    assert done.decoded == first.done == TRAIN + TEST and not done.broken
    assert first.begun == [("decoding", TRAIN + TEST, 0)]
    assert "46 photographs at 16 pixels take 35.3 kB in" in first.said[0] and "are free" in first.said[0]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    again = prepare(root, heard=(second := Heard()))
    assert done.store is not None and again.store is not None
    assert again.decoded == 0 and again.store.index == done.store.index
    assert second.begun == [] and before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_store_can_do_without_the_official_files(root: Path) -> None:
    prepare(root)
    shutil.rmtree(root / "shots")
    assert prepare(root).store is not None
    assert Shots().load(root).train_x[torch.tensor([0])].shape == (1, 3, PIXELS, PIXELS)
    with pytest.raises(DataMissing, match=r"list\.txt is not there"):
        prepare(root, pixels=8)


def test_without_one_photograph_nothing_is_written(root: Path) -> None:
    shutil.rmtree(root / "shots" / "a")
    with pytest.raises(DataMissing, match=r"none of the photographs .*a/0\.png; 'bench data fetch shots'"):
        prepare(root)
    assert not (root / "prepared").exists()


def test_broken_photographs_are_named_and_only_they_are_decoded_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(root)
    whole = contents(Shots().store(root))
    shutil.rmtree(root / "prepared")
    rows = {1: "truncated", 16: "no such file", 17: "no image of a known format", TRAIN + 1: "no such file"}
    paths = [root / "shots" / path for part in ("train", "test") for path in getattr(Shots().listing(root), part).paths]
    kept = {row: paths[row].read_bytes() for row in rows}
    paths[1].write_bytes(kept[1][:-30])
    paths[16].unlink()
    paths[17].write_text("sorry")
    paths[TRAIN + 1].unlink()

    done = prepare(root)
    assert done.store is None and find(done.folder) is None and done.decoded == TRAIN + TEST
    assert [path for path, _ in done.broken] == [paths[row] for row in rows]
    assert all(why in said for why, (_, said) in zip(rows.values(), done.broken, strict=True))
    assert done.broken_file.read_text().splitlines() == [f"{path}: {why}" for path, why in done.broken]
    with pytest.raises(DataMissing, match=r"is not prepared in .*; run once: bench data prepare shots --size 16"):
        Shots().load(root)

    asked: list[str] = []

    def listen(path: str, pixels: int) -> np.ndarray[Any, Any]:
        asked.append(path)
        return decode(path, pixels)

    monkeypatch.setattr(preparation, "decode", listen)
    paths[1].write_bytes(kept[1])
    paths[16].write_bytes(kept[16])
    fewer = prepare(root, heard=(heard := Heard()))
    assert [path for path, _ in fewer.broken] == [paths[17], paths[TRAIN + 1]] and fewer.decoded == 4
    assert heard.begun == [("decoding", TRAIN + TEST, TRAIN + TEST - 4)]
    assert asked == [str(paths[row]) for row in rows]
    paths[17].write_bytes(kept[17])
    paths[TRAIN + 1].write_bytes(kept[TRAIN + 1])
    mended = prepare(root)
    assert mended.store is not None and mended.decoded == 2 and contents(mended.folder) == whole
    assert not mended.broken_file.exists()
    assert sorted(path.name for path in (root / "prepared").iterdir()) == [".shots-16px.lock", "shots-16px"]


def test_a_chunk_that_is_not_what_its_marker_says_is_decoded_whole(root: Path) -> None:
    path = root / "shots" / "a" / "1.jpg"
    kept = path.read_bytes()
    path.unlink()
    prepare(root)
    (part,) = (root / "prepared").glob("*.part-*")
    damage(part / "train.bin", ("altered", 0, 1))  # as after a loss of power on a disk that lies
    path.write_bytes(kept)
    done = prepare(root)
    assert done.decoded == CHUNK and done.store is not None and list(done.store.verify()) == []


def test_other_lists_begin_anew_and_the_old_store_stays_until_the_new_one_is_complete(root: Path) -> None:
    old = prepare(root)
    assert old.store is not None
    listed = root / "shots" / "list.txt"
    listed.write_text(listed.read_text().replace("a/1.jpg 1", "a/1.jpg 2"))
    path = root / "shots" / "a" / "2.jpg"
    kept = path.read_bytes()
    path.unlink()
    done = prepare(root, heard=(heard := Heard()))
    assert done.store is None and "it stays until the new one is complete" in heard.said[0]
    still = find(old.folder)
    assert still is not None and still.listing == old.store.listing and list(still.verify()) == []
    listed.write_text(listed.read_text().replace("a/3.jpg 0", "a/3.jpg 2"))
    path.write_bytes(kept)
    done = prepare(root, heard=(heard := Heard()))
    assert any("was begun from other lists, options or versions; it is deleted" in said for said in heard.said)
    assert done.store is not None and done.store.labels.train[3] == 2 and done.decoded == TRAIN + TEST
    assert sorted(path.name for path in (root / "prepared").iterdir()) == [".shots-16px.lock", "shots-16px"]


def test_a_store_that_was_set_aside_by_a_killed_preparation_comes_back(root: Path) -> None:
    old = prepare(root)
    assert old.store is not None
    old.folder.rename(old.folder.with_name(f"{old.folder.name}.old"))  # and killed before the new one took its place
    (root / "shots" / "a" / "2.jpg").unlink()
    assert prepare(root).store is None
    still = find(old.folder)
    assert still is not None and list(still.verify()) == []


def test_what_another_version_of_the_decoder_began_is_not_continued(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "shots" / "a" / "2.jpg").rename(root / "kept.jpg")
    prepare(root)
    (root / "kept.jpg").rename(root / "shots" / "a" / "2.jpg")
    monkeypatch.setattr(preparation, "versions", lambda: {"Pillow": "1.0"})
    done = prepare(root)
    assert done.decoded == TRAIN + TEST and done.store is not None
    assert done.store.plan.made_by == {"Pillow": "1.0"}


def test_a_damaged_store_is_made_anew(root: Path) -> None:
    done = prepare(root)
    whole = contents(done.folder)
    os.truncate(done.folder / "test.bin", 5)
    assert prepare(root, heard=(heard := Heard())).decoded == TRAIN + TEST
    assert "is damaged; it is made anew" in heard.said[0] and contents(done.folder) == whole


def test_two_preparations_of_one_store_are_kept_apart(root: Path) -> None:
    plan = Plan(listing="", shape=(3, 2, 2), train=2, test=0)
    with writing(Shots().store(root), plan), pytest.raises(StoreBusy, match="by another process; wait for it, or end"):
        prepare(root)
    assert prepare(root).store is not None


# Kills ------------------------------------------------------------------------------------------------------

KILLS = """
import os, signal, shutil, sys
from pathlib import Path
from tests.shots import Heard, Shots, contents, prepare
from bench.files.prepared import find
from bench.plugins.registry import DATASETS

DATASETS._classes["shots"] = Shots
root = Path(sys.argv[1])
folder = Shots().store(root)
listed = root / "shots" / "list.txt"
first = listed.read_text()
old = contents(prepare(root).folder)
shutil.copytree(root / "prepared", root / "older")
listed.write_text(first.replace("a/1.jpg 1", "a/1.jpg 2"))
whole = contents(prepare(root).folder)
assert whole["train.bin"] == old["train.bin"] and whole["index.json"] != old["index.json"]

def prepare_and_die(moment):
    count = 0
    def watch(event, details):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"):
            ours = not isinstance(details[0], (str, os.PathLike)) or str(root / "prepared") in str(details[0])
            count += ours
            if count > moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    prepare(root)

def child(moment):
    pid = os.fork()
    if pid == 0:
        prepare_and_die(moment)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

moment = kills = gaps = 0
while True:
    shutil.rmtree(root / "prepared")
    shutil.copytree(root / "older", root / "prepared")
    status = child(moment)
    there = find(folder)
    gaps += there is None  # between the old one and the new one
    assert there is None or contents(folder) in (old, whole) or (folder / "parts").exists()
    assert there is None or list(there.verify()) == []
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    kills += 1
    if moment % 2:
        child(moment // 2)  # and once more, on the way
    heard = Heard()
    assert prepare(root, heard=heard).store is not None
    assert contents(folder) == whole
    assert sorted(os.listdir(root / "prepared")) == [".shots-16px.lock", "shots-16px"]
    moment += {stride}
assert prepare(root).decoded == 0 and find(folder) is not None
print(kills, gaps)
"""


def test_a_preparation_killed_anywhere_goes_on_to_the_same_bytes(root: Path) -> None:
    """A process is forked for every few files that it opens, renames or removes, and kills itself there."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS.replace("{stride}", "4"), root],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, gaps = map(int, done.stdout.split())
    assert kills >= 10 and gaps <= 3


HOLDING = """
import sys, time
from bench.command.main import main
from bench.preparing import preparation
decode, held = preparation.decode, sys.argv.pop(1)
preparation.decode = lambda path, pixels: time.sleep(600) if str(path) == held else decode(path, pixels)
main(prog_name="bench")
"""


def bench(*words: object, held: Path | None = None) -> subprocess.Popen[str]:
    """Start the command in a session of its own, so that it can be interrupted as from a terminal.

    Args:
        words: After "data".
        held: A photograph whose decoding does not end; None: none.
    """
    command = ["-m", "bench"] if held is None else ["-c", HOLDING, str(held)]
    return subprocess.Popen(
        [sys.executable, *command, "data", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a job in the background of a shell inherits a deaf ear for interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True)
class Inat:
    """A tree in iNaturalist's form whose last test photograph is none, and what it should become."""

    root: Path
    waits: Path
    content: bytes
    name: str = "inat(classes=4)"

    @property
    def folder(self) -> Path:
        return self.root / "prepared" / "inat-2018-4-classes-8px"

    def release(self) -> None:
        self.waits.unlink()
        self.waits.write_bytes(self.content)


@pytest.fixture
def inat(tmp_path: Path) -> Inat:
    trees.inat(tmp_path, classes=4, largest=60, smallest=30)
    listing = DATASETS["inat"](classes=4, pixels=8).listing(tmp_path)
    path = listing.folder / listing.test.paths[-1]
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    return Inat(tmp_path, path, content)


def test_workers_and_driver_killed_go_on_to_the_bytes_of_one_process(inat: Inat, tmp_path: Path) -> None:
    words = ("prepare", inat.name, "--size", 8, "--data-root", inat.root)
    killed = bench(*words, "--jobs", 2)
    wait(lambda: len([*inat.root.glob("prepared/*/parts/train-*.json")]) >= 1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert find(inat.folder) is None
    wait(lambda: not alive(killed.pid))
    inat.release()
    on_ray = bench(*words, "--jobs", 2)
    out, err = on_ray.communicate(timeout=120)
    assert on_ray.returncode == 0, err
    assert out.startswith("prepared: 176 training and 16 test images of 3 x 8 x 8 in"), out
    two_workers = contents(inat.folder)
    shutil.rmtree(inat.root / "prepared")
    dataset = DATASETS["inat"](classes=4, pixels=8)
    assert isinstance(dataset, Photographs)
    alone = preparation.prepare(dataset, inat.root, 1, Heard())
    assert contents(alone.folder) == two_workers


def test_an_interruption_keeps_what_is_done_and_a_second_process_waits_its_turn(inat: Inat) -> None:
    words = ("prepare", inat.name, "--size", 8, "--data-root", inat.root)
    waiting = bench(*words, "--jobs", 1, held=inat.waits)
    wait(lambda: len([*inat.root.glob("prepared/*/parts/*.json")]) == 2)
    dataset = DATASETS["inat"](classes=4, pixels=8)
    assert isinstance(dataset, Photographs)
    with pytest.raises(StoreBusy):
        preparation.prepare(dataset, inat.root, 1, Heard())
    os.killpg(waiting.pid, signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130 and "Traceback" not in err
    assert "bench: interrupted; 176 of 192 photographs are decoded and kept; the same command goes on" in err
    inat.release()
    assert preparation.prepare(dataset, inat.root, 1, Heard()).decoded == 16


# Disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_system_refuses_is_a_sentence_and_what_is_done_stays(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreUnwritable, match=os.strerror(number)) as caught:
        prepare(root)
    said = str(caught.value)
    assert "\n" not in said and str(Shots().store(root)) in said
    assert ("free some space" in said) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert ("put links to the official files into it" in said) == (number in (errno.EROFS, errno.EACCES))
    monkeypatch.setattr(os, "fsync", real)
    done = prepare(root)
    assert done.store is not None and done.decoded == TRAIN + TEST - 3 * CHUNK
    assert torch.equal(done.store.part("train")[torch.arange(TRAIN)], decoded(root))


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(StoreUnwritable, match=r"needs 35\.3 kB, and its disk has 1 kB free"):
            prepare(root)
        assert [path.name for path in (root / "prepared").iterdir()] == [".shots-16px.lock"]
    (root / "shots" / "a" / "2.jpg").rename(root / "kept.jpg")
    prepare(root)
    (root / "kept.jpg").rename(root / "shots" / "a" / "2.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        assert prepare(root).store is not None  # its space was taken when it was begun


def test_a_system_that_cannot_reserve_space_still_prepares(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr(unfinished, "fcntl", None)
    assert prepare(root).store is not None


FULL = """
import json, os, shutil, subprocess, sys
from pathlib import Path
from tests.shots import Heard, Shots, contents, prepare
from bench.files.unfinished import StoreUnwritable
from bench.files.prepared import find
from bench.plugins.registry import DATASETS

DATASETS._classes["shots"] = Shots
root, disk = Path(sys.argv[1]), Path(sys.argv[2])
pixels = 64  # 565 kB
whole = contents(prepare(root, pixels=pixels).folder)
told = []

def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)

def attempt():
    try:
        done = prepare(disk, pixels=pixels)
        told.append([done.decoded, contents(done.folder) == whole])
    except StoreUnwritable as error:
        told.append(str(error))

mount("-t", "tmpfs", "-o", "size=300k,nr_inodes=200", "none")
(disk / "shots").symlink_to(root / "shots")
attempt()  # too small, by what the system says
shutil.disk_usage, usage = (lambda path: usage(path)._replace(free=10**9)), shutil.disk_usage
attempt()  # too small, noticed when space is taken
reserve, os.posix_fallocate = os.posix_fallocate, lambda handle, offset, length: None
attempt()  # full in the middle
kept = len([*disk.glob("prepared/*.part-*/parts/*.json")])
os.posix_fallocate = reserve
shutil.disk_usage = usage
mount("-o", "remount,ro")
attempt()
mount("-o", "remount,rw,size=2m")
attempt()
mount("-o", "remount,ro")
attempt()
told.append(str(Shots(pixels=32).load) is not None)
try:
    prepare(disk, pixels=32)
except StoreUnwritable as error:
    told.append(str(error))
print(json.dumps([told, kept, find(Shots(pixels=pixels).store(disk)) is not None]))
"""


def test_a_disk_that_is_really_full_or_read_only(root: Path, tmp_path: Path) -> None:
    """In a name space of its own, where a small disk can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    space = ["unshare", "-rm"]
    probe = [*space, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    done = subprocess.run(
        [*space, sys.executable, "-c", FULL, root, disk], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told, kept, there = json.loads(done.stdout)
    small, taken, middle, locked, completed, again, _, other = told
    assert "needs 565 kB, and its disk has 3" in small and "free some" in small
    for said in (taken, middle):
        assert "No space left on device; what is prepared is kept; free some space" in said
    assert 0 < kept < 6
    assert "Read-only file system; make a folder of your own" in locked
    assert completed == [TRAIN + TEST - kept * CHUNK, True]
    assert again == [0, True] and there  # on a disk that cannot be written, too
    assert "Read-only file system" in other


# Side by side -----------------------------------------------------------------------------------------------


def test_work_in_this_process_is_done_in_order_and_errors_are_its_own() -> None:
    heard: list[tuple[int, str]] = []
    spread(str, [3, 1, 2], 1, lambda item, answer: heard.append((item, answer)))
    spread(str, [], None, lambda item, answer: heard.append((item, answer)))
    spread(str, [7], 8, lambda item, answer: heard.append((item, answer)))  # one item needs no Ray
    assert heard == [(3, "3"), (1, "1"), (2, "2"), (7, "7")]
    with pytest.raises(ZeroDivisionError):
        spread(lambda item: 1 / item, [1, 0], 1, lambda item, answer: None)


# The command ------------------------------------------------------------------------------------------------


def invoke(command: Any, *words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words], standalone_mode=False)


def test_the_command_prepares_names_what_is_broken_and_finds_it_done(root: Path) -> None:
    path = root / "shots" / "a" / "1.jpg"
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    words = ("shots", "--size", 12, "--jobs", 1, "--data-root", root)
    broken = invoke(prepare_command, *words)
    assert isinstance(broken.exception, DataDamaged)
    assert str(broken.exception).startswith("shots: missing or broken photographs: 1, all named in")
    assert "replace them and run the same command: only they are decoded again" in str(broken.exception)
    assert f"{path}: " in broken.stderr and "46 photographs at 12 pixels take 19.9 kB" in broken.stderr
    path.write_bytes(kept)
    done = invoke(prepare_command, *words)
    assert done.return_value == 0 and done.stdout.startswith("prepared: 37 training and 9 test images of 3 x 12 x 12")
    again = invoke(prepare_command, *words)
    assert again.return_value == 0 and again.stdout.startswith("already prepared: 37 training")
    assert find(Shots(pixels=12).store(root)) is not None


def test_the_command_refuses_what_makes_no_sense_in_a_sentence(root: Path) -> None:
    too_small = invoke(prepare_command, "shots", "--size", 2, "--data-root", root)
    assert str(too_small.exception) == "--size 2: Shots(pixels=2): pixels must be a whole number from 8 to 1,024"
    resident = invoke(prepare_command, "digits", "--data-root", root)
    assert resident.return_value == 0 and "digits needs no preparation" in resident.stdout
    nothing = invoke(prepare_command, "shots", "--data-root", root / "nowhere")
    assert isinstance(nothing.exception, DataMissing)


def test_check_lists_everything_that_is_wrong(root: Path) -> None:
    good = invoke(check_command, "shots", "--jobs", 1, "--data-root", root)
    assert good.return_value == 0
    assert good.stdout.startswith("shots: 37 training and 9 test images of 3 x 16 x 16, 3 classes (data root")
    assert good.stdout.endswith("as they should be\n") and "prepared" not in good.stdout
    done = prepare(root)
    assert f"prepared in {done.folder}" in invoke(check_command, "shots", "--jobs", 1, "--data-root", root).stdout
    folder = root / "shots" / "a"
    (folder / "1.jpg").unlink()
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:-30])
    (folder / f"{TRAIN + 1}.jpg").write_text("nothing")
    damage(done.folder / "test.bin", ("altered", 7, 7))
    listed = root / "shots" / "list.txt"
    listed.write_text(listed.read_text().replace("a/3.jpg 0", "a/3.jpg 9"))
    bad = invoke(check_command, "shots", "--jobs", 1, "--data-root", root)
    assert isinstance(bad.exception, DataDamaged) and "6 problems, listed on standard output" in str(bad.exception)
    labels, missing, cut, text, store, lists = bad.stdout.splitlines()
    assert labels == "training part: 4 classes, 0 to 9; there must be 3 from 0"
    assert missing == f"{folder / '1.jpg'}: no such file"
    assert cut.startswith(f"{folder / '2.jpg'}: image file is truncated")
    assert text.startswith(f"{folder / f'{TRAIN + 1}.jpg'}: ")
    assert "test.bin, rows 0 to 7: not what was written" in store
    assert "was made from other lists" in lists
    shutil.rmtree(root / "shots")
    nothing = invoke(check_command, "shots", "--jobs", 1, "--data-root", root)
    assert nothing.stdout.splitlines() == ["shots: list.txt is not there", store]


def test_check_reads_datasets_without_photographs_too(tmp_path: Path) -> None:
    good = invoke(check_command, "digits", "--data-root", tmp_path)
    assert good.return_value == 0 and good.stdout.startswith("digits: 1,")
    with pytest.raises(DataMissing):
        raise invoke(check_command, "cifar10", "--data-root", tmp_path).exception


def test_wrong_shapes_and_labels_of_resident_datasets_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = DATASETS["digits"]
    real = kind().load(Path())
    assert isinstance(real.train_x, Tensor)
    wrong = replace(real, train_x=real.train_x[:, :, 1:], test_y=real.test_y + 1, users=torch.tensor([-1]))
    monkeypatch.setattr(kind, "load", lambda self, root: wrong)
    checked = preparation.check(kind(), Path(), 1, Heard())
    assert [problem.split(":")[0] for problem in checked.problems] == ["training part", "training part", "test part"]


def test_the_help_of_preparing_loads_nothing_heavy() -> None:
    code = "import sys, bench.command.prepare; print({'torch', 'numpy', 'PIL', 'ray', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
