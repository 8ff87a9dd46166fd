"""Datasets that fit in memory and are not in torchvision's form: LEAF's FEMNIST, SVHN, a user's own arrays."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from bench import DataDamaged, DataMissing, Dataset, Splits
from bench.command.main import main
from bench.plugins.registry import DATASETS
from bench.splits.split import make_split
from bench.sweep.resolving import resolve_setting

femnist = import_module("bench.datasets.femnist")
arrays = import_module("bench.datasets.arrays")
svhn = import_module("bench.datasets.svhn")


def same(one: Splits, other: Splits) -> bool:
    """Compare all that was read."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def bench_run(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> dict[str, Any]:
    """Run `bench run` in this process, and give its one run."""
    off = ("--ray", "off", "--tracking-uri", "off", "--json", "--out", str(out))
    with pytest.raises(SystemExit) as ended:
        main(["run", "--algos", "fedavg", "--rounds", "1", *off, *words], prog_name="bench")
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    (cell,) = json.loads(printed.out)["runs"]
    return dict(cell)


# FEMNIST ----------------------------------------------------------------------------------------------------

Leaf = dict[str, Any]


def leaf(writers: dict[str, int], seed: int = 0) -> Leaf:
    """Make one file as LEAF writes it: so many images for each writer, which depend on the writer and the seed."""
    data = {}
    for writer, count in writers.items():
        random = np.random.RandomState(np.frombuffer(hashlib.sha256(f"{writer} {seed}".encode()).digest(), np.uint32))
        pixels, labels = random.randint(0, 256, (count, 784)) / 255, random.randint(0, 62, count)
        data[writer] = {"x": pixels.tolist(), "y": labels.tolist()}
    return {"users": list(writers), "num_samples": list(writers.values()), "user_data": data}


PACKERS: dict[str, Callable[[bytes], bytes]] = {".json": bytes, ".json.xz": lzma.compress, ".json.gz": gzip.compress}


def put(file: Path, content: object, ending: str = ".json") -> Path:
    """Write a file of LEAF's, packed or not."""
    file = file.with_name(file.name + ending)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(PACKERS[ending](json.dumps(content).encode()))
    return file


TRAIN, TEST = {"f2_1": 4, "f0_9": 1, "f1_5": 3, "f9_0": 2}, {"f1_5": 2, "f2_1": 1, "f7_7": 5, "f0_9": 2}


@cache
def contents(ending: str) -> dict[str, bytes]:
    """Give the files of a sample of five writers, of whom three have training and test images, a writer a file."""
    return {
        f"femnist/{part}/all_data_{number}{ending}": PACKERS[ending](json.dumps(leaf({writer: count}, seed)).encode())
        for part, seed, writers in (("train", 0, TRAIN), ("test", 1, TEST))
        for number, (writer, count) in enumerate(writers.items())
    }


def sample(root: Path, ending: str = ".json") -> Path:
    """Write that sample."""
    for name, content in contents(ending).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@cache
def whole_sample() -> Splits:
    """Read that sample."""
    with TemporaryDirectory() as folder:
        splits: Splits = DATASETS["femnist"]().load(sample(Path(folder)))
    return splits


def test_femnist_has_the_writers_of_both_parts_numbered_by_name(tmp_path: Path) -> None:
    splits = DATASETS["femnist"]().load(sample(tmp_path))
    assert splits.users is not None and splits.users.tolist() == [0, 1, 1, 1, 2, 2, 2, 2]  # f0_9, f1_5, f2_1
    assert splits.test_users is not None and splits.test_users.tolist() == [0, 0, 1, 1, 2]
    assert splits.train_x.shape == (8, 1, 28, 28) and splits.train_x.dtype == torch.uint8
    written = leaf({"f1_5": 3})["user_data"]["f1_5"]
    assert torch.equal(splits.train_x[1:4].double().view(3, 784) / 255, torch.tensor(written["x"], dtype=torch.float64))
    assert splits.train_y[1:4].tolist() == written["y"]
    labels = DATASETS["femnist"]().labels(tmp_path)
    assert torch.equal(labels.train, splits.train_y) and labels.test_users is splits.test_users


def test_femnist_does_not_depend_on_files_their_names_and_packing(tmp_path: Path) -> None:
    expected = DATASETS["femnist"]().load(sample(tmp_path / "one"))
    for ending in (".json.xz", ".json.gz"):
        assert same(DATASETS["femnist"]().load(sample(tmp_path / ending, ending)), expected)
    put(tmp_path / "two/femnist/train/z", leaf({writer: TRAIN[writer] for writer in ("f9_0", "f1_5")}), ".json.xz")
    put(tmp_path / "two/femnist/train/a", leaf({writer: TRAIN[writer] for writer in ("f2_1", "f0_9")}), ".json")
    put(tmp_path / "two/femnist/test/m", leaf(dict(reversed(TEST.items())), seed=1), ".json.gz")
    assert same(DATASETS["femnist"]().load(tmp_path / "two"), expected)


def test_femnist_takes_every_grey_exactly(tmp_path: Path) -> None:
    greys = np.resize(np.arange(256), 784)
    for part in ("train", "test"):
        content = leaf({"w": 1})
        content["user_data"]["w"]["x"] = [(greys / 255).tolist()]
        put(tmp_path / "femnist" / part / "a", content)
    assert DATASETS["femnist"]().load(tmp_path).train_x.flatten().tolist() == greys.tolist()


def test_femnist_reads_its_files_once_for_labels_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DATASETS["femnist"]()
    dataset.labels(sample(tmp_path))
    monkeypatch.setattr(femnist, "_parse", None)
    dataset.load(tmp_path)
    monkeypatch.undo()
    put(tmp_path / "femnist" / "train" / "all_data_0", leaf({"f2_1": 9}))
    assert len(dataset.load(tmp_path).train_y) == 13  # another file, another reading


@pytest.mark.parametrize("lacking", ["everything", "train", "test"])
def test_femnist_that_is_not_there_says_how_to_make_it(tmp_path: Path, lacking: str) -> None:
    if lacking != "everything":
        put(tmp_path / "femnist" / {"train": "test", "test": "train"}[lacking] / "a", leaf({"w": 1}))
    with pytest.raises(
        DataMissing, match=r"has no train/\*\.json and test/\*\.json.*preprocess\.sh -s niid --sf 0\.05"
    ):
        DATASETS["femnist"]().load(tmp_path)


def _without(content: Leaf, key: str) -> object:
    return {name: value for name, value in content.items() if name != key}


def _of_writer(content: Leaf, **values: Any) -> object:
    content["user_data"]["w"] |= values
    return content


DAMAGES: dict[str, tuple[Callable[[Leaf], object], str]] = {
    "another document": (lambda content: [content], "must have users, num_samples and user_data"),
    "no users": (lambda content: _without(content, "users"), "must have users"),
    "no sizes": (lambda content: _without(content, "num_samples"), "must have users"),
    "no data": (lambda content: _without(content, "user_data"), "must have users"),
    "users as text": (lambda content: content | {"users": "w"}, "must be lists"),
    "sizes as a number": (lambda content: content | {"num_samples": 3}, "must be lists"),
    "data as a list": (lambda content: content | {"user_data": []}, "user_data an object"),
    "a writer too many": (lambda content: content | {"users": ["w", "v"]}, "do not name the same writers"),
    "another writer": (lambda content: content | {"users": ["v"]}, "do not name the same writers"),
    "a writer twice": (
        lambda content: content | {"users": ["w", "w"], "num_samples": [3, 3]},
        "do not name the same writers, each once",
    ),
    "no y": (lambda content: content | {"user_data": {"w": {"x": []}}}, "writer w must have lists x and y"),
    "a list for a writer": (lambda content: content | {"user_data": {"w": []}}, "writer w must have lists x and y"),
    "a label too few": (lambda content: _of_writer(content, y=[1, 2]), "3 images and 2 labels, and num_samples says 3"),
    "an image too few": (lambda content: _of_writer(content, x=content["user_data"]["w"]["x"][1:]), "2 images and 3"),
    "another size": (lambda content: content | {"num_samples": [4]}, "num_samples says 4"),
    "a size as text": (lambda content: content | {"num_samples": ["3"]}, "num_samples says 3"),
    "a short image": (lambda content: _of_writer(content, x=[[0.0] * 784] * 2 + [[0.0] * 783]), "not all of 784"),
    "short images": (lambda content: _of_writer(content, x=[[0.0] * 783] * 3), "not all of 784 numbers"),
    "text in images": (lambda content: _of_writer(content, x=[["0"] * 784] * 3), "not all of 784 numbers"),
    "no list of images": (lambda content: _of_writer(content, x=3), "must have lists x and y"),
    "a negative label": (lambda content: _of_writer(content, y=[0, -1, 2]), r"label that is not in 0\.\.61"),
    "a large label": (lambda content: _of_writer(content, y=[0, 62, 2]), r"label that is not in 0\.\.61"),
    "half a label": (lambda content: _of_writer(content, y=[0, 1.5, 2]), r"label that is not in 0\.\.61"),
    "a label as text": (lambda content: _of_writer(content, y=[0, "1", 2]), r"label that is not in 0\.\.61"),
    "a pixel too dark": (lambda content: _of_writer(content, x=[[-1 / 255] * 784] * 3), "pixel that is no multiple"),
    "a pixel too light": (lambda content: _of_writer(content, x=[[256 / 255] * 784] * 3), "pixel that is no multiple"),
    "pixels of 255": (lambda content: _of_writer(content, x=[[255] * 784] * 3), "pixel that is no multiple"),
    "a pixel between": (lambda content: _of_writer(content, x=[[0.5] * 784] * 3), "pixel that is no multiple"),
    "not a number": (lambda content: _of_writer(content, x=[[float("nan")] * 784] * 3), "pixel that is no multiple"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_femnist_names_a_file_that_is_not_leafs(tmp_path: Path, damage: str) -> None:
    change, said = DAMAGES[damage]
    put(tmp_path / "femnist" / "test" / "a", leaf({"w": 3}))
    put(tmp_path / "femnist" / "train" / "good", leaf({"v": 3}))
    file = put(tmp_path / "femnist" / "train" / "bad", change(copy.deepcopy(leaf({"w": 3}))))
    with pytest.raises(DataDamaged, match=rf"^{file}: .*{said}"):
        DATASETS["femnist"]().load(tmp_path)


@pytest.mark.parametrize("ending", PACKERS)
def test_femnist_names_a_file_that_is_cut_short(tmp_path: Path, ending: str) -> None:
    sample(tmp_path, ending)
    file = tmp_path / "femnist" / "test" / f"all_data_2{ending}"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataDamaged, match=rf"^{file}: it cannot be read \(.*\); copy it again"):
        DATASETS["femnist"]().load(tmp_path)


def test_femnist_refuses_a_writer_in_two_files_and_parts_without_a_common_writer(tmp_path: Path) -> None:
    put(tmp_path / "femnist" / "train" / "a", leaf({"w": 1}))
    put(tmp_path / "femnist" / "test" / "a", leaf({"v": 1}))
    with pytest.raises(DataDamaged, match=r"no writer has training images in .*train and test images in .*test"):
        DATASETS["femnist"]().load(tmp_path)
    second = put(tmp_path / "femnist" / "train" / "b", leaf({"w": 1}), ".json.xz")
    with pytest.raises(DataDamaged, match=rf"{second}: writer w is in a\.json as well"):
        DATASETS["femnist"]().load(tmp_path)


def test_a_writer_without_images_in_a_part_is_left_out(tmp_path: Path) -> None:
    put(tmp_path / "femnist" / "train" / "a", leaf({"w": 2, "v": 1}))
    put(tmp_path / "femnist" / "test" / "a", leaf({"w": 0, "v": 1}))
    splits = DATASETS["femnist"]().load(tmp_path)
    assert splits.users is not None and splits.users.tolist() == [0] and len(splits.test_y) == 1


@settings(max_examples=80, deadline=None)
@given(choice=st.data(), ending=st.sampled_from([".json.xz", ".json.gz"]))
def test_of_femnist_with_missing_and_damaged_files_nothing_wrong_is_read(choice: st.DataObject, ending: str) -> None:
    """Whoever lost a file is left out, as LEAF publishes no list of its files; what is there is right, or named.

    Files that are not packed have no checksum: a changed digit in them can be another pixel.
    """
    with TemporaryDirectory() as name:
        root, dataset = sample(Path(name), ending), DATASETS["femnist"]()
        whole = whole_sample()
        files = sorted(root.glob("femnist/*/*"))
        damaged, there = set(), {(part, writer) for part, of in (("train", TRAIN), ("test", TEST)) for writer in of}
        for file in files:
            content = bytearray(file.read_bytes())
            start = choice.draw(st.integers(0, len(content) - 1))
            fate = choice.draw(st.sampled_from(["kept", "kept", "kept", "gone", "cut", "changed"]))
            if fate == "gone":
                file.unlink()
                writers = list(TRAIN if file.parent.name == "train" else TEST)
                there.discard((file.parent.name, writers[int(file.name[len("all_data_")])]))
            elif fate != "kept":
                damaged.add(str(file))
                content[start] ^= choice.draw(st.integers(1, 255))
                file.write_bytes(content[:start] if fate == "cut" else content)
        both = [writer for writer in sorted(TRAIN) if {("train", writer), ("test", writer)} <= there]
        try:
            found = dataset.load(root)
        except DataDamaged as error:
            assert any(file in str(error) for file in damaged) or (not both and "no writer has" in str(error))
        except DataMissing as error:
            assert str(root / "femnist") in str(error)
        else:
            kept = torch.tensor([["f0_9", "f1_5", "f2_1"].index(writer) for writer in both])
            assert whole.users is not None and whole.test_users is not None
            for part, users in (("train", whole.users), ("test", whole.test_users)):
                rows = torch.isin(users, kept)
                for what in ("x", "y"):
                    assert torch.equal(getattr(found, f"{part}_{what}"), getattr(whole, f"{part}_{what}")[rows])


def test_a_run_on_femnist_has_the_writers_as_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writers = {f"f{number:03}_1": 3 for number in range(23)}
    for part in ("train", "test"):
        put(tmp_path / "femnist" / part / "a", leaf(writers, seed=len(part)))
    cell = bench_run(capsys, tmp_path / "runs", "--dataset", "femnist", "--data-root", str(tmp_path))
    assert cell["status"] == "done" and cell["imbalance"] is None and cell["alpha"] is None
    record = json.loads((tmp_path / "runs" / cell["id"] / "run.json").read_text())
    assert record["setting"]["partition"] == "users" and record["setting"]["model"] == "small_cnn"
    assert sum(record["class_counts"]) == 69


@pytest.mark.real
def test_the_real_sample_of_femnist_has_105_writers() -> None:
    root, dataset = Path(os.environ.get("BENCH_DATA", "$BENCH_DATA")), DATASETS["femnist"]()
    try:
        splits = dataset.load(root)
    except DataMissing as missing:
        pytest.skip(str(missing))
    assert splits.train_x.shape == (14_708, 1, 28, 28) and splits.test_x.shape == (1_685, 1, 28, 28)
    assert splits.users is not None and splits.test_users is not None
    assert splits.users.unique().tolist() == splits.test_users.unique().tolist() == list(range(105))
    for labels in (splits.train_y, splits.test_y):
        assert labels.unique().tolist() == list(range(62))
    scaled = splits.train_x.double() / 255
    assert scaled.mean().item() == pytest.approx(dataset.mean[0], abs=5e-5)
    assert scaled.std().item() == pytest.approx(dataset.std[0], abs=5e-5)
    setting = resolve_setting("quick", dataset, {})
    split = make_split(splits.labels, 62, setting, seed=0)
    assert len(split.clients) == 105 and setting.cohort_size(105) == 10
    assert sum(map(len, split.clients)) == 14_708


# SVHN -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write two files in the official form and take them for the official ones."""
    written, checksums = {}, {}
    (tmp_path / "svhn").mkdir()
    for seed, (name, count) in enumerate({"train_32x32.mat": 6, "test_32x32.mat": 3}.items()):
        random = np.random.RandomState(seed)
        x = random.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        y = np.array([10, 1, 9, 10, 2, 3][:count], dtype=np.uint8)[:, None]
        savemat(tmp_path / "svhn" / name, {"X": x, "y": y}, do_compression=True)
        contents = (tmp_path / "svhn" / name).read_bytes()
        written[name], checksums[name] = x, hashlib.md5(contents, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(svhn, "FILES", replace(svhn.FILES, checksums=checksums))
    return written


def test_svhn_is_read_upright_and_ten_is_zero(tiny_svhn: dict[str, Any], tmp_path: Path) -> None:
    dataset = DATASETS["svhn"]()
    splits = dataset.load(tmp_path)
    assert splits.train_y.tolist() == [0, 1, 9, 0, 2, 3] and splits.test_y.tolist() == [0, 1, 9]
    assert splits.train_y.dtype == torch.int64 and splits.train_x.is_contiguous()
    for images, name in ((splits.train_x, "train_32x32.mat"), (splits.test_x, "test_32x32.mat")):
        assert np.array_equal(images.numpy(), tiny_svhn[name].transpose(3, 2, 0, 1))
    labels = dataset.labels(tmp_path)
    assert torch.equal(labels.train, splits.train_y) and torch.equal(labels.test, splits.test_y)
    assert not dataset.flip


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
def test_svhn_names_what_is_missing_or_damaged(tiny_svhn: dict[str, Any], tmp_path: Path, name: str) -> None:
    file = tmp_path / "svhn" / name
    file.write_bytes(file.read_bytes()[:-1])
    for read in (DATASETS["svhn"]().load, DATASETS["svhn"]().labels):
        with pytest.raises(DataDamaged, match=rf"{name} is not the official file"):
            read(tmp_path)
    file.unlink()
    with pytest.raises(DataMissing, match=rf"svhn has no {name}; 'bench data fetch svhn' downloads 246 MB"):
        DATASETS["svhn"]().load(tmp_path)


@pytest.mark.real
def test_the_official_svhn_is_read_whole() -> None:
    dataset = DATASETS["svhn"]()
    try:
        splits = dataset.load(Path(os.environ.get("BENCH_DATA", "$BENCH_DATA")))
    except DataMissing as missing:
        pytest.skip(str(missing))
    assert splits.train_x.shape == (73_257, 3, 32, 32) and splits.test_x.shape == (26_032, 3, 32, 32)
    assert len(splits.train_y.bincount()) == len(splits.test_y.bincount()) == 10
    sample = splits.train_x[::10].double() / 255
    assert sample.mean((0, 2, 3)).tolist() == pytest.approx(dataset.mean, abs=0.005)
    assert sample.std((0, 2, 3)).tolist() == pytest.approx(dataset.std, abs=0.005)


# Arrays -----------------------------------------------------------------------------------------------------


def own(**changes: Any) -> dict[str, Any]:
    """Make a user's arrays: three classes of colour images of 6 x 5 pixels; None leaves one out."""
    random = np.random.RandomState(0)
    made = {
        "train_x": random.randint(0, 256, (30, 6, 5, 3)).astype(np.uint8),
        "train_y": np.arange(30) % 3,
        "test_x": random.randint(0, 256, (9, 6, 5, 3)).astype(np.uint8),
        "test_y": np.arange(9, dtype=np.uint8) % 3,
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def saved(folder: Path, content: dict[str, Any], name: str = "own.npz") -> Dataset:
    """Write a file, and make the dataset of it."""
    np.savez(folder / name, **content)
    return at(folder / name)


def at(path: Path | str) -> Dataset:
    """Make the dataset of a file."""
    dataset: Dataset = DATASETS["arrays"](path=str(path))
    return dataset


@pytest.mark.parametrize(
    ("bring", "channels"),
    [
        (lambda x: x, 3),
        (lambda x: x.transpose(0, 3, 1, 2), 3),
        (lambda x: np.asfortranarray(x), 3),
        (lambda x: x[..., :1], 1),
        (lambda x: x[..., :1].transpose(0, 3, 1, 2), 1),
        (lambda x: x[..., 0], 1),
    ],
    ids=["last", "first", "Fortran", "grey last", "grey first", "grey"],
)
def test_arrays_have_their_channels_found(tmp_path: Path, bring: Callable[[Any], Any], channels: int) -> None:
    content = own()
    expected = content["train_x"].transpose(0, 3, 1, 2)[:, :channels]
    dataset = saved(tmp_path, content | {key: bring(content[key]) for key in ("train_x", "test_x")})
    splits = dataset.load(Path("/nowhere"))
    assert dataset.image_shape == (channels, 6, 5) and dataset.num_classes == 3
    assert isinstance(splits.train_x, torch.Tensor) and splits.train_x.is_contiguous()
    assert np.array_equal(splits.train_x, expected) and splits.test_x.shape == (9, channels, 6, 5)
    assert splits.test_y.tolist() == [0, 1, 2] * 3 and splits.test_y.dtype == torch.int64
    assert dataset.mean == pytest.approx((expected / 255).mean((0, 2, 3)), abs=1e-12)
    assert dataset.std == pytest.approx((expected / 255).std((0, 2, 3)), abs=1e-12)
    assert splits.users is None and dataset.tail == "either"


def test_arrays_number_their_users_alike_in_both_parts(tmp_path: Path) -> None:
    users = {"train_users": np.array([900, -4, 10**12] * 10), "test_users": np.array([10**12, 900, 17] * 3)}
    splits = saved(tmp_path, own(**users)).load(tmp_path)
    assert splits.users is not None and splits.users.tolist() == [2, 0, 3] * 10
    assert splits.test_users is not None and splits.test_users.tolist() == [3, 2, 1] * 3
    splits = saved(tmp_path, own(train_users=users["train_users"]), "train.npz").load(tmp_path)
    assert splits.users is not None and splits.users.tolist() == [1, 0, 2] * 10 and splits.test_users is None


def test_arrays_are_told_by_their_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "else").mkdir()
    first, moved = saved(tmp_path, own()), saved(tmp_path / "else", own())
    other = saved(tmp_path, own(train_y=np.arange(30)[::-1] % 3), "other.npz")
    assert first.identity() == moved.identity() != other.identity()
    assert list(first.identity()) == ["sha256"] and len(first.identity()["sha256"]) == 64
    monkeypatch.chdir(tmp_path)
    near = at("own.npz")
    assert near == first and first.identity() == near.identity()
    np.savez(tmp_path / "own.npz", **own(test_y=np.arange(9)[::-1] % 3))
    os.utime(tmp_path / "own.npz", ns=(1, 1))
    assert near.identity() != moved.identity()
    assert near.load(tmp_path).test_y.tolist() == [2, 1, 0] * 3


def test_arrays_that_are_not_there_are_missing() -> None:
    dataset = at("/nowhere/own.npz")
    asked: list[Callable[[], object]] = [
        lambda: dataset.load(Path()),
        lambda: dataset.num_classes,
        lambda: dataset.mean,
        dataset.identity,
    ]
    for ask in asked:
        with pytest.raises(DataMissing, match=r"arrays: /nowhere/own\.npz is not there; .*arrays\(path='...'\)"):
            ask()


def _x(shape: tuple[int, ...], test: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Make images of a shape for both parts, and labels for them."""
    test = shape if test is None else test
    return own(
        train_x=np.zeros(shape, np.uint8),
        test_x=np.zeros(test, np.uint8),
        train_y=np.arange(shape[0]) % 3,
        test_y=np.arange(test[0]) % 3,
    )


REFUSALS = {
    "nothing of ours": (
        {"x": np.zeros(3)},
        r"it has no train_x, test_x, train_y, test_y; train_x, test_x, .* are needed",
    ),
    "no test labels": (own(test_y=None), "it has no test_y"),
    "a misspelt name": (
        own(train_user=np.arange(30)),
        "it has train_user; besides .*, only train_users, test_users may",
    ),
    "objects": (own(train_y=np.array([None] * 30)), "train_y holds Python objects, which are not read"),
    "floating pixels": (
        own(train_x=np.zeros((30, 6, 5, 3))),
        "train_x is of type float64 and test_x of uint8; both must be pixels, uint8, or floating numbers",
    ),
    "whole numbers": (
        own(train_x=np.zeros((30, 6), int), test_x=np.zeros((9, 6), int)),
        "train_x is of type int64; pixels must be uint8, 0 to 255, and all else floating numbers",
    ),
    "flat images": (_x((30, 784)), r"train_x is of shape \(30, 784\)"),
    "no image": (_x((0, 6, 5)), r"train_x is of shape \(0, 6, 5\)"),
    "four channels": (_x((30, 6, 5, 4)), r"train_x has images of \(6, 5, 4\), where neither the first nor the last"),
    "two readings": (_x((30, 3, 5, 3)), r"\(3, 5, 3\), where the first and the last could be channels"),
    "one or three": (_x((30, 1, 5, 3)), "where the first and the last could be channels"),
    "other test images": (_x((30, 6, 5), (9, 5, 6)), r"train_x has examples of \(1, 6, 5\) and test_x of \(1, 5, 6\)"),
    "labels too few": (own(train_y=np.arange(29) % 3), r"train_y is of .* shape \(29,\); 30 whole numbers are wanted"),
    "labels as columns": (own(test_y=np.eye(9, 3, dtype=int)), r"test_y is .* \(9, 3\); 9 whole numbers"),
    "floating labels": (own(train_y=np.arange(30) % 3 * 1.0), "train_y is of type float64"),
    "a negative label": (own(train_y=np.arange(30) % 3 - 1), r"train_y has labels from -1 to 1; it must be 0\.\.1"),
    "a class untrained": (
        own(train_y=np.arange(30) % 2 * 2),
        "train_y has no example of class 1; both parts need every",
    ),
    "a class untested": (own(test_y=np.arange(9) % 2), "test_y has no example of class 2"),
    "a class only tested": (own(test_y=np.arange(9) % 4), r"test_y has labels from 0 to 3; it must be 0\.\.2, as in"),
    "users too few": (own(train_users=np.arange(3)), r"train_users is .*; 30 whole numbers are wanted"),
    "users by name": (own(train_users=np.array(["a"] * 30)), "train_users is of type <U1"),
    "only test users": (own(test_users=np.arange(9)), "it has test_users and no train_users"),
    "a constant channel": (own(train_x=own()["train_x"] * np.array([1, 0, 1], np.uint8)), "all pixels are equal"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_arrays_say_what_is_wrong_with_them(tmp_path: Path, wrong: str) -> None:
    content, said = REFUSALS[wrong]
    dataset = saved(tmp_path, content)
    with pytest.raises(DataDamaged, match=rf"^{tmp_path / 'own.npz'}: .*{said}") as caught:
        dataset.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"x", mtime=0)])
def test_arrays_in_another_format_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.npz").write_bytes(content)
    dataset = at(tmp_path / "own.npz")
    with pytest.raises(DataDamaged, match=r"own\.npz: it is no whole npz file"):
        dataset.load(tmp_path)
    np.save(tmp_path / "own.npy", np.zeros(3))
    (tmp_path / "own.npy").rename(tmp_path / "own.npz")
    with pytest.raises(DataDamaged, match=r"own\.npz: it is no whole npz file"):
        dataset.load(tmp_path)


def test_arrays_never_unpickle(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    with pytest.raises(DataDamaged, match="train_y holds Python objects, which are not read, as they can run code"):
        saved(tmp_path, own(train_y=np.array([Evil()], dtype=object))).load(tmp_path)
    assert not (tmp_path / "opened").exists()


@settings(max_examples=80, deadline=None)
@given(choice=st.data())
def test_damaged_arrays_are_named_or_what_they_were(choice: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = saved(folder, own(train_users=np.arange(30) % 4), "whole.npz").load(folder)
        content = bytearray((folder / "whole.npz").read_bytes())
        start = choice.draw(st.integers(0, len(content) - 1))
        if choice.draw(st.booleans()):
            content = content[:start]
        else:
            content[start : start + 8] = choice.draw(st.binary(min_size=1, max_size=8))
        (folder / "own.npz").write_bytes(content)
        try:
            found = at(folder / "own.npz").load(folder)
        except DataDamaged as error:
            assert "own.npz" in str(error)
        else:
            assert same(found, whole)


def test_a_run_on_arrays_keeps_their_tail_or_cuts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = DATASETS["digits"]().load(Path())
    users = np.arange(len(digits.train_y)) % 4
    saved(tmp_path, {"train_x": digits.train_x.numpy()[:, 0], "train_y": digits.train_y.numpy(),
                     "test_x": digits.test_x.numpy()[:, 0], "test_y": digits.test_y.numpy(),
                     "train_users": users})  # fmt: skip
    call = f"arrays(path='{tmp_path / 'own.npz'}')"
    natural = bench_run(capsys, tmp_path / "runs", "--dataset", call)
    cut = bench_run(capsys, tmp_path / "runs", "--dataset", call, "--imbalance", "10")
    mine = bench_run(capsys, tmp_path / "runs", "--dataset", call, "--partition", "users", "--clients", "4")
    assert [cell["imbalance"] for cell in (natural, cut, mine)] == [None, 10, None]
    counts = [
        sum(json.loads((tmp_path / "runs" / cell["id"] / "run.json").read_text())["class_counts"])
        for cell in (natural, cut, mine)
    ]
    assert counts == [1297, 503, 1297]
