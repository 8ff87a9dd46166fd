"""Data files and datasets, `bench data`, batches of images, keyed randomness, and trees."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import DataDamaged, DataMissing, Dataset, LocalData, Splits, Uploads, keys, tree
from bench.command.data import data_command
from bench.data import Images
from bench.files import data_root
from bench.files.official import Official, agrees, read_idx, unpickle
from bench.plugins.registry import DATASETS
from bench.protocol.bundles import SETTINGS
from bench.protocol.settings import BadConfig
from bench.system import durable, reading

# Files ------------------------------------------------------------------------------------------------------


def md5(contents: bytes) -> str:
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.put(tmp_path / "file", b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.put(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_the_data_root_is_the_option_then_the_variable_then_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_root(tmp_path) == tmp_path
    assert data_root() == tmp_path / "variable"
    monkeypatch.delenv("BENCH_DATA")
    assert data_root() == tmp_path / "cache" / "bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "bench"


@pytest.fixture
def official(tmp_path: Path) -> Official:
    """Make a dataset of two small files under `tmp_path`."""
    contents = {"one": b"1" * 10, "two": b"2" * 10}
    (tmp_path / "folder").mkdir()
    for name, content in contents.items():
        (tmp_path / "folder" / name).write_bytes(content)
    return Official(
        name="toy",
        folder="folder",
        checksums={name: md5(content) for name, content in contents.items()},
        size="20 B",
        by_hand="draw them in {root}",
    )


def test_a_missing_file_is_named_with_what_to_fetch_and_where_to_put_it(official: Official, tmp_path: Path) -> None:
    (tmp_path / "folder" / "two").unlink()
    with pytest.raises(DataMissing) as caught:
        official.read(tmp_path, "one")
    said = str(caught.value)
    for part in (
        f"{tmp_path / 'folder'} has no two;",
        "'bench data fetch toy'",
        "20 B",
        f"draw them in {tmp_path}",
    ):
        assert part in said


def test_a_changed_file_is_named_with_what_to_do(official: Official, tmp_path: Path) -> None:
    assert official.read(tmp_path, "two") == b"2" * 10
    (tmp_path / "folder" / "two").write_bytes(b"2" * 9 + b"3")
    with pytest.raises(DataDamaged, match=r"two .* delete it and run 'bench data fetch toy' again"):
        official.read(tmp_path, "two")
    assert official.read(tmp_path, "one") == b"1" * 10


def test_a_packed_file_is_as_good_as_the_unpacked_one(official: Official, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "one"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name("one.gz").write_bytes(packed)
    assert official.read(tmp_path, "one") == b"1" * 10
    for damaged in (packed[:-6], b"no gzip", packed[:12] + b"\xff" * 6 + packed[18:]):
        path.with_name("one.gz").write_bytes(damaged)
        with pytest.raises(DataDamaged, match=r"one\.gz .* delete it"):
            official.read(tmp_path, "one")


def test_an_idx_file_is_read_in_its_own_shape() -> None:
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (2, 2, 3))
    assert read_idx(header + bytes(range(12))).tolist() == torch.arange(12).view(2, 2, 3).tolist()


# Datasets ---------------------------------------------------------------------------------------------------


def test_every_dataset_says_what_it_is() -> None:
    for name in ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "femnist"):
        dataset = DATASETS[name]()
        assert len(dataset.mean) == len(dataset.std) == dataset.image_shape[0]
        assert dataset.size and dataset.licence and dataset.citation and dataset.source
        assert dataset == DATASETS[name]()


def test_digits_has_fifty_test_images_of_each_class_and_wastes_none() -> None:
    digits = DATASETS["digits"]()
    splits = digits.load(Path("/nowhere"))
    assert splits.test_y.bincount().tolist() == [50] * 10
    assert splits.train_y.bincount().tolist() == [128, 132, 127, 133, 131, 132, 131, 129, 124, 130]
    assert splits.train_x.shape == (1297, 1, 8, 8) and splits.train_x.dtype == torch.uint8
    assert int(splits.train_x.max()) == 16 == digits.scale
    assert float(splits.train_x.double().mean() / 16) == pytest.approx(digits.mean[0], abs=5e-4)
    assert float(splits.train_x.double().std() / 16) == pytest.approx(digits.std[0], abs=5e-4)
    labels = digits.labels(Path("/nowhere"))
    assert torch.equal(labels.train, splits.train_y) and torch.equal(labels.test, splits.test_y)


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write files in CIFAR's form, two images each, and take them for the official ones."""
    for module, key in (("cifar10", "labels"), ("cifar100", "fine_labels")):
        loader = importlib.import_module(f"bench.datasets.{module}")
        checksums = {}
        (tmp_path / loader.FILES.folder).mkdir()
        for number, name in enumerate(loader.FILES.checksums):
            pixels = np.full((2, 3072), number, dtype=np.uint8)
            pixels[:, 1024:2048] += 100  # the green plane
            contents = pickle.dumps({"data": pixels, key: [number, 9]}, protocol=4)
            (tmp_path / loader.FILES.folder / name).write_bytes(contents)
            checksums[name] = md5(contents)
        monkeypatch.setattr(loader, "FILES", replace(loader.FILES, checksums=checksums))
    return tmp_path


@pytest.mark.parametrize(("name", "train"), [("cifar10", [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]), ("cifar100", [0, 9])])
def test_cifar_is_read_in_the_official_order(tiny_cifar: Path, name: str, train: list[int]) -> None:
    dataset = DATASETS[name]()
    splits = dataset.load(tiny_cifar)
    assert splits.train_y.tolist() == train
    assert splits.test_y.tolist() == [len(train) // 2, 9]
    assert splits.train_x.shape == (len(train), 3, 32, 32)
    assert splits.train_x[-1, :, 5, 7].tolist() == [
        len(train) // 2 - 1,
        len(train) // 2 + 99,
        len(train) // 2 - 1,
    ]
    labels = dataset.labels(tiny_cifar)
    assert torch.equal(labels.train, splits.train_y) and torch.equal(labels.test, splits.test_y)


def test_a_damaged_pickle_is_never_opened(tiny_cifar: Path) -> None:
    path = tiny_cifar / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(f"cos\nsystem\n(S'touch {tiny_cifar}/opened'\ntR.".encode())
    with pytest.raises(DataDamaged, match="data_batch_3"):
        DATASETS["cifar10"]().labels(tiny_cifar)
    assert not (tiny_cifar / "opened").exists()


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, does: Any, *given: Any) -> None:
        self.does = does, given

    def __reduce__(self) -> Any:
        return self.does


@pytest.mark.parametrize(
    ("does", "given"),
    [
        (os.mkdir, ("{folder}",)),
        (eval, ("__import__('os').mkdir('{folder}')",)),
        (getattr, (object, "__subclasses__")),
        (np.load, ("{folder}",)),
        (np.ndarray.tofile, (np.zeros(3), "{folder}")),
        (bytearray, (10**13,)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_batch_that_names_more_than_numbers_is_not_read(
    does: Any, given: tuple[Any, ...], protocol: int, tmp_path: Path
) -> None:
    """Even one with the right checksum."""
    given = tuple(one.format(folder=tmp_path / "opened") if isinstance(one, str) else one for one in given)
    content = pickle.dumps({"labels": [1], "data": Evil(does, *given)}, protocol=protocol)
    with pytest.raises(DataDamaged, match=r"a batch of CIFAR cannot be read \(it names .*, which no batch has\);"):
        unpickle(content)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"cos\nsystem\n(S'true'\ntR.", b"]" * 10 + b".", b"N."])
def test_what_is_no_batch_is_said(content: bytes) -> None:
    with pytest.raises(DataDamaged, match="a batch of CIFAR cannot be read"):
        unpickle(content)


def test_checksums_are_of_two_kinds() -> None:
    assert agrees(b"x", md5(b"x")) and not agrees(b"y", md5(b"x"))
    sha = hashlib.sha256(b"x").hexdigest()
    assert agrees(b"x", sha) and not agrees(b"y", sha) and not agrees(b"x", sha[:32])
    for name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
        sums = importlib.import_module(f"bench.datasets.{name}").FILES.checksums.values()
        assert {len(each) for each in sums} == {64} and len(set(sums)) == len(sums)


def test_a_packed_bomb_is_refused_before_it_is_unpacked(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SMALL", 10**6)
    path = tmp_path / "folder" / "one"
    path.unlink()
    path.with_name("one.gz").write_bytes(gzip.compress(bytes(10**6 + 1)))
    with pytest.raises(DataDamaged, match=r"one\.gz cannot be read \(more than 1,000,000 bytes would come out of it\)"):
        official.read(tmp_path, "one")
    path.with_name("one.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(DataDamaged, match="its checksum is wrong"):
        official.read(tmp_path, "one")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "mnist", "svhn"])
def test_a_dataset_that_is_not_there_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    for read in (DATASETS[name]().load, DATASETS[name]().labels):
        with pytest.raises(DataMissing, match=rf"^{name}: .* 'bench data fetch {name}' downloads \d+ MB"):
            read(tmp_path)


# The official files -----------------------------------------------------------------------------------------


def read_or_skip(name: str) -> Splits:
    """Load an official dataset from $BENCH_DATA, or skip and name the file that is missing."""
    try:
        splits: Splits = DATASETS[name]().load(Path(os.environ.get("BENCH_DATA", "$BENCH_DATA")))
        return splits
    except DataMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("cifar10", 50_000, 10_000),
        ("cifar100", 50_000, 10_000),
        ("fashion_mnist", 60_000, 10_000),
    ],
)
def test_the_official_files_are_read_whole(name: str, train: int, test: int) -> None:
    splits, dataset = read_or_skip(name), DATASETS[name]()
    assert splits.train_x.shape == (train, *dataset.image_shape)
    assert splits.test_x.shape == (test, *dataset.image_shape)
    assert splits.train_x.dtype == splits.test_x.dtype == torch.uint8
    for labels, images in ((splits.train_y, train), (splits.test_y, test)):
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [images // dataset.num_classes] * dataset.num_classes
    sample = splits.train_x[torch.arange(0, train, 10)].double() / dataset.scale
    assert sample.mean((0, 2, 3)).tolist() == pytest.approx(dataset.mean, abs=0.005)
    assert sample.std((0, 2, 3)).tolist() == pytest.approx(dataset.std, abs=0.005)


@pytest.mark.real
def test_the_command_reproduces_the_fedloge_clients() -> None:
    read_or_skip("cifar10")
    options = "--imbalance 50 --alpha 0.5 --clients 40 --partition fedloge --seed 3407 --json"
    document = json.loads(invoke("stats", "cifar10", *options.split()))
    assert [client["train"] for client in document["clients"]][:6] == [226, 200, 143, 400, 329, 90]
    assert sum(document["class_counts"]) == 13_996


# The command ------------------------------------------------------------------------------------------------


def invoke(*words: str, typed: str | None = None) -> str:
    """Run `bench data` and give its standard output; errors are raised."""
    result = CliRunner().invoke(data_command, words, input=typed, catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_the_command_is_there_before_torch_is() -> None:
    heavy = "sorted({'torch', 'numpy', 'rich', 'matplotlib', 'sklearn'} & set(sys.modules))"
    asked = [sys.executable, "-c", f"import sys, bench.command.data; print({heavy})"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_stats_prints_one_document_of_the_split() -> None:
    document = json.loads(invoke("stats", "digits", "--clients", "5", "--imbalance", "0.1", "--json"))
    assert list(document)[3:] == ["users", "left_out", "heterogeneity", "fingerprint"]
    assert document["class_counts"] == [124, 96, 74, 57, 44, 34, 26, 20, 16, 12]
    assert len(document["clients"]) == 5
    assert sum(client["train"] for client in document["clients"]) == 503
    assert set(document["clients"][0]) == {"train", "test", "classes"}


def test_stats_draws_a_table_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "split.png"
    said = invoke("stats", "digits", "--clients", "70", "--partition", "iid", "--out", str(picture))
    for part in ("digits, exponential imbalance 10, 70 clients by iid", "503 training images", "and 10 more"):
        assert part in said
    assert "█" in said and "fingerprint" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_stats_fits_a_hundred_classes_in_a_narrow_terminal() -> None:
    from bench.command.picture import bars, strips

    table = np.arange(300).reshape(3, 100)
    assert {len(line) for line in strips(table, 40)} == {34}
    assert {len(line) for line in bars(table[0] + 1, 40)} == {34}
    assert strips(np.array([[4, 0]]), 40) == ["██  "]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("stats", "digitz"), LookupError),
        (("stats", "digits", "--setting", "quik"), BadConfig),
        (("stats", "digits", "--clients", "0"), BadConfig),
        (("stats", "digits", "--partition", "dirichlt"), BadConfig),
        (("stats", "digits", "--profile", "linear"), BadConfig),
        (("stats", "digits", "--imbalance", "-1"), BadConfig),
        (("check", "cifar10", "--data-root", "/nowhere"), DataMissing),
    ],
)
def test_what_is_wrong_with_the_command_reaches_its_caller(words: tuple[str, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        invoke(*words)


def test_a_picture_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    import click

    (tmp_path / "file").touch()
    for out in ("file/split.png", "split.foo"):
        with pytest.raises(click.BadParameter, match="cannot be drawn"):
            invoke("stats", "digits", "--json", "--out", str(tmp_path / out))


@dataclass(frozen=True, kw_only=True)
class Toy(Dataset):
    """Two classes of one pixel, read from a file that `fetch` writes."""

    num_classes: ClassVar[int] = 2
    image_shape: ClassVar[tuple[int, int, int]] = (1, 1, 1)
    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.5,)
    size: ClassVar[str] = "1 B"
    source: ClassVar[str] = "the test"

    def load(self, root: Path) -> Splits:
        if not (root / "toy").exists():
            raise DataMissing("toy is not there")
        last = int((root / "toy").read_text())
        x, y = torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, last])
        return Splits(x, y, x, y)

    def fetch(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        (root / "toy").write_text("1")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enter `Toy` for one test."""
    monkeypatch.setitem(DATASETS._classes, "toy", Toy)
    yield


@pytest.mark.usefixtures("toy")
def test_fetch_says_the_size_asks_nobody_who_is_not_there_and_downloads_once(tmp_path: Path) -> None:
    where = ("--data-root", str(tmp_path))
    refused = CliRunner().invoke(data_command, ["fetch", "toy", *where])
    assert refused.exit_code == 2
    assert "download 1 B from the test" in refused.stderr and "use --yes" in refused.stderr
    assert not (tmp_path / "toy").exists()
    assert "2 training and 2 test images of 1 x 1 x 1, 2 classes" in invoke("fetch", "toy", "--yes", *where)
    assert invoke("fetch", "toy", *where).startswith("already there")


@pytest.mark.usefixtures("toy")
def test_check_finds_labels_that_do_not_fit_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("7")
    with pytest.raises(DataDamaged, match="training part: 2 classes, 0 to 7; there must be 2 from 0"):
        invoke("check", "toy", "--data-root", str(tmp_path))


def test_settings_name_partitions_that_exist() -> None:
    from bench.splits.split import PARTITIONS

    for make in SETTINGS.values():
        assert make(DATASETS["digits"]()).partition in PARTITIONS


# Images -----------------------------------------------------------------------------------------------------

SIDE, PAD = 6, 4


def images(augment: str, mean: float = 0.25) -> Images:
    """Make three images of two channels whose 72 pixels all differ, 1..72."""
    x = torch.arange(1, 1 + 2 * SIDE * SIDE, dtype=torch.uint8).view(1, 2, SIDE, SIDE).repeat(3, 1, 1, 1)
    x[1] += 72
    x[2] += 144
    return Images(x, torch.tensor([0, 1, 2]), (mean, 0.5), (0.5, 0.25), augment)


def pixels(normalised: Tensor, mean: float = 0.25) -> Tensor:
    """Undo the normalisation: whole pixel values."""
    offset, factor = torch.tensor([mean, 0.5])[:, None, None], torch.tensor([0.5, 0.25])[:, None, None]
    return ((normalised * factor + offset) * 255).round().to(torch.int64)


def windows(source: Images, row: int, colour: Tensor) -> list[Tensor]:
    """Cut all 81 windows out of an image padded with a colour per channel."""
    padded = colour[:, None, None].repeat(1, SIDE + 2 * PAD, SIDE + 2 * PAD)
    padded[:, PAD:-PAD, PAD:-PAD] = pixels(source.plain(torch.tensor([row])))[0]
    return [padded[:, i : i + SIDE, j : j + SIDE] for i in range(2 * PAD + 1) for j in range(2 * PAD + 1)]


BLACK = torch.zeros(2, dtype=torch.int64)


def test_plain_images_are_normalised_and_in_order() -> None:
    for augment in ("none", "crop_flip"):
        plain = images(augment).plain(torch.tensor([2, 0]))
        assert plain.shape == (2, 2, SIDE, SIDE) and plain.dtype == torch.float32
        assert plain[1, 0, 0, 0].item() == pytest.approx((1 / 255 - 0.25) / 0.5)
        assert plain[0, 1, 5, 5].item() == pytest.approx((216 / 255 - 0.5) / 0.25)


def test_no_augmentation_is_the_identity() -> None:
    rows = torch.tensor([1, 1, 0])
    drawn = images("none").augmented(rows, keys.key(0), torch.arange(3))
    assert torch.equal(drawn, images("none").plain(rows))


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_a_crop_is_a_window_of_the_padded_image_and_a_flip_its_mirror(augment: str) -> None:
    source = images(augment)
    rows = torch.arange(3).repeat(100)
    drawn = pixels(source.augmented(rows, keys.key(5), torch.arange(300)))
    assert drawn.shape == (300, 2, SIDE, SIDE)
    found = set()
    for row, image in zip(rows.tolist(), drawn, strict=True):
        every = windows(source, row, BLACK)
        straight = [number for number, window in enumerate(every) if torch.equal(window, image)]
        mirrored = [number for number, window in enumerate(every) if torch.equal(window.flip(2), image)]
        assert straight or (mirrored and augment == "crop_flip")
        found.add((bool(straight), (straight or mirrored)[0]))
    assert len({number for _, number in found}) > 70  # of 81
    assert {straight for straight, _ in found} == ({True} if augment == "crop" else {True, False})


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_an_image_is_drawn_alike_whatever_batch_it_sits_in(augment: str) -> None:
    source, key = images(augment), keys.key(1)
    rows, example = torch.tensor([0, 1, 2, 1]), torch.tensor([4, 17, 3, 9])
    whole = source.augmented(rows, key, example)
    for position in range(4):
        alone = source.augmented(rows[position, None], key, example[position, None])
        assert torch.equal(alone[0], whole[position])
    assert torch.equal(source.augmented(rows.flip(0), key, example.flip(0)), whole.flip(0))
    assert not torch.equal(source.augmented(rows, keys.key(2), example), whole)


def test_batch_augmentation_draws_once_and_pads_with_the_mean_colour() -> None:
    source, seen = images("batch_crop_flip"), set()
    colour = torch.tensor([64, 128])  # 0.25 and 0.5 of 255, rounded
    for seed in range(40):
        drawn = pixels(source.augmented(torch.tensor([0, 1, 2]), keys.key(seed), torch.tensor([8, 1, 5])))
        draws = []
        for row in range(3):
            every = windows(source, row, colour)
            fits = [(0, n) for n, window in enumerate(every) if torch.equal(window, drawn[row])]
            fits += [(1, n) for n, window in enumerate(every) if torch.equal(window.flip(2), drawn[row])]
            draws.append(fits[0])
        assert draws[0] == draws[1] == draws[2]
        seen.add(draws[0])
    assert len(seen) > 25


def local(rows: list[int], n: int, augment: str = "none") -> LocalData:
    index = torch.tensor(rows)
    return LocalData(
        images=images(augment),
        index=index,
        n=torch.tensor(n),
        key=keys.key(3),
        class_counts=torch.tensor([1, 1, 1]),
        batch_size=2,
    )


def test_an_epoch_has_every_example_once_and_a_padded_client_sees_the_same_batches() -> None:
    short, padded = local([0, 1, 2], 3, "crop_flip"), local([0, 1, 2, 2, 2, 2], 3, "crop_flip")
    batches = list(short.batches(2))
    assert [len(batch.y) for batch in batches] == [2, 1, 2, 1]
    assert sorted(torch.cat([batch.y for batch in batches[:2]]).tolist()) == [0, 1, 2]
    assert short.steps(2) == 4 and short.meter.epochs == 2
    real = [batch for batch in padded.batches(2) if batch.weight.any()]
    for mine, theirs in zip(batches, real, strict=True):
        kept = theirs.weight == 1
        assert torch.equal(mine.x, theirs.x[kept]) and torch.equal(mine.y, theirs.y[kept])


def test_batches_repeat_for_a_salt_and_differ_between_salts() -> None:
    data = local([0, 1, 2] * 5, 15)
    orders = [[batch.y.tolist() for batch in data.batches(1, salt)] for salt in ("", "", "other")]
    assert orders[0] == orders[1] != orders[2]


def test_uploads_are_averaged_by_size_or_by_class() -> None:
    uploads = Uploads([{"head": {"weight": torch.tensor(w)}} for w in ([1.0, 10.0], [4.0, 40.0])], torch.tensor([1, 2]))
    assert uploads.mean()["head"]["weight"].tolist() == [3.0, 30.0]
    by_class = uploads.mean("head", torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert by_class["weight"].tolist() == [2.5, 25.0]  # nobody: the plain mean


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 4, 3), (10, 0), (0, 3)])
def test_rows_are_averaged_some_at_a_time_to_the_same_bits(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    leaves, weights = torch.randn(7, *shape, generator=draw), torch.rand(7, shape[0], generator=draw) + 0.1
    shares = (weights.double() / weights.double().sum(0)).reshape(7, shape[0], *[1] * (len(shape) - 1))
    monkeypatch.setattr("bench.data.uploads._ENTRIES", 24)  # not all rows, and not the same number each time
    uploads = Uploads([{"g": leaf} for leaf in leaves], torch.ones(7))
    expected = (leaves.double() * shares).sum(0).float()
    assert torch.equal(uploads.mean("g", weights), expected)


# Keys -------------------------------------------------------------------------------------------------------


def test_bits_are_those_of_splitmix64() -> None:
    # The generator's first outputs from state 0, as published with its reference code.
    drawn = [value & (2**64 - 1) for value in keys.bits(torch.tensor(0), 3).tolist()]
    assert drawn == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_keyed_draws_never_change_silently() -> None:
    key = keys.key(3407)
    assert key.item() == -4085736569870517865
    assert keys.fold(key, "client", 5, torch.tensor(2)).item() == 41938786507674441
    assert keys.uniform(key, 2).tolist() == [0.5082693099975586, 0.6441563367843628]
    assert keys.normal(key, 3).tolist() == pytest.approx([1.16016567, -0.42944860, 0.37945917], abs=1e-6)
    assert keys.integers(key, 100, 6).tolist() == [61, 29, 51, 33, 76, 95]
    assert keys.permutation(key, 8).tolist() == [5, 4, 7, 0, 1, 6, 2, 3]
    assert keys.choice(key, 50, 4).tolist() == [5, 9, 23, 48]


def test_folding_depends_on_every_datum_and_their_order() -> None:
    key = keys.key(0)
    folded = [
        keys.fold(key, *data).item()
        for data in (("a",), ("b",), ("a", 1), ("a", 2), (1, "a"), (1,), (2,), (0,), (-1,), ())
    ]
    assert len(set(folded)) == len(folded)
    assert keys.fold(key, "a", 1).item() == keys.fold(keys.fold(key, "a"), 1).item()
    many = keys.fold(key, torch.arange(4))
    assert many.tolist() == [keys.fold(key, number).item() for number in range(4)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 40))
def test_a_padded_permutation_extends_the_unpadded_one(seed: int, n: int, padding: int) -> None:
    key = keys.key(seed)
    short, long = keys.permutation(key, n), keys.permutation(key, n + padding, n)
    assert sorted(short.tolist()) == list(range(n))
    assert long.tolist() == [*short.tolist(), *range(n, n + padding)]


def test_uniform_and_normal_draws_have_their_moments() -> None:
    n = 200_000  # standard errors: 0.0006 for the uniform mean, 0.0022 for the normal one
    uniform, normal = keys.uniform(keys.key(1), n).double(), keys.normal(keys.key(1), n).double()
    assert float(uniform.mean()) == pytest.approx(1 / 2, abs=0.004)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.002)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert float(torch.corrcoef(torch.stack([uniform[1:], uniform[:-1]]))[0, 1]) == pytest.approx(0, abs=0.015)
    assert float(normal.mean()) == pytest.approx(0, abs=0.015)
    assert float(normal.var()) == pytest.approx(1, abs=0.02)
    assert float((normal**4).mean()) == pytest.approx(3, abs=0.15)


def test_every_position_of_a_permutation_is_equally_likely() -> None:
    firsts = torch.stack([keys.permutation(keys.fold(keys.key(0), trial), 5) for trial in range(2000)])
    for position in range(5):
        seen = torch.bincount(firsts[:, position], minlength=5)
        assert ((seen - 400).abs() < 90).all()  # five standard deviations


def test_keys_are_the_same_stacked_and_alone() -> None:
    many = keys.fold(keys.key(0), torch.arange(3))
    stacked = torch.func.vmap(lambda key: keys.permutation(keys.fold(key, "order"), 6))(many)
    for row, key in zip(stacked, many, strict=True):
        assert torch.equal(row, keys.permutation(keys.fold(key, "order"), 6))


# Trees ------------------------------------------------------------------------------------------------------


def model(scale: float = 1.0) -> tree.Tree:
    weight = scale * torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    return {
        "body": {"w": weight, "stats": {"mean": torch.tensor([5.0 * scale])}},
        "head": {"b": torch.zeros(2)},
    }


def same(a: tree.Tree, b: tree.Tree) -> bool:
    left, right = tree.flatten(a), tree.flatten(b)
    return list(left) == list(right) and all(torch.equal(left[path], right[path]) for path in left)


def test_flattening_is_undone() -> None:
    assert list(tree.flatten(model())) == ["body/w", "body/stats/mean", "head/b"]
    assert same(tree.unflatten(tree.flatten(model())), model())


def test_arithmetic_is_that_computed_by_hand() -> None:
    assert same(tree.add(model(), model(), 2.0), model(3.0))
    assert same(tree.sub(model(3.0), model()), model(2.0))
    assert same(tree.scale(model(), 4.0), model(4.0))
    assert same(tree.zeros_like(model()), model(0.0))
    assert tree.dot(model(), model()).item() == 1 + 4 + 9 + 16 + 25
    assert tree.nbytes(model()) == 7 * 4


def test_merging_replaces_and_keeps() -> None:
    merged = tree.merge(model(), {"head": {"b": torch.ones(2)}, "new": {"x": torch.ones(1)}})
    assert list(tree.flatten(merged)) == ["body/w", "body/stats/mean", "head/b", "new/x"]
    assert tree.flatten(merged)["head/b"].tolist() == [1, 1]
    assert tree.flatten(model())["head/b"].tolist() == [0, 0]


def test_statistics_are_told_from_parameters() -> None:
    assert list(tree.flatten(tree.parameters(model()))) == ["body/w", "head/b"]
    chosen, others = tree.split(model(), tree.is_statistic)
    assert list(tree.flatten(chosen)) == ["body/stats/mean"]
    assert same(tree.merge(others, chosen), {"body": model()["body"], "head": model()["head"]})


def test_stacking_is_undone() -> None:
    stacked = tree.stack([model(), model(2.0)])
    assert tree.flatten(stacked)["body/w"].shape == (2, 2, 2)
    assert all(map(same, tree.unstack(stacked), [model(), model(2.0)]))
    assert same(tree.pick(stacked, 1), model(2.0))


def test_a_clone_has_memory_of_its_own() -> None:
    first = model()
    assert tree.same_memory(first, first) and not tree.same_memory(first, tree.clone(first))


def test_a_digest_sees_every_bit_and_name() -> None:
    base = {"a": torch.tensor([1.0, 2.0])}
    others: list[dict[str, Any]] = [
        {"a": torch.tensor([1.0, 2.0000002])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},  # the same bytes
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, -2.0])},
    ]
    digests = {tree.digest([other]) for other in [base, *others]}
    assert len(digests) == 6 and all(len(digest) == 64 for digest in digests)
    order = {"y": torch.zeros(1), "x": torch.ones(1)}
    assert tree.digest([order]) == tree.digest([{"x": torch.ones(1), "y": torch.zeros(1)}])


def test_a_tree_that_is_no_longer_finite_is_found_out() -> None:
    assert tree.is_finite(model())
    for bad in (float("inf"), float("nan")):
        assert not tree.is_finite(tree.merge(model(), {"head": {"b": torch.tensor([0.0, bad])}}))
    assert tree.is_finite({"steps": torch.tensor([2**60])})
