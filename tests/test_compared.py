"""Images with one changed bit: refused in a sentence before a sweep begins, and never a failed run."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest

from bench import DataDamaged
from bench.command.main import main
from bench.files import compared, pack, prepared, source
from bench.plugins.registry import DATASETS
from bench.preparing.preparation import prepare
from tests import trees
from tests.shots import Heard


def flip(file: Path, place: float = 0.7) -> None:
    """Change one bit, somewhere."""
    with file.open("r+b") as stream:
        at = int(place * file.stat().st_size)
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 4]))


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Type a command: its exit status, and what it said on standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words], prog_name="bench")
    return int(str(ended.value.code)), capsys.readouterr().err


def run(capsys: pytest.CaptureFixture[str], root: Path, out: Path, dataset: str, *more: str) -> tuple[int, str]:
    few = ("--rounds", 1, "--model", "linear", "--clients", 2, "--ray", "off", "--tracking-uri", "off")
    return bench(
        capsys, "run", "--algos", "fedavg,local", "--dataset", dataset, "--data-root", root, "--out", out, *few, *more
    )


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """Prepare a few photographs of one's own."""
    dataset = DATASETS["folder"](path=str(trees.folder(tmp_path / "own")), pixels=8)
    assert prepare(dataset, tmp_path, 1, Heard()).store is not None
    return dataset


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_sweep_on_a_store_with_a_changed_bit_does_not_begin(
    part: str, own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, call = own.store(tmp_path), f"folder(path='{own.path}', pixels=8)"
    flip(store / f"{part}.bin")
    for out in ("first", "again"):
        status, said = run(capsys, tmp_path, tmp_path / out, call)
        assert status == 3 and said.count("\n") == 1
        assert f"bench: {store / part}.bin, rows 0 to " in said
        assert said.endswith(f"not what was written; delete {store} and prepare the dataset again\n")
        assert not list((tmp_path / out).glob("*/run.json"))
    assert not (store / compared.FILE).exists()
    shutil.rmtree(store)
    prepare(own, tmp_path, 1, Heard())
    assert run(capsys, tmp_path, tmp_path / "first", call)[0] == 0


def test_kept_models_are_not_tested_on_damage(own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = f"folder(path='{own.path}', pixels=8)"
    assert run(capsys, tmp_path, tmp_path / "runs", call, "--keep-models")[0] == 0
    (folder, _) = sorted(file.parent for file in (tmp_path / "runs").glob("*/run.json"))
    for status in (0, 3):
        found, said = bench(capsys, "eval", folder.name, "--out", tmp_path / "runs", "--data-root", tmp_path)
        assert found == status and (status == 0 or "not what was written; delete" in said)
        flip(own.store(tmp_path) / "test.bin")


def test_a_sweep_on_a_pack_with_a_changed_bit_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's: two failed runs of the algorithms were recorded."""
    path = tmp_path / "pack.npz"
    assert bench(capsys, "data", "pack", "digits", "--imbalance", "10", "--out", path)[0] == 0
    assert run(capsys, path, tmp_path / "whole", "digits")[0] == 0
    flip(path)
    status, said = run(capsys, path, tmp_path / "runs", "digits")
    assert status == 3 and said.count("\n") == 1
    assert f"bench: {path} is not a file of 'bench data pack', or a damaged one (" in said
    assert said.endswith("; copy it or pack it again\n") and not list((tmp_path / "runs").glob("*/run.json"))


@pytest.mark.parametrize("key", ["train_x", "test_x", "test_y", "held"])
def test_verify_reads_all_of_a_pack(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what a changed checksum within the archive covers up."""
    path = tmp_path / "pack.npz"
    bench(capsys, "data", "pack", "digits", "--imbalance", "10", "--out", path)
    pack.verify(path)
    with ZipFile(path) as before, ZipFile(tmp_path / "other.npz", "w") as after:
        for member in before.namelist():
            content = before.read(member)
            other = content[:-1] + bytes([content[-1] ^ 1])
            after.writestr(member, other if member == f"{key}.npy" else content)
    with pytest.raises(DataDamaged, match=rf"\(the checksum of {key} is wrong\); copy it or pack it again"):
        source.verify(DATASETS["digits"](), tmp_path / "other.npz")


def test_a_state_of_a_store_is_compared_once(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    verify = prepared.Store.verify

    def counted(store: prepared.Store) -> Iterator[str]:
        read.append(1)
        yield from verify(store)

    monkeypatch.setattr(prepared.Store, "verify", counted)
    folder = own.store(tmp_path)
    for times in (1, 1, 1):
        source.verify(own, tmp_path)
        assert len(read) == times
    marker = json.loads((folder / compared.FILE).read_bytes())
    os.utime(folder / "test.bin", ns=(1, 1))
    source.verify(own, tmp_path)
    assert len(read) == 2 and json.loads((folder / compared.FILE).read_bytes()) != marker
    stat = (folder / "train.bin").stat()
    flip(folder / "train.bin")
    os.utime(folder / "train.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # its date is set back
    with pytest.raises(DataDamaged, match="not what was written"):
        source.verify(own, tmp_path)
    flip(folder / "train.bin")
    source.verify(own, tmp_path)
    marker = json.loads((folder / compared.FILE).read_bytes())
    for marked in (b"", b"no JSON", b"[" * 10**5, json.dumps({**marker, "index": "other"}).encode()):
        (folder / compared.FILE).write_bytes(marked)
        source.verify(own, tmp_path)
        assert json.loads((folder / compared.FILE).read_bytes()) == marker
    assert len(read) == 8
    index = json.loads((folder / "index.json").read_bytes())
    del index["sha256"]
    index["chunks"]["test"][0] = "0" * 64
    (folder / "index.json").write_text(json.dumps({**index, "sha256": prepared.checksum(index)}))
    with pytest.raises(DataDamaged, match=r"test\.bin, rows 0 to \d+: not what was written"):
        source.verify(own, tmp_path)


def test_where_nothing_can_be_written_a_store_is_compared_anew(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compared, "put", refused)
    source.verify(own, tmp_path)
    assert not (own.store(tmp_path) / compared.FILE).exists()


def test_a_store_that_is_written_while_it_is_compared_is_compared_again(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, verify = own.store(tmp_path), prepared.Store.verify

    def slowly(store: prepared.Store) -> Iterator[str]:
        yield from verify(store)
        flip(folder / "train.bin")

    monkeypatch.setattr(prepared.Store, "verify", slowly)
    source.verify(own, tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataDamaged, match="not what was written"):
        source.verify(own, tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "data pack CALL --out OUT/pack.npz",
        "data embed CALL --model mlp --random-weights",
        "tune --algos fedavg --dataset CALL --trials 1 --rounds 1 --model linear --clients 2 --ray off --out OUT/tuned",
    ],
)
def test_damage_is_not_passed_on(words: str, own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(own.store(tmp_path) / "train.bin")
    call = {"CALL": f"folder(path='{own.path}', pixels=8)"}
    typed = [call.get(word, word.replace("OUT", str(tmp_path))) for word in words.split()]
    status, said = bench(capsys, *typed, "--data-root", tmp_path)
    assert status == 3 and "not what was written; delete" in said
    assert not (tmp_path / "pack.npz").exists() and len(list((tmp_path / "prepared").iterdir())) < 3


def test_features_with_a_changed_bit_are_refused(own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = f"folder(path='{own.path}', pixels=8)"
    bench(capsys, "data", "embed", call, "--model", "mlp", "--random-weights", "--data-root", tmp_path)
    (features,) = (tmp_path / "prepared").glob("folder-mlp-*")
    dataset = DATASETS["features"](path=str(features))
    source.verify(dataset, tmp_path)
    flip(features / "train.bin")
    status, said = run(capsys, tmp_path, tmp_path / "runs", f"features(path='{features}')")
    assert status == 3 and f"delete {features} and prepare the dataset again" in said


def test_images_that_lie_apart_from_their_labels_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST and its kin have them in files of their own."""
    for name in ("mnist", "fashion_mnist"):
        module = import_module(f"bench.datasets.{name}")
        folder = tmp_path / module.FILES.folder
        folder.mkdir(parents=True)
        checksums = {}
        for file in module.FILES.checksums:
            content = trees.idx(np.arange(10, dtype=np.uint8) if "labels" in file else np.ones((10, 28, 28), np.uint8))
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
            checksums[file] = prepared.sha256_of(content)
        monkeypatch.setattr(module, "FILES", replace(module.FILES, checksums=checksums))
        dataset = DATASETS[name]()
        source.verify(dataset, tmp_path)
        images = folder / "train-images-idx3-ubyte.gz"
        images.write_bytes(gzip.compress(trees.idx(np.zeros((10, 28, 28), np.uint8))))
        dataset.labels(tmp_path)
        with pytest.raises(DataDamaged, match=r"train-images-idx3-ubyte\.gz is not the official file, its checksum is"):
            source.verify(dataset, tmp_path)


def test_features_of_more_classes_than_images_are_refused(own: Any, tmp_path: Path) -> None:
    features = tmp_path / "features"
    call = f"folder(path='{own.path}', pixels=8)"
    with pytest.raises(SystemExit):
        main(["data", "embed", call, "--model", "mlp", "--random-weights", "--data-root", str(tmp_path)])
    next((tmp_path / "prepared").glob("folder-mlp-*")).rename(features)
    index = json.loads((features / "index.json").read_bytes())
    for classes in ("4", "43", "44", "1", str(10**13), "-4", "four", None, 10**6):
        index["plan"]["made_by"]["classes"] = classes
        document = {key: value for key, value in index.items() if key != "sha256"}
        (features / "index.json").write_text(json.dumps({**document, "sha256": prepared.checksum(document)}))
        dataset = DATASETS["features"](path=str(features))
        if classes in ("4", "43"):  # of 43 training images
            assert dataset.num_classes == int(classes)
            continue
        with pytest.raises(DataDamaged, match=f"features says that it has {classes} classes; make it anew"):
            assert dataset.num_classes
