"""Prepared stores: what is read from them, and how damage to them is found."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import DataDamaged, Labels
from bench.files import prepared
from bench.files.prepared import Plan, Stored, find
from bench.files.unfinished import writing
from bench.plugins.registry import DATASETS
from tests.shots import PIXELS, TEST, TRAIN, Shots, damage, decoded, prepare, streamed, write_shots


@pytest.fixture(autouse=True)
def shots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter `Shots` for one test."""
    monkeypatch.setitem(DATASETS._classes, "shots", Shots)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shots(tmp_path / "data")


# Reading a store --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the root of a prepared store, which no test may change."""
    root = write_shots(tmp_path_factory.mktemp("stored"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS._classes, "shots", Shots)
        assert prepare(root).store is not None
    return root


@pytest.fixture(params=["preadv", "seek"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a test run as on a system without `os.preadv` as well."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv")


@pytest.mark.usefixtures("reading")
def test_rows_of_a_store_are_the_decoded_photographs(stored: Path) -> None:
    splits = Shots().load(stored)
    generator = torch.Generator().manual_seed(0)
    for images, part, size in ((splits.train_x, "train", TRAIN), (splits.test_x, "test", TEST)):
        assert isinstance(images, Stored)
        expected = decoded(stored, part)
        assert len(images) == size and images.shape == tuple(expected.shape) and images.dtype == torch.uint8
        lists = [[], [0], [size - 1], [3, 3, 3], [2, 3, 4, 8, 7, 7, 0], list(range(size)), [*range(size)][::-1]]
        random = [torch.randint(0, size, (length,), generator=generator).tolist() for length in range(1, 40)]
        for rows in lists + random:
            read = images[torch.tensor(rows, dtype=torch.int64)]
            assert torch.equal(read, expected[torch.tensor(rows, dtype=torch.int64)])
            assert read.permute(0, 2, 3, 1).is_contiguous()
    assert splits.labels.train.tolist() == [row % 3 for row in range(TRAIN)]
    assert splits.users is not None and splits.users.tolist() == [row % 5 for row in range(TRAIN)]
    assert splits.test_users is not None and len(splits.test_users) == TEST


@pytest.mark.usefixtures("reading")
def test_what_was_read_is_memory_of_its_own(stored: Path) -> None:
    images = streamed(stored)
    first = images[torch.tensor([1, 2])]
    kept = first.clone()
    images[torch.tensor([1, 2])].zero_()
    assert torch.equal(first, kept) and torch.equal(images[torch.tensor([1, 2])], kept)


def test_rows_that_are_not_there_are_refused(stored: Path) -> None:
    images = streamed(stored)
    for rows in ([-1], [TRAIN], [0, TRAIN + 5]):
        with pytest.raises(IndexError, match="there are 37 from 0"):
            images[torch.tensor(rows)]


@pytest.mark.usefixtures("reading")
def test_a_store_survives_pickling_forks_and_closing(stored: Path) -> None:
    images = streamed(stored)
    rows = torch.tensor([5, 1, 2])
    expected = images[rows].clone()
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy[rows], expected) and copy.shape == images.shape
    images.close()
    images.close()
    assert torch.equal(images[rows], expected)
    first = images._handle()
    images._process = -1  # as in a child, whose file would have the position of its parent's
    assert torch.equal(images[rows], expected) and images._process == os.getpid()
    assert isinstance(first, int)


def test_a_store_leaves_no_file_open(stored: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0

    before = open_files()
    images = streamed(stored)
    images[torch.tensor([0])]
    images.prefetch(torch.arange(TRAIN))
    del images
    limit = time.monotonic() + 10
    while open_files() > before and time.monotonic() < limit:  # the thread that reads ahead closes its own
        time.sleep(0.01)
    assert open_files() == before


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")
def test_prefetching_asks_for_the_rows_in_pieces_and_joins_neighbours(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    finished, go = threading.Event(), threading.Event()
    size = 3 * PIXELS * PIXELS

    def advise(handle: int, offset: int, length: int, advice: int) -> None:
        go.wait(10)
        asked.append((offset, length))
        if offset == 30 * size:
            finished.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(prepared, "_AHEAD", 2 * size)
    monkeypatch.setattr(prepared, "_NEAR", size)
    images = streamed(stored)
    before, started = set(threading.enumerate()), time.monotonic()
    images.prefetch(torch.tensor([0, 7, 14, 20]))  # superseded while its first piece is asked for
    images.prefetch(torch.tensor([30, 4, 5, 6, 8, 8, 12]))
    assert time.monotonic() - started < 5
    go.set()
    assert finished.wait(10)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    pieces = [(4, 2), (6, 2), (8, 1), (12, 1), (30, 1)]
    late = [(offset // size, length // size) for offset, length in asked]
    assert [piece for piece in late if piece not in ((0, 1), (7, 1))] == pieces
    assert (14, 1) not in late and (20, 1) not in late


def test_prefetching_does_nothing_where_the_system_cannot(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(threading, "Thread", None)
    images = streamed(stored)
    images.prefetch(torch.tensor([0]))
    assert torch.equal(images[torch.tensor([0])], decoded(stored)[:1])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")
def test_prefetching_gives_up_where_no_thread_can_be_had(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    images = streamed(stored)
    images[torch.tensor([0])]
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    images.prefetch(torch.tensor([0]))
    assert len(os.listdir("/proc/self/fd")) == before


def test_half_precision_features_are_stored_too(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 1, 1, 7)).astype(np.float16)
    plan = Plan(listing="features", shape=(7, 1, 1), train=20, test=20, dtype="float16", chunk=6)
    labels = Labels(torch.arange(20), torch.arange(20))
    with writing(tmp_path / "features", plan) as store:
        for chunk in store.todo():
            store.write(chunk, values[chunk.start : chunk.stop])
        store.finish(labels)
    found = find(tmp_path / "features")
    assert found is not None and found.listing == "features" and list(found.verify()) == []
    images = found.splits().train_x
    assert images.dtype == torch.float16 and images.shape == (20, 7, 1, 1)
    read = images[torch.tensor([3, 4, 19, 0])]
    assert torch.equal(read, torch.from_numpy(values[[3, 4, 19, 0]]).permute(0, 3, 1, 2))
    assert found.labels.users is None


def test_a_store_of_another_shape_is_not_written(tmp_path: Path) -> None:
    plan = Plan(listing="", shape=(3, 2, 2), train=2, test=0)
    with writing(tmp_path / "store", plan) as store:
        (chunk,) = store.todo()
        for wrong in (np.zeros((2, 3, 2, 2), np.uint8), np.zeros((1, 2, 2, 3), np.uint8), np.zeros((2, 2, 2, 3))):
            with pytest.raises(ValueError, match=r"uint8 of \(2, 2, 2, 3\) are wanted"):
                store.write(chunk, wrong)
        with pytest.raises(ValueError, match="1 chunks are to do"):
            store.finish(Labels(torch.zeros(2).long(), torch.zeros(0).long()))
        store.write(chunk, np.zeros((2, 2, 2, 3), np.uint8))
        with pytest.raises(ValueError, match="other numbers of images"):
            store.finish(Labels(torch.zeros(3), torch.zeros(0)))
        assert store.finish(Labels(torch.zeros(2).long(), torch.zeros(0).long())).folder == tmp_path / "store"


# Damage -----------------------------------------------------------------------------------------------------

FILES = ("train.bin", "test.bin", "labels.npz", "index.json")
DAMAGE = st.one_of(
    st.none(),
    st.just("missing"),
    st.tuples(st.just("cut"), st.integers(0, 10**6)),
    st.tuples(st.just("longer"), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("altered"), st.integers(0, 10**6), st.integers(1, 255)),
)


def judge(stored: Path, kinds: dict[str, Any]) -> None:
    """Damage a copy of a store, and hold what is found against what was prepared."""
    whole = find(Shots().store(stored))
    assert whole is not None
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        shutil.copytree(Shots().store(stored), folder)
        for name, kind in kinds.items():
            damage(folder / name, kind)
        try:
            found = find(folder)
        except DataDamaged as error:
            assert any(str(folder / name) in str(error) for name, kind in kinds.items() if kind is not None)
            assert f"delete {folder} and prepare the dataset again" in str(error)
            return
        if found is None:
            assert kinds.get("index.json") == "missing"
            return
        assert (found.listing, found.plan, found.chunks) == (whole.listing, whole.plan, whole.chunks)
        for name in ("train", "test", "users", "test_users"):
            assert torch.equal(getattr(found.labels, name), getattr(whole.labels, name))
        problems = list(found.verify())
        for part, rows in (("train", TRAIN), ("test", TEST)):
            kind = kinds.get(f"{part}.bin")
            same = torch.equal(found.part(part)[torch.arange(rows)], whole.part(part)[torch.arange(rows)])
            assert same == (kind is None)
            assert same != any(f"{part}.bin" in problem for problem in problems)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FILES), DAMAGE, max_size=len(FILES)))
def test_a_store_with_files_missing_cut_or_altered_is_never_a_wrong_one(stored: Path, kinds: dict[str, Any]) -> None:
    """Bytes altered within the images are the one thing that opening does not find, and `verify` does."""
    judge(stored, kinds)


@pytest.mark.parametrize("name", FILES)
def test_a_store_with_one_bad_file_is_never_a_wrong_one(stored: Path, name: str) -> None:
    size = (Shots().store(stored) / name).stat().st_size
    places = range(0, size, size // 20)
    for kind in ("missing", ("longer", b"x"), *(("cut", p) for p in places), *(("altered", p, 1) for p in places)):
        judge(stored, {name: kind})


def test_verify_names_the_rows_and_goes_on(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    shutil.copytree(Shots().store(stored), folder)
    for row in (9, 36):
        damage(folder / "train.bin", ("altered", row * 3 * PIXELS**2, 1))
    found = find(folder)
    read: list[int] = []
    assert found is not None
    problems = list(found.verify(read.append))
    assert len(problems) == 2 and "rows 8 to 15" in problems[0] and "rows 32 to 36" in problems[1]
    assert sum(read) == TRAIN + TEST
    (folder / "test.bin").unlink()
    assert "test.bin cannot be read" in list(found.verify())[-1]


@pytest.mark.usefixtures("reading")
def test_a_file_that_shrinks_or_changes_under_a_run_is_noticed(root: Path) -> None:
    store = prepare(root).store
    assert store is not None
    images, late = store.part("train"), store.part("train")
    images[torch.tensor([0])]
    other = (root / "shots" / "list.txt").read_text().replace("a/1.jpg 1", "a/1.jpg 2")
    (root / "shots" / "list.txt").write_text(other)
    again = prepare(root).store
    assert again is not None and again.listing != store.listing
    images[torch.tensor([0])]  # it has the file that was there
    with pytest.raises(DataDamaged, match="prepared anew while it was in use"):
        late[torch.tensor([0])]
    images = again.part("train")
    images[torch.tensor([0])]
    os.truncate(again.folder / "train.bin", 1000)
    with pytest.raises(DataDamaged, match=r"train\.bin cannot be read \(it is shorter than it was\)"):
        images[torch.tensor([30])]
    with pytest.raises(DataDamaged, match=r"has 1,000 bytes instead of 28,416"):
        again.part("train")[torch.tensor([0])]


def test_a_store_of_a_later_version_is_not_to_be_deleted(tmp_path: Path) -> None:
    document = {"format": prepared.FORMAT + 1}
    content = json.dumps({**document, "sha256": prepared.checksum(document)}).encode()
    with pytest.raises(DataDamaged, match="a later version of bench wrote it, so update bench") as error:
        prepared._read_index(tmp_path / "index.json", content)
    assert "delete" not in str(error.value)


def test_a_store_whose_checksums_are_right_and_its_numbers_wrong_is_named(stored: Path, tmp_path: Path) -> None:
    """Whoever writes one can compute them."""
    folder = tmp_path / "store"
    shutil.copytree(Shots().store(stored), folder)
    index = json.loads((folder / "index.json").read_bytes())
    columns = dict(np.load(folder / "labels.npz"))

    def complaint() -> str:
        document = {key: value for key, value in index.items() if key != "sha256"} | changes
        document["sha256"] = prepared.checksum(document)
        (folder / "index.json").write_text(json.dumps(document))
        with pytest.raises(DataDamaged) as caught:
            find(folder)
        assert str(caught.value).endswith(f"; delete {folder} and prepare the dataset again")
        return str(caught.value)

    plan, other, chunks = index["plan"], cast(Any, None), cast(Any, None)
    for other in (
        {**plan, "train": -1}, {**plan, "chunk": 0}, {**plan, "train": 10**15}, {**plan, "shape": [3, 0, 8]},
        {**plan, "dtype": "float64"}, {**plan, "more": 1}, {**plan, "shape": 3}, {"train": 1}, [],
    ):  # fmt: skip
        changes: dict[str, Any] = {"plan": other}
        assert "index.json is of no store that bench writes (" in complaint()
    for chunks in ({}, {"train": [], "test": []}, None):
        changes = {"chunks": chunks}
        assert "index.json is of no store that bench writes (" in complaint()
    changes = {"plan": {**plan, "train": -1}, "chunks": {**index["chunks"], "train": []}}
    assert "index.json is of no store that bench writes (numbers that no store has)" in complaint()
    changes = {"format": "new"}
    assert "index.json is not what was written" in complaint()
    for wrong in (
        {**columns, "train": columns["train"][:-1]}, {**columns, "train": columns["train"] * 1.0},
        {**columns, "more": columns["train"]}, {"train": columns["train"]},
        {**columns, "train": columns["train"].astype(object)},
    ):  # fmt: skip
        np.savez(folder / "labels.npz", **wrong)
        changes = {"labels": prepared.sha256_of((folder / "labels.npz").read_bytes())}
        assert "labels.npz is of no store that bench writes (" in complaint()
    (folder / "labels.npz").write_bytes(b"no archive")
    changes = {"labels": prepared.sha256_of(b"no archive")}
    assert "labels.npz is of no store that bench writes (File is not a zip file)" in complaint()
