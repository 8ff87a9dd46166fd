"""Packs: one file in the place of the official ones, with the same splits and the same digests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import DataDamaged, DataMissing, Dataset, Splits
from bench.command.data import data_command
from bench.command.main import main
from bench.files import pack, source
from bench.plugins.registry import DATASETS
from bench.protocol.settings import PROFILES, BadConfig
from bench.splits.longtail import subsample
from tests import trees

NOWHERE = Path("/nowhere")


def data(*words: object) -> Result:
    """Run `bench data`; our errors are raised."""
    result = CliRunner().invoke(data_command, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the digits with a long tail of 20."""
    out = tmp_path_factory.mktemp("packed") / "pack.npz"
    said = data("pack", "digits", "--imbalance", 20, "--out", out).stdout
    assert re.search(
        r"pack\.npz: digits, exponential imbalance 20: \d+ of 1,297 training images and 500 test images, "
        r"0\.1 MB, fingerprint [0-9a-f]{16}; use it with --data-root ",
        said,
    )
    return out


@dataclass(frozen=True, kw_only=True)
class Shapes(Dataset):
    """Three classes of noise, with users; `streamed` as a file would be."""

    num_classes: ClassVar[int] = 3
    image_shape: ClassVar[tuple[int, int, int]] = (2, 3, 5)
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.3, 0.3)
    streamed: bool = False
    sort: str = "uint8"

    def load(self, root: Path) -> Splits:
        random = np.random.RandomState(1)
        images = torch.from_numpy(random.randint(0, 256, (300, 2, 3, 5)).astype(self.sort))
        y = torch.from_numpy(random.permutation(np.arange(300) % 3))
        users = torch.from_numpy(random.randint(0, 7, 300))
        parts = [Counted(part) if self.streamed else part for part in (images[:240], images[240:])]
        return Splits(parts[0], y[:240], parts[1], y[240:], users[:240], users[240:])


class Natural(Shapes):
    """The same, long-tailed as it is."""

    tail: ClassVar[Literal["made", "natural", "either"]] = "natural"


class Counted:
    """Images that come by rows, and how many at once."""

    most = 0

    def __init__(self, images: Tensor) -> None:
        self.images, self.shape, self.dtype = images, tuple(images.shape), images.dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        Counted.most = max(Counted.most, len(rows))
        return self.images[rows]

    def prefetch(self, rows: Tensor) -> None:
        """Nothing to do."""


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enter the datasets of this file."""
    monkeypatch.setitem(DATASETS._classes, "shapes", Shapes)
    monkeypatch.setitem(DATASETS._classes, "natural", Natural)
    yield


def packed(path: Path, dataset: Dataset, imbalance: float | None = 4.0, profile: str = "exponential") -> pack.Pack:
    """Pack a dataset as the command does."""
    splits = source.load(dataset, NOWHERE)
    rows = subsample(splits.train_y, dataset.num_classes, profile, imbalance)
    return pack.write(path, dataset, splits, torch.from_numpy(rows), profile, imbalance)


# Runs -------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], root: Path, out: Path, *words: str) -> tuple[int, Any, str]:
    """Run `bench run` on digits in this process: exit status, what stands in the JSON, and errors."""
    common = ["run", "--dataset", "digits", "--rounds", "2", "--ray", "off", "--tracking-uri", "off", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*common, "--data-root", str(root), "--out", str(out), *words], prog_name="bench")
    printed = capsys.readouterr()
    return int(str(ended.value.code)), json.loads(printed.out)["runs"] if printed.out else None, printed.err


@pytest.mark.parametrize(
    "words",
    [
        ("--algos", "fedavg,fedrep", "--imbalance", "20"),
        ("--algos", "fedavg", "--imbalance", "50", "--alpha", "0.1", "--seeds", "7,", "--clients", "6"),
        ("--algos", "fedavg", "--imbalance", "0.05", "--partition", "iid"),
    ],
)
def test_a_run_from_a_pack_is_the_run_from_the_official_files(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    answers = [run(capsys, root, tmp_path / name, *words) for name, root in (("pack", digits), ("files", NOWHERE))]
    (status, here, _), (_, there, _) = answers
    assert status == 0 and here[0]["status"] == "done"
    assert [cell["digest"] for cell in here] == [cell["digest"] for cell in there]
    assert here == there
    for cell in here:
        prints = {json.loads((tmp_path / name / cell["id"] / "run.json").read_text())["fingerprint"]
                  for name in ("pack", "files")}  # fmt: skip
        assert len(prints) == 1


@pytest.mark.parametrize("words", [("--imbalance", "10"), ("--imbalance", "1"),
                                   ("--imbalance", "20", "--set", "profile=step")])  # fmt: skip
def test_a_run_that_needs_other_images_says_what_the_pack_has(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    status, _, said = run(capsys, digits, tmp_path, "--algos", "fedavg", *words)
    assert status == 3
    assert re.search(r"pack\.npz lacks [\d,]+ images of this run: it holds digits, exponential imbalance 20: ", said)
    assert said.count("\n") == 1


def test_a_run_on_photographs_is_the_same_from_their_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, out = tmp_path / "tree", tmp_path / "inat.npz"
    trees.inat(tree, classes=4, largest=12, smallest=3)
    data("prepare", "inat(classes=4)", "--size", 16, "--jobs", 1, "--data-root", tree)
    data("pack", "inat(classes=4, pixels=16)", "--data-root", tree, "--out", out)
    words = ("--algos", "fedavg", "--dataset", "inat(classes=4, pixels=16)", "--model", "small_cnn", "--clients", "3")
    answers = [run(capsys, root, tmp_path / f"runs {root.stem}", *words, "--partition", "iid") for root in (tree, out)]
    (status, there, errors), (_, here, _) = answers
    assert status == 0, errors
    assert here[0]["status"] == "done" and here == there


def test_a_pack_of_something_else_is_no_pack_of_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = packed(tmp_path / "pack.npz", Shapes())
    for other in (Shapes(streamed=True), DATASETS["digits"]()):
        for read in (source.load, source.labels):
            with pytest.raises(DataMissing, match=rf"holds {re.escape(str(held))}, and not (shapes\(|digits)"):
                read(other, held.path)
    monkeypatch.setattr(Shapes, "revision", 2)
    with pytest.raises(DataMissing, match="another revision of shapes; pack it again"):
        source.load(Shapes(), held.path)


def test_statistics_of_a_pack_are_those_of_the_files(digits: Path) -> None:
    words = ("stats", "digits", "--imbalance", "20", "--json", "--data-root")
    assert json.loads(data(*words, digits).stdout) == json.loads(data(*words, NOWHERE).stdout)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sort", ["uint8", "float16"])
@pytest.mark.parametrize("dataset", [Shapes, Natural])
def test_a_pack_holds_all_labels_and_the_images_of_the_subset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: type[Shapes], streamed: bool, sort: str
) -> None:
    monkeypatch.setattr(pack, "_PIECE", 2048)
    monkeypatch.setattr(Counted, "most", 0)
    these = dataset(streamed=streamed, sort=sort)
    official, path = these.load(NOWHERE), tmp_path / "new" / "pack.npz"
    packed(path, these, None if dataset is Natural else 4.0)
    assert Counted.most == (0 if not streamed else 2048 // 30 if sort == "uint8" else 2048 // 60)
    splits, labels = source.load(these, path), source.labels(these, path)
    for one, other in zip(vars(splits.labels).values(), vars(official.labels).values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(vars(labels).values(), vars(official.labels).values(), strict=True):
        assert torch.equal(one, other)
    assert splits.held is not None and len(splits.held) == (240 if dataset is Natural else 78 + 39 + 19)
    assert isinstance(splits.train_x, Tensor) is not streamed
    assert len(splits.train_x) == len(splits.held) and splits.train_x.dtype == official.train_x.dtype
    chosen = torch.tensor([3, 0, 3, len(splits.held) - 1])
    for _ in range(2):
        assert torch.equal(splits.train_x[chosen], official.train_x[splits.held[chosen]])
    every = torch.arange(60)
    assert torch.equal(splits.test_x[every], official.test_x[every])
    if not isinstance(splits.train_x, Tensor):
        splits.train_x.prefetch(chosen)
        assert splits.train_x[chosen[:0]].shape == (0, 2, 3, 5)


def test_a_pack_that_is_replaced_under_a_run_is_noticed(tmp_path: Path) -> None:
    these, path = Shapes(streamed=True), tmp_path / "pack.npz"
    packed(path, these)
    images = source.load(these, path).train_x
    packed(path, these, imbalance=2.0)
    with pytest.raises(DataDamaged, match="was replaced while it was in use"):
        images[torch.tensor([0])]


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=200),
    profile=st.sampled_from(PROFILES),
    factors=st.tuples(st.floats(1, 50), st.floats(1, 50)),
)
def test_a_stronger_imbalance_of_the_same_profile_lies_within(
    labels: list[int], profile: str, factors: tuple[float, float]
) -> None:
    truth = torch.tensor(labels)
    weak, strong = (set(subsample(truth, 4, profile, factor).tolist()) for factor in sorted(factors))
    assert strong <= weak


# Writing ----------------------------------------------------------------------------------------------------


def test_the_same_pack_twice_is_the_same_file(digits: Path, tmp_path: Path) -> None:
    data("pack", "digits", "--imbalance", 20, "--out", tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == digits.read_bytes()


def test_a_pack_can_be_made_of_a_pack_that_holds_enough(digits: Path, tmp_path: Path) -> None:
    data("pack", "digits", "--imbalance", 50, "--data-root", digits, "--out", tmp_path / "of a pack.npz")
    data("pack", "digits", "--imbalance", 50, "--out", tmp_path / "of files.npz")
    assert (tmp_path / "of a pack.npz").read_bytes() == (tmp_path / "of files.npz").read_bytes()
    with pytest.raises(DataMissing, match="not all images of that subset are here"):
        data("pack", "digits", "--imbalance", 10, "--data-root", digits, "--out", tmp_path / "no.npz")


def test_numpy_opens_a_pack(digits: Path) -> None:
    with np.load(digits, allow_pickle=False) as file:
        assert file["train_x"].shape == (len(file["held"]), 1, 8, 8) and file["train_y"].shape == (1297,)


def test_a_natural_tail_is_packed_whole(tmp_path: Path) -> None:
    said = data("pack", "natural", "--out", tmp_path / "pack.npz").stdout
    assert "natural, whole: 240 of 240 training images and 60 test images" in said
    with pytest.raises(BadConfig, match="long-tailed by nature"):
        data("pack", "natural", "--imbalance", 10, "--out", tmp_path / "other.npz")
    refused = data("pack", "natural", "--profile", "step", "--out", tmp_path / "other.npz")
    assert refused.exit_code == 2 and "is packed as it is, and not cut" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say with --imbalance which long-tailed part"),
        (("--imbalance", "2", "--out", "pack.zip"), "must end in .npz"),
        (("--imbalance", "2", "--out", "there.npz"), "is there already"),
        (("--imbalance", "2", "--out", "there.npz/below.npz"), "cannot be written"),
    ],
)
def test_a_pack_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_bytes(b"mine")
    refused = data("pack", "shapes", "--out", "new.npz", *words)
    assert refused.exit_code == 2 and said in refused.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["there.npz"]
    assert (tmp_path / "there.npz").read_bytes() == b"mine"


def test_a_full_disk_leaves_the_old_pack_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pack.npz"
    packed(path, Shapes())
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left"):
        packed(path, Shapes(), imbalance=2.0)
    assert [file.name for file in tmp_path.iterdir()] == ["pack.npz"] and path.read_bytes() == before


# Damage -----------------------------------------------------------------------------------------------------


def test_what_is_no_pack_is_refused_in_a_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", train_x=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").touch()
    for name in ("arrays.npz", "text.npz", "empty"):
        for read in (source.load, source.labels):
            with pytest.raises(DataDamaged, match=rf"{name} is not a file of 'bench data pack', or a damaged one"):
                read(Shapes(), tmp_path / name)
        with pytest.raises(DataDamaged, match=name):
            source.require(Shapes(), tmp_path / name, [torch.tensor([0])])
    with pytest.raises(DataMissing, match=r"gone\.npz is not there; 'bench data pack' makes"):
        source.load(DATASETS["digits"](), tmp_path / "gone.npz")


def test_a_header_that_was_edited_is_noticed(digits: Path, tmp_path: Path) -> None:
    other = tmp_path / "pack.npz"
    with ZipFile(digits) as before, ZipFile(other, "w") as after:
        for member in before.namelist():
            content = before.read(member)
            after.writestr(member, content.replace(b'"imbalance": 20.0', b'"imbalance": 50.0'))
    with pytest.raises(DataDamaged, match="its header is not what was written"):
        pack.labels(other, DATASETS["digits"]())


def test_a_pack_of_a_plugin_that_was_changed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "pack.npz", Shapes())
    monkeypatch.setattr(pack, "source_digest", lambda plugin: "another")
    with pytest.raises(DataMissing, match="made by another revision of shapes; pack it again"):
        pack.labels(tmp_path / "pack.npz", Shapes())


def test_a_pack_of_a_later_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(pack, "FORMAT", 2)
        packed(tmp_path / "pack.npz", Shapes())
    with pytest.raises(DataDamaged, match="is a pack of format 2, and this version reads 1"):
        source.load(Shapes(), tmp_path / "pack.npz")


def damaged(content: bytes, choice: st.DataObject) -> bytes:
    """Cut a file short, change bytes, or take some out."""
    kind = choice.draw(st.sampled_from(["cut", "changed", "taken out"]))
    start = choice.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        return content[:start]
    length = choice.draw(st.integers(1, 40))
    if kind == "taken out":
        return content[:start] + content[start + length :]
    noise: bytes = choice.draw(st.binary(min_size=length, max_size=length))
    return content[:start] + noise[: len(content) - start] + content[start + length :]


def equal(one: Splits, other: Splits) -> bool:
    """Compare two loaded packs, images of files included."""
    for here, there in zip(vars(one).values(), vars(other).values(), strict=True):
        if len(here) != len(there) or here.dtype != there.dtype:
            return False
        if not torch.equal(here[torch.arange(len(here))], there[torch.arange(len(there))]):
            return False
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(streamed=st.booleans(), choice=st.data())
def test_a_damaged_pack_is_named_or_is_what_it_was(streamed: bool, choice: st.DataObject) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS._classes, "shapes", Shapes)
        whole, path, these = Path(folder) / "whole.npz", Path(folder) / "pack.npz", Shapes(streamed=streamed)
        packed(whole, these)
        path.write_bytes(damaged(whole.read_bytes(), choice))
        expected = source.load(these, whole)
        try:
            assert equal(source.load(these, path), expected)
        except (DataDamaged, DataMissing) as error:
            assert "pack.npz" in str(error)
        try:
            assert torch.equal(source.labels(these, path).train, expected.train_y)
        except (DataDamaged, DataMissing) as error:
            assert "pack.npz" in str(error)
