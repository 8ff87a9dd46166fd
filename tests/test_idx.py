"""MNIST and EMNIST, read from their official idx files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import DataDamaged, DataMissing, Dataset
from bench.files.download import Remote
from bench.plugins.registry import DATASETS
from tests import trees

mnist = import_module("bench.datasets.mnist")
emnist = import_module("bench.datasets.emnist")


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# MNIST ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_in_the_official_order(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {
        name: np.random.default_rng(seed).integers(0, 10, (3, 28, 28)[: 1 if "labels" in name else 3], dtype=np.uint8)
        for seed, name in enumerate(mnist.FILES.checksums)
    }
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, values in written.items():
        content = trees.idx(values)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    checksums = {name: md5(trees.idx(values)) for name, values in written.items()}
    monkeypatch.setattr(mnist, "FILES", replace(mnist.FILES, checksums=checksums))
    splits, labels = DATASETS["mnist"]().load(tmp_path), DATASETS["mnist"]().labels(tmp_path)
    read = (splits.train_x[:, 0], splits.train_y, splits.test_x[:, 0], splits.test_y)
    for values, found in zip(written.values(), read, strict=True):
        assert np.array_equal(values, found)
    assert splits.train_x.shape == (3, 1, 28, 28) and splits.train_y.dtype == torch.int64
    assert not DATASETS["mnist"]().flip
    assert torch.equal(labels.train, splits.train_y) and torch.equal(labels.test, splits.test_y)


@pytest.mark.real
def test_the_official_mnist_is_read_whole() -> None:
    dataset = DATASETS["mnist"]()
    try:
        splits = dataset.load(Path(os.environ.get("BENCH_DATA", "$BENCH_DATA")))
    except DataMissing as missing:
        pytest.skip(str(missing))
    assert splits.train_x.shape == (60_000, 1, 28, 28) and splits.test_x.shape == (10_000, 1, 28, 28)
    counts = splits.train_y.bincount().tolist()
    assert (min(counts), max(counts), len(counts)) == (5_421, 6_742, 10)
    assert splits.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels, values = np.zeros(256, np.int64), np.arange(256) / 255
    for part in splits.train_x.split(5_000):
        pixels += np.bincount(part.numpy().ravel(), minlength=256)
    mean = (pixels * values).sum() / pixels.sum()
    assert mean == pytest.approx(dataset.mean[0], abs=5e-5)
    assert np.sqrt((pixels * (values - mean) ** 2).sum() / pixels.sum()) == pytest.approx(dataset.std[0], abs=5e-5)


# EMNIST -----------------------------------------------------------------------------------------------------

CUTS = {"byclass": (62, 0), "balanced": (47, 0), "letters": (26, 1)}


def small(part: str, root: Path, monkeypatch: pytest.MonkeyPatch, *, packed: bool = True) -> dict[str, Any]:
    """Write a small tree of a part, and take it for the official one."""
    classes, first = CUTS[part]
    written = trees.emnist(root, part=part, classes=classes, first=first, packed=packed)
    sums = tuple(md5(gzip.compress(trees.idx(_stored(values)), mtime=0)) for values in written.values())
    known = replace(emnist.PARTS[part], train=2 * classes, test=classes, checksums=sums)
    monkeypatch.setattr(emnist, "PARTS", {**emnist.PARTS, part: known})
    return written


def _stored(values: Any) -> Any:
    return values.transpose(0, 2, 1) if values.ndim == 3 else values


def test_what_is_known_of_emnist_is_what_its_paper_says() -> None:
    """Table II of arXiv:1702.05373, and of the files that letters begin at 1."""
    stated = {
        part: (known.classes, known.first, known.train, known.test) for part, known in sorted(emnist.PARTS.items())
    }
    assert stated == {
        "balanced": (47, 0, 47 * 2_400, 47 * 400),
        "byclass": (62, 0, 697_932, 116_323),
        "letters": (26, 1, 26 * 4_800, 26 * 800),
    }
    sums = [each for known in emnist.PARTS.values() for each in known.checksums]
    assert len(set(sums)) == 12 and {len(each) for each in sums} == {32}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("part", CUTS)
def test_emnist_is_upright_and_numbered_from_zero(
    part: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = small(part, tmp_path, monkeypatch, packed=packed)
    dataset: Dataset = DATASETS["emnist"](part=part)
    splits, labels = dataset.load(tmp_path), dataset.labels(tmp_path)
    classes, first = CUTS[part]
    assert dataset.num_classes == classes and not dataset.flip
    assert dataset.tail == ("either" if part == "byclass" else "made")
    for which, x, y in (("train", splits.train_x, splits.train_y), ("test", splits.test_x, splits.test_y)):
        assert isinstance(x, Tensor) and x.dtype == torch.uint8 and x.is_contiguous()
        assert np.array_equal(x[:, 0], written[f"emnist-{part}-{which}-images-idx3-ubyte"])
        assert np.array_equal(y + first, written[f"emnist-{part}-{which}-labels-idx1-ubyte"])
        assert y.unique().tolist() == list(range(classes)) and y.dtype == torch.int64
    assert torch.equal(labels.train, splits.train_y) and torch.equal(labels.test, splits.test_y)


def test_a_damaged_file_of_emnist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("letters", tmp_path, monkeypatch)
    dataset, folder = DATASETS["emnist"](part="letters"), tmp_path / "EMNIST" / "raw"
    file = folder / "gzip" / "emnist-letters-train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    file.write_bytes(gzip.compress(gzip.decompress(content), 1, mtime=0))  # the same images, packed by somebody else
    for read in (dataset.load, dataset.verify):
        with pytest.raises(DataDamaged, match=rf"{file.name} is not the official file, its checksum is wrong"):
            read(tmp_path)
    dataset.labels(tmp_path)
    file.unlink()
    with pytest.raises(DataMissing, match=r"has no emnist-letters-train-images.*; .bench data fetch emnist. .*one zip"):
        dataset.load(tmp_path)
    for unpacked in (b"", b"no array", gzip.decompress(content)[:-1], trees.idx(np.zeros((52, 28, 27), np.uint8))):
        (folder / file.stem).write_bytes(unpacked)  # without a checksum
        with pytest.raises(DataDamaged, match=rf"{file.stem} is not the official file, .* in place of 52 x 28 x 28"):
            dataset.load(tmp_path)
    (folder / file.stem).write_bytes(gzip.decompress(content))
    dataset.load(tmp_path)
    (folder / "emnist-letters-test-labels-idx1-ubyte").write_bytes(trees.idx(np.arange(26, dtype=np.uint8)))
    for read in (dataset.load, dataset.labels):
        with pytest.raises(DataDamaged, match=r"labels of emnist-letters are from 0 to 25, and .* from 1 to 26"):
            read(tmp_path)


def test_emnist_comes_as_one_zip_and_is_read_as_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("balanced", tmp_path / "official", monkeypatch)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted((tmp_path / "official" / "EMNIST" / "raw").rglob("*.gz")):
            archive.write(file, f"gzip/{file.name}")
    raw = tmp_path / "fetched" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "gzip.zip").write_bytes(packed.getvalue())  # got by other means
    (remote,) = emnist.FILES.remotes
    assert remote.name == "EMNIST/raw/gzip.zip" and remote.unpack and remote.bytes == 561_753_746
    here: Remote = replace(remote, md5=md5(packed.getvalue()), bytes=None)
    monkeypatch.setattr(emnist, "FILES", replace(emnist.FILES, remotes=(here,)))
    DATASETS["emnist"](part="letters").fetch(tmp_path / "fetched")
    splits = DATASETS["emnist"]().load(tmp_path / "fetched")
    assert torch.equal(splits.train_x, DATASETS["emnist"]().load(tmp_path / "official").train_x)


def test_the_parts_of_emnist_are_different_runs() -> None:
    identities = {json.dumps(DATASETS["emnist"](part=part).identity()) for part in CUTS}
    assert len(identities) == 3
