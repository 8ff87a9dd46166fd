"""Photographs decoded once: what a decoder gives, what a store is, and what kills, bad files and full disks leave."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bench import DataDamaged, DataMissing, Labels, preparation
from bench.command.prepare import check_command, prepare_command
from bench.files import decode as decoding
from bench.files import prepared, unfinished
from bench.files.decode import BadPhotograph, decode
from bench.files.listing import Listing, Part
from bench.files.photographs import Photographs
from bench.files.prepared import Plan, Stored, find
from bench.files.unfinished import StoreBusy, StoreUnwritable, writing
from bench.pool import spread
from bench.registry import DATASETS
from tests import trees

ROOT = Path(__file__).parents[1]
TRAIN, TEST, PIXELS, CHUNK = 37, 9, 16, 8


@dataclass(frozen=True, kw_only=True)
class Shots(Photographs):
    """Photographs that are listed in `shots/list.txt`, the last `TEST` of them for testing."""

    num_classes: ClassVar[int] = 3
    tail = "natural"
    pixels: int = PIXELS

    @property
    def folder_name(self) -> str:
        return "shots"

    def listing(self, root: Path) -> Listing:
        try:
            lines = (root / "shots" / "list.txt").read_text().splitlines()
        except FileNotFoundError as error:
            raise DataMissing("shots: list.txt is not there") from error
        paths, labels = zip(*(line.split() for line in lines), strict=True)
        y = torch.tensor([int(label) for label in labels])
        users = torch.arange(len(paths)) % 5
        return Listing(
            root / "shots", Part(paths[:-TEST], y[:-TEST], users[:-TEST]), Part(paths[-TEST:], y[-TEST:], users[-TEST:])
        )


class Heard(preparation.Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun: list[tuple[str, int, int]] = []
        self.done = 0

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.begun.append((what, total, done))

    def advance(self, photographs: int) -> None:
        self.done += photographs


@pytest.fixture(autouse=True)
def shots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enter `Shots` for one test."""
    monkeypatch.setitem(DATASETS._classes, "shots", Shots)
    yield


def write_shots(root: Path) -> Path:
    """Write the list of `Shots` and its photographs: JPEG, and a few PNG."""
    names = [f"a/{row}.{'png' if row % 5 == 0 else 'jpg'}" for row in range(TRAIN + TEST)]
    for row, name in enumerate(names):
        trees.photograph(root / "shots" / name, row % 3, row)
    (root / "shots" / "list.txt").write_text("".join(f"{name} {row % 3}\n" for row, name in enumerate(names)))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shots(tmp_path / "data")


def prepare(root: Path, jobs: int | None = 1, heard: Heard | None = None, **fields: Any) -> preparation.Prepared:
    return preparation.prepare(Shots(**fields), root, jobs, heard or Heard(), chunk=CHUNK)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(root: Path, part: str = "train") -> Tensor:
    """Decode without a store."""
    listing = Shots().listing(root)
    paths = (listing.train if part == "train" else listing.test).paths
    return torch.stack([torch.from_numpy(decode(listing.folder / path, PIXELS)) for path in paths]).permute(0, 3, 1, 2)


def streamed(root: Path) -> Stored:
    """Open the training part."""
    images = Shots().load(root).train_x
    assert isinstance(images, Stored)
    return images


# Decoding ---------------------------------------------------------------------------------------------------


def picture(height: int, width: int, detail: int = 4) -> Image.Image:
    """Make something smooth, so that it looks the same at any size that shows its details."""
    corners = np.random.default_rng(0).integers(0, 255, (detail, detail, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def distance(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max())


def test_the_middle_square_is_scaled(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste((0, 0, 255), (30, 0, 60, 30))
    for turned, name in ((image, "wide.png"), (image.transpose(Image.Transpose.ROTATE_90), "high.png")):
        turned.save(tmp_path / name)
        square = decode(tmp_path / name, 8)
        assert square.shape == (8, 8, 3) and square.dtype == np.uint8
        scaled = np.asarray(turned.resize((turned.width * 8 // 30, turned.height * 8 // 30), Image.Resampling.BICUBIC))
        assert (square == (scaled[:, 8:16] if turned is image else scaled[8:16])).all()
        assert (square[2:-2, 2:-2] == (0, 0, 255)).all()


def test_fine_patterns_become_grey_and_not_another_pattern(tmp_path: Path) -> None:
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.png")
    square = decode(tmp_path / "checks.png", 16)
    assert square.min() > 120 and square.max() < 135


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_that_was_taken_askew_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    undone = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    upright = picture(31, 45)
    turn = decoding._UPRIGHT.get(undone)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "askew.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert distance(decode(tmp_path / "askew.png", 12), decode(tmp_path / "upright.png", 12)) <= 1


def test_orientation_six_means_a_quarter_turn_clockwise(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 10))  # light above
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "six.png", exif=exif)
    square = decode(tmp_path / "six.png", 10)
    assert square[:, 9].min() == 255 and square[:, 0].max() == 0  # light at the right


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_all_kinds_of_pixels_become_colour(tmp_path: Path, mode: str) -> None:
    grey = picture(40, 40).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save(tmp_path / "image.tiff")
    grey.save(tmp_path / "grey.png")
    tolerance = 130 if mode == "1" else 3
    assert distance(decode(tmp_path / "image.tiff", 8), decode(tmp_path / "grey.png", 8)) <= tolerance


def test_large_jpegs_read_at_a_fraction_of_their_size_look_the_same(tmp_path: Path) -> None:
    for detail in (4, 12):
        image = picture(130, 170, detail=detail)
        image.save(tmp_path / "large.jpg", quality=95)
        image.save(tmp_path / "large.png")
        assert distance(decode(tmp_path / "large.jpg", 32), decode(tmp_path / "large.png", 32)) < 12


def test_a_palette_with_transparency_is_no_matter_for_a_warning(tmp_path: Path) -> None:
    image = picture(20, 20).quantize(8)
    image.save(tmp_path / "clear.png", transparency=bytes([0, 128, 255]))
    image.save(tmp_path / "opaque.png")
    assert (decode(tmp_path / "clear.png", 8) == decode(tmp_path / "opaque.png", 8)).all()


def test_damaged_metadata_do_not_make_a_bad_photograph(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "plain.jpg")
    picture(20, 20).save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01")
    assert (decode(tmp_path / "odd.jpg", 8) == decode(tmp_path / "plain.jpg", 8)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_a_photograph_cut_anywhere_is_bad_or_just_as_it_was(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    picture(24, 30).save(whole)
    content, right, bad = whole.read_bytes(), decode(whole, 8), 0
    for length in {*range(0, len(content), max(1, len(content) // 60)), *range(len(content) - 4, len(content))}:
        cut.write_bytes(content[:length])
        try:
            assert (decode(cut, 8) == right).all(), length
        except BadPhotograph:
            bad += 1
    assert bad > 50


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
)
def test_a_photograph_with_other_bytes_is_an_image_or_bad_and_never_a_warning(
    place: int, patch: bytes, kind: str
) -> None:
    sink = io.BytesIO()
    picture(24, 30).save(sink, kind)
    content = bytearray(sink.getvalue())
    place %= len(content)
    content[place : place + len(patch)] = patch
    with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write(content)
        file.flush()
        try:
            assert decode(file.name, 8).shape == (8, 8, 3)
        except BadPhotograph as error:
            assert str(error)


def test_what_is_wrong_with_a_photograph_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    picture(20, 30).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-40])
    for name, why in {
        "missing": "no such file",
        "text": "no image of a known format",
        "empty": "it is empty",
        "folder": "Is a directory",
        "cut": "image file is truncated",
    }.items():
        with pytest.raises(BadPhotograph, match=why):
            decode(tmp_path / f"{name}.jpg", 8)
    for limit in (400, 200):  # Pillow warns of what is larger, and refuses twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadPhotograph, match=f"more than {limit} pixels"):
            decode(tmp_path / "good.jpg", 8)


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
            store.finish(Labels(torch.zeros(2), torch.zeros(0)))
        store.write(chunk, np.zeros((2, 2, 2, 3), np.uint8))
        with pytest.raises(ValueError, match="other numbers of images"):
            store.finish(Labels(torch.zeros(3), torch.zeros(0)))
        assert store.finish(Labels(torch.zeros(2), torch.zeros(0))).folder == tmp_path / "store"


# Damage -----------------------------------------------------------------------------------------------------

FILES = ("train.bin", "test.bin", "labels.npz", "index.json")
DAMAGE = st.one_of(
    st.none(),
    st.just("missing"),
    st.tuples(st.just("cut"), st.integers(0, 10**6)),
    st.tuples(st.just("longer"), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("altered"), st.integers(0, 10**6), st.integers(1, 255)),
)


def damage(file: Path, kind: Any) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind is not None and kind[0] == "cut":
        file.write_bytes(content[: kind[1] % len(content)])
    elif kind is not None and kind[0] == "longer":
        file.write_bytes(content + kind[1])
    elif kind is not None:
        content[kind[1] % len(content)] ^= kind[2]
        file.write_bytes(content)


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
    with pytest.raises(DataMissing, match=r"is not prepared in .*; run 'bench data prepare shots --size 16"):
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
from tests.test_prepared import Heard, Shots, contents, prepare
from bench.files.prepared import find
from bench.registry import DATASETS

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


def bench(*words: object) -> subprocess.Popen[str]:
    """Start the command in a session of its own, so that it can be interrupted as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", "data", *map(str, words)],
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
    """A tree in iNaturalist's form whose last test photograph keeps who opens it waiting, and what it should become."""

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
    waiting = bench(*words, "--jobs", 1)
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
from tests.test_prepared import Heard, Shots, contents, prepare
from bench.files.unfinished import StoreUnwritable
from bench.files.prepared import find
from bench.registry import DATASETS

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
    assert str(too_small.exception) == "--size 2: pixels = 2: must be in 8..1024"
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
