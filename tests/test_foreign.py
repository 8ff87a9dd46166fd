"""Files of one's own, and of others, that lie, never end, or are more than they seem: a sentence, and no memory."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
from numpy.lib import format as npy

from bench import DataDamaged
from bench.command.main import main
from bench.dataset import DataTooLarge
from bench.files import lists, official, source
from bench.plugins.registry import DATASETS
from bench.system import reading
from tests.trees import odd

TB = 10**12


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Let what is tested here take 2 GB more than there is: what would take more raises MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if not Path("/proc/self/statm").exists():
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# Arrays -----------------------------------------------------------------------------------------------------


def own(**changes: Any) -> dict[str, Any]:
    """Make a user's arrays: three classes of colour images of 6 x 5 pixels."""
    random = np.random.RandomState(0)
    return {
        "train_x": random.randint(0, 256, (30, 6, 5, 3)).astype(np.uint8),
        "train_y": np.arange(30) % 3,
        "test_x": random.randint(0, 256, (9, 6, 5, 3)).astype(np.uint8),
        "test_y": np.arange(9) % 3,
    } | changes


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """Begin an array of NumPy's."""
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def forged(path: Path, key: str, content: bytes, kind: int = ZIP_STORED) -> Path:
    """Write a user's arrays, one of them from bytes."""
    with ZipFile(path, "w", kind) as archive:
        for name, values in own().items():
            stream = io.BytesIO()
            np.save(stream, values)
            archive.writestr(f"{name}.npy", content if name == key else stream.getvalue())
    return path


def complaint(path: Path) -> str:
    """Give what is said of a file, in one line, by all that reads it."""
    said = set()
    for read in (lambda: DATASETS["arrays"](path=str(path)).num_classes, lambda: source.labels(at(path), path.parent)):
        with pytest.raises(DataDamaged) as caught:
            read()
        said.add(str(caught.value))
    (sentence,) = said
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence and len(sentence) < 400
    for advice in ("allow_pickle", "unsafe", "max_header_size", "trust"):
        assert advice not in sentence
    return sentence


def at(path: Path) -> Any:
    return DATASETS["arrays"](path=str(path))


def test_labels_beyond_the_number_of_examples_take_no_memory(tmp_path: Path) -> None:
    for factor in (15, 10**12, 10**18):
        np.savez(tmp_path / "own.npz", **own(train_y=np.arange(30) % 3 * factor))
        said = complaint(tmp_path / "own.npz")
        assert f"train_y has labels up to {2 * factor:,}, and 30 examples" in said
    np.savez(tmp_path / "own.npz", **own(test_y=np.arange(9) % 3 * 10**12))
    assert "test_y has labels from 0 to 2000000000000; it must be 0..2, as in train_y" in complaint(
        tmp_path / "own.npz"
    )
    np.savez(tmp_path / "own.npz", **own(train_y=np.array([2**64 - 1] * 30, np.uint64)))
    assert "train_y has labels from -1 to -1" in complaint(tmp_path / "own.npz")
    every = np.arange(30)
    np.savez(tmp_path / "own.npz", **own(train_y=every, test_x=own()["train_x"], test_y=every))
    assert at(tmp_path / "own.npz").num_classes == 30  # as many as there are examples is the most


@pytest.mark.parametrize(
    "shape", [(TB, 64), (30, 6, 5, 4), (2**62, 2**62), (-30, 6, 5, 3), (-30, -6, 5, 3), (), (30, 6, 5)]
)
@pytest.mark.parametrize("kind", [ZIP_STORED, ZIP_DEFLATED])
def test_a_header_that_promises_other_numbers_than_there_are_is_refused(
    shape: tuple[int, ...], kind: int, tmp_path: Path
) -> None:
    path = forged(tmp_path / "own.npz", "train_x", header(shape) + bytes(2700), kind)
    assert f"train_x is said to be uint8 of {shape}, and has 2,700 bytes for it; write it with" in complaint(path)


def test_numbers_without_bytes_are_not_counted(tmp_path: Path) -> None:
    path = forged(tmp_path / "own.npz", "train_y", header((TB,), "|V0"))
    assert "train_y is said to be |V0 of" in complaint(path)


def test_a_member_cannot_be_larger_than_the_file(tmp_path: Path) -> None:
    """The archive's own list says what it likes."""
    path = forged(tmp_path / "own.npz", "train_x", header((30, 6, 5, 3)) + bytes(2700))
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02", 0, content.rfind(b"train_x.npy"))
    content[place + 20 : place + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    path.write_bytes(content)
    assert "train_x is said to have 4,294,967,294 bytes, and has " in complaint(path)


def test_a_packed_array_may_become_a_hundred_times_larger_and_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.npz"
    np.savez_compressed(
        path, **own(train_x=np.zeros((30, 600, 500), np.uint8), test_x=np.ones((9, 600, 500), np.uint8))
    )
    monkeypatch.setattr(reading, "SMALL", 10 << 20)
    assert "all pixels are equal" in complaint(path)  # it was read
    monkeypatch.setattr(reading, "SMALL", 1 << 20)
    os.utime(path, ns=(1, 1))
    assert "train_x is said to have 9,000,128 bytes, and has " in complaint(path)


def test_objects_are_refused_in_our_words(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    np.savez(tmp_path / "own.npz", **own(train_y=np.array([Evil()] * 30, dtype=object)))
    said = complaint(tmp_path / "own.npz")
    assert "train_y holds Python objects, which are not read, as they can run code; write it with np.savez" in said
    path = forged(tmp_path / "own.npz", "train_y", pickle.dumps(Evil()))
    os.utime(path, ns=(2, 2))
    assert "train_y does not begin as an array does" in complaint(path)
    path = forged(tmp_path / "own.npz", "train_y", b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**6) + b" " * 10**6)
    os.utime(path, ns=(3, 3))
    assert "train_y does not begin as an array does" in complaint(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device", "socket"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = odd(tmp_path / "own.npz", kind)
    said = "it is a folder, a pipe or a device; name a file, as np.savez writes it"
    assert said in complaint(path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--algos", "fedavg", "--dataset", f"arrays(path='{path}')", "--out", str(tmp_path / "runs")])
    printed = capsys.readouterr().err
    assert ended.value.code == 3 and printed.count("\n") == 1 and said in printed


def test_memory_that_does_not_suffice_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    np.savez(tmp_path / "own.npz", **own())
    monkeypatch.setattr("bench.datasets.arrays._images", full)
    with pytest.raises(DataTooLarge, match=r"own\.npz: it does not fit in memory; write fewer or smaller") as caught:
        at(tmp_path / "own.npz").load(tmp_path)
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, DataDamaged)
    digits = DATASETS["digits"]()
    monkeypatch.setattr(type(digits), "load", full)
    for read in (source.load, source.labels):
        with pytest.raises(DataTooLarge, match="digits does not fit in memory; end what else uses it"):
            read(digits, tmp_path)


# Lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".xz", ".gz"])
def test_a_list_that_is_a_bomb_is_named(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SMALL", 10**6)
    pack: Callable[[bytes], bytes] = lzma.compress if ending == ".xz" else gzip.compress
    path = tmp_path / f"list.txt{ending}"
    path.write_bytes(pack(b"a" * 10**6))
    assert lists.contents(path, "again") == b"a" * 10**6
    path.write_bytes(pack(b"a" * (10**6 + 1)))
    with pytest.raises(DataDamaged, match=r"cannot be read \(more than 1,000,000 bytes would come out of it\); again"):
        lists.contents(path, "again")
    noise = np.random.RandomState(0).bytes(30_000)
    path.write_bytes(pack(noise + b"a" * (2 * 10**6)))  # sixty times as large
    assert len(lists.contents(path, "again")) == 2_030_000


def test_a_file_is_read_whole_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "list.txt").open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes nothing from the disk
    monkeypatch.setattr(reading, "MOST", 10**6)
    with pytest.raises(DataDamaged, match="more than 1,000,000 bytes would come out of it"):
        lists.contents(tmp_path / "list.txt", "again")
    (tmp_path / "list.xz").write_bytes(lzma.compress(bytes(2 * 10**6)))
    with pytest.raises(DataDamaged, match="more than 1,000,000 bytes would come out of it"):
        lists.contents(tmp_path / "list.xz", "again")


@pytest.mark.parametrize("kind", ["pipe", "nested", "bomb", "digits"])
def test_a_file_of_leaf_that_lies_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SMALL", 10**6)
    for part in ("train", "test"):
        (tmp_path / "femnist" / part).mkdir(parents=True)
        path = tmp_path / "femnist" / part / "data.json.xz"
        content = {
            "nested": lzma.compress(b"[" * 10**5),
            "bomb": lzma.compress(b" " * 10**7),
            "digits": lzma.compress(b'{"users": [' + b"1" * 5000 + b"]}"),
        }
        path.write_bytes(content[kind]) if kind in content else os.mkfifo(path)
    with pytest.raises(DataDamaged, match=r"data\.json\.xz: it cannot be read \(.*\); copy it again") as caught:
        source.labels(DATASETS["femnist"](), tmp_path)
    assert len(str(caught.value)) < 400


def test_an_idx_array_that_promises_more_than_it_has_is_none() -> None:
    for shape in ((10**9, 10**9), (2**32 - 1,) * 8, (0,) * 255):
        content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(100)
        with pytest.raises((ValueError, RuntimeError)):
            official.read_idx(content)
