"""Examples that are no images: rows of tables, windows of sensors, embeddings, from the file to a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import DataDamaged, Dataset, keys, models
from bench.command.data import data_command
from bench.contract.datasets import PROMISES
from bench.contract.promises import ContractBroken
from bench.data import Images
from bench.files.moments import moments
from bench.models import BadModel
from bench.plugins.registry import DATASETS
from bench.preparing.embedding import Embedding
from bench.protocol.bundles import SETTINGS, named
from bench.protocol.settings import BadConfig
from bench.splits.split import make_split
from bench.sweep.resolving import resolve_setting
from bench.training.population import Population
from tests.shots import Heard
from tests.test_resident import at, bench_run, saved

SHAPES: dict[str, tuple[int, ...]] = {"table": (5,), "windows": (3, 8), "grid": (2, 4, 5), "video": (2, 3, 4, 5)}


def numbers(shape: tuple[int, ...], classes: int = 3, train: int = 30, **changes: Any) -> dict[str, Any]:
    """Make floating examples whose class shows; channels differ in place and spread."""
    random = np.random.RandomState(0)
    channel = np.arange(1, shape[0] + 1).reshape(-1, *(1 for _ in shape[1:]))

    def part(n: int) -> tuple[Any, Any]:
        y = np.arange(n) % classes
        x = random.normal(size=(n, *shape)) + y.reshape(-1, *(1 for _ in shape))
        return (100 * channel + channel * x).astype(np.float32), y

    (train_x, train_y), (test_x, test_y) = part(train), part(3 * classes)
    made = {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}
    return {key: value for key, value in (made | changes).items() if value is not None}


def population(dataset: Dataset, **fields: object) -> Population:
    setting = resolve_setting("quick", dataset, {"clients": 2, "partition": "iid", **fields})
    splits = dataset.load(Path())
    split = make_split(splits.labels, dataset.num_classes, setting, 0)
    return Population(dataset, splits, split, setting, 0, "cpu")


# What a model is given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_examples_keep_their_shape_and_are_standard_over_the_training_part(kind: str, tmp_path: Path) -> None:
    shape, content = SHAPES[kind], numbers(SHAPES[kind])
    dataset = saved(tmp_path, content)
    assert dataset.image_shape == shape and dataset.scale == 1 and not dataset.pictures
    splits = dataset.load(Path("/nowhere"))
    assert isinstance(splits.train_x, torch.Tensor) and splits.train_x.dtype == torch.float32
    assert np.array_equal(splits.train_x, content["train_x"])  # as they are
    axes = (0, *range(2, len(shape) + 1))
    wide = content["train_x"].astype(np.float64)
    assert dataset.mean == pytest.approx(wide.mean(axes)) and dataset.std == pytest.approx(wide.std(axes))
    assert len(dataset.mean) == shape[0]
    x = population(dataset).images.plain(torch.arange(30))
    assert x.shape == (30, *shape) and x.dtype == torch.float32
    place = (-1, *(1 for _ in shape[1:]))
    expected = (wide - wide.mean(axes).reshape(place)) / wide.std(axes).reshape(place)
    np.testing.assert_allclose(np.sort(x, 0), np.sort(expected, 0), atol=1e-4)
    test = population(dataset).test.plain(torch.arange(2)).double().numpy()
    test = test * wide.std(axes).reshape(place) + wide.mean(axes).reshape(place)
    np.testing.assert_allclose(test, content["test_x"][:2], rtol=1e-5)  # by the training part's, not its own


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_as_they_are_means_to_the_bit(dtype: str, tmp_path: Path) -> None:
    content = numbers((4,), train_x=np.linspace(-3, 3, 120).reshape(30, 4).astype(dtype))
    saved(tmp_path, content)
    dataset = DATASETS["arrays"](path=str(tmp_path / "own.npz"), normalise="none")
    x = population(dataset).images.plain(torch.arange(30))
    assert np.array_equal(np.sort(x, 0), content["train_x"].astype(np.float32))


def test_pixels_may_be_taken_as_they_are_too(tmp_path: Path) -> None:
    pixels = np.arange(30 * 16, dtype=np.uint8).reshape(30, 4, 4)
    constant = np.zeros_like(pixels)
    for train_x in (pixels, constant):  # of which the standard deviation is none
        saved(tmp_path, numbers((4, 4), train_x=train_x, test_x=pixels[:9]))
        dataset = DATASETS["arrays"](path=str(tmp_path / "own.npz"), normalise="none")
        assert dataset.scale == 255 and (dataset.mean, dataset.std) == ((0.0,), (1.0,)) and dataset.pictures
        x = population(dataset).test.plain(torch.arange(9))
        assert np.allclose(x[:, 0], pixels[:9] / 255)
    with pytest.raises(DataDamaged, match="all pixels are equal"):
        at(tmp_path / "own.npz").load(tmp_path)


def test_images_of_one_pixel_are_features(tmp_path: Path) -> None:
    pixels = np.arange(30, dtype=np.uint8).reshape(30, 1, 1)
    dataset = saved(tmp_path, numbers((1,), train_x=pixels, test_x=pixels[:9]))
    setting = named("creff", dataset)
    assert not dataset.pictures and (setting.model, setting.augment) == ("frozen", "none")


def test_numbers_far_from_zero_keep_their_differences(tmp_path: Path) -> None:
    """A product and a sum would lose them: of numbers around 1e6 float32 has four digits after the point no more."""
    random = np.random.RandomState(0)
    x = (1e6 + random.normal(size=(30, 2))).astype(np.float32)
    dataset = saved(tmp_path, numbers((2,), train_x=x))
    found = population(dataset).images.plain(torch.arange(30))
    exact = (x.astype(np.float64) - x.astype(np.float64).mean(0)) / x.astype(np.float64).std(0)
    between, expected = (np.diff(np.sort(values, 0), axis=0) for values in (found.numpy(), exact))
    np.testing.assert_allclose(between, expected, atol=1e-5)


def test_constants_become_zero_and_divide_nothing(tmp_path: Path) -> None:
    x = numbers((4,))["train_x"]
    x[:, 1], x[:, 2], x[:, 3] = 0.1, 3e38, np.where(np.arange(30) < 15, 0, 1e-45)
    dataset = saved(tmp_path, numbers((4,), train_x=x))
    assert dataset.std[1:] == (1.0, 1.0, 1.0)
    found = population(dataset).images.plain(torch.arange(30))
    assert found.isfinite().all() and torch.equal(found[:, 1:3], torch.zeros(30, 2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_moments_are_numpys(shape: list[int], examples: int, seed: int) -> None:
    x = np.random.RandomState(seed).normal(7, 3, (examples, *shape)).astype(np.float32)
    axes = (0, *range(2, x.ndim))
    mean, std = moments(torch.from_numpy(x))
    assert mean == pytest.approx(x.astype(np.float64).mean(axes))
    one = x.max(axes) == x.min(axes)
    assert std == pytest.approx(np.where(one, 1, x.astype(np.float64).std(axes)))


def test_moments_of_many_examples_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(np.random.RandomState(0).normal(size=(50, 3, 2)).astype(np.float16))
    whole = moments(x)
    monkeypatch.setattr("bench.files.moments._ROWS", 7)
    assert np.allclose(moments(x), whole)


def test_shapes_are_kept_wherever_images_lie() -> None:
    """From a file, gathered for a mapped reading, and for many clients at once."""
    x = torch.arange(24, dtype=torch.float32).view(4, 3, 2)

    class File:
        shape, dtype = (4, 3, 2), torch.float32

        def __len__(self) -> int:
            return 4

        def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
            return x[rows]

        def prefetch(self, rows: torch.Tensor) -> None:
            pass

    y, look, index = torch.arange(4), ((0.0,) * 3, (1.0,) * 3), torch.tensor([[2, 0], [1, 3]])
    resident, streamed = Images(x, y, *look, scale=1), Images(File(), y, *look, scale=1)
    for images in (resident, streamed):
        assert torch.equal(images.plain(index[0]), x[index[0]]) and images.shape == (3, 2)
        assert torch.equal(images.augmented(index[1], keys.key(0), torch.arange(2)), x[index[1]])
        assert images.plain(index[0][:0]).shape == (0, 3, 2)
        gathered, places = images.gather(index)
        assert torch.equal(torch.func.vmap(gathered.plain)(places), x[index])


# What is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "nan": (
        "train_x",
        (7, 2),
        np.nan,
        r"train_x has nan in row 7, .*\(such rows: 1\); fill them in, or leave them out",
    ),
    "infinite": ("test_x", (3, 0), -np.inf, r"test_x has -inf in row 3, where a finite number of float32 is wanted"),
    "too large": ("train_x", (29, 4), 1e300, r"train_x has 1e\+300 in row 29, where a finite number of float32"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_no_number_is_named_with_its_row(wrong: str, tmp_path: Path) -> None:
    key, place, value, said = REFUSED[wrong]
    content = numbers((5,))
    content[key] = content[key].astype(np.float64)
    content[key][place] = value
    with pytest.raises(DataDamaged, match=rf"own\.npz: {said}") as caught:
        saved(tmp_path, content).load(tmp_path)
    assert "\n" not in str(caught.value)
    content[key][0] = value
    with pytest.raises(DataDamaged, match=r"in row 0, .*\(such rows: 2\)"):
        saved(tmp_path, content).load(tmp_path)


@pytest.mark.parametrize(
    ("x", "test_x", "said"),
    [
        (
            np.zeros(30, "f4"),
            np.zeros(9, "f4"),
            r"train_x is of shape \(30,\); \(N, features\) is wanted, or more axes",
        ),
        (np.zeros((30, 0), "f4"), np.zeros((9, 0), "f4"), r"train_x is of shape \(30, 0\)"),
        (np.ones((30, 4), "f4"), np.ones((9, 5), "f4"), r"train_x has examples of \(4,\) and test_x of \(5,\)"),
        (np.ones((30, 4), "c8"), np.ones((9, 4), "c8"), "train_x is of type complex64"),
        (np.ones((30, 4), "f4"), np.ones((9, 4), "u1"), "train_x is of type float32 and test_x of uint8"),
    ],
)
def test_examples_of_no_shape_or_type_are_refused(x: Any, test_x: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataDamaged, match=said):
        saved(tmp_path, numbers((4,), train_x=x, test_x=test_x)).load(tmp_path)


@pytest.mark.parametrize("model", list(models.MODELS))
@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 4, 5)])
def test_models_take_any_shape_or_say_that_they_need_images(model: str, shape: tuple[int, ...]) -> None:
    if model in ("linear", "mlp", "frozen", "adapter"):
        built = models.build(model, 4, shape)
        params = built.init(keys.key(0))
        assert built.logits(params["head"], built.features(params["body"], torch.zeros(2, *shape))).shape == (2, 4)
    else:
        said = f"{model} needs images (channels, height, width), and these examples are of shape "
        with pytest.raises(BadModel, match=re.escape(said + " x ".join(map(str, shape)))):
            models.build(model, 4, shape)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", SHAPES)
def test_no_setting_shifts_what_is_no_picture_and_all_have_a_model_for_it(name: str, kind: str, tmp_path: Path) -> None:
    dataset = saved(tmp_path, numbers(SHAPES[kind]))
    setting = named(name, dataset)
    assert setting.augment == "none"
    if len(SHAPES[kind]) != 3:
        assert setting.model == "mlp"
    for augment in ("crop", "batch_crop_flip"):
        with pytest.raises(BadConfig, match=r"these examples are no pictures to shift or mirror; leave it out"):
            resolve_setting(name, dataset, {"augment": augment})


# From the command -------------------------------------------------------------------------------------------


def test_own_normalisation_is_another_run(tmp_path: Path) -> None:
    standard = saved(tmp_path, numbers((5,)))
    plain = DATASETS["arrays"](path=str(tmp_path / "own.npz"), normalise="none")
    assert list(standard.identity()) == ["sha256"]  # as before there was a choice
    assert plain.identity() == {**standard.identity(), "normalise": "none"}
    assert DATASETS["features"](path=str(tmp_path)).normalise == "none"


def test_features_may_be_normalised_over_the_training_part(tmp_path: Path) -> None:
    made = Embedding(dataset=DATASETS["digits"](), model="mlp", norm="group", weights=None).make(tmp_path, Heard())
    plain, standard = (DATASETS["features"](path=str(made.folder), normalise=how) for how in ("none", "standard"))
    assert plain == DATASETS["features"](path=str(made.folder)) and set(plain.identity()) == {"listing", "contents"}
    assert standard.identity() == {**plain.identity(), "normalise": "standard"}
    assert set(plain.mean) == {0.0} and set(plain.std) == {1.0} and len(plain.mean) == 64
    x = [
        population(dataset, imbalance=None).images.plain(torch.arange(1297)).flatten(1) for dataset in (plain, standard)
    ]
    stored = made.part("train")[torch.arange(1297)].flatten(1).float()
    assert torch.equal(x[0].sort(0).values, stored.sort(0).values)
    dead = stored.max(0).values == stored.min(0).values
    assert 0 < int(dead.sum()) < 64 and torch.equal(x[1][:, dead], torch.zeros(1297, int(dead.sum())))
    assert x[1].mean(0).abs().max() < 1e-5
    assert np.allclose(x[1][:, ~dead].std(0, correction=0), 1, atol=1e-4)


@pytest.mark.parametrize(("kind", "engine"), [("table", "serial"), ("windows", "stacked")])
def test_a_run_learns_from_examples_that_are_no_images(
    kind: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, numbers(SHAPES[kind], train=300))
    call = f"arrays(path='{tmp_path / 'own.npz'}')"
    words = ("--dataset", call, "--clients", "3", "--partition", "iid", "--rounds", "8", "--engine", engine)
    cell = bench_run(capsys, tmp_path / "runs", *words)
    assert cell["status"] == "done" and cell["metrics"]["generic"] > 0.8  # unnormalised, it stays at a third
    record = json.loads((tmp_path / "runs" / cell["id"] / "run.json").read_text())
    assert record["setting"]["model"] == "mlp" and record["setting"]["augment"] == "none"
    result = CliRunner().invoke(data_command, ["check", call], catch_exceptions=False, standalone_mode=False)
    shape = " x ".join(map(str, SHAPES[kind]))
    assert f"300 training and 9 test examples of {shape}, 3 classes" in result.stdout


def test_examples_are_packed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, numbers((3, 8), train=60))
    call = f"arrays(path='{tmp_path / 'own.npz'}')"
    words = ("--dataset", call, "--clients", "3", "--partition", "iid")
    CliRunner().invoke(
        data_command, ["pack", call, "--out", str(tmp_path / "p.npz")], catch_exceptions=False, standalone_mode=False
    )
    own = bench_run(capsys, tmp_path / "own", *words)
    packed = bench_run(capsys, tmp_path / "packed", *words, "--data-root", str(tmp_path / "p.npz"))
    assert own["digest"] == packed["digest"] and own["id"] == packed["id"]


def test_the_contract_takes_floating_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, numbers((5,)), "arrays.npz")
    for promise in ("it describes itself", "it loads what it says"):
        PROMISES[promise](DATASETS["arrays"])
    contents = DATASETS["arrays"]().load(tmp_path)
    contents.train_x[7] = torch.nan
    monkeypatch.setattr(DATASETS["arrays"], "load", lambda self, root: contents)
    with pytest.raises(ContractBroken, match="train examples are not all finite"):
        PROMISES["it loads what it says"](DATASETS["arrays"])
