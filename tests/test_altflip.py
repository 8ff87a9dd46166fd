"""Alternating flip: an image's orientation hangs on its row and on the passes made over it, and on nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, LocalData, Splits, Task, Tree, keys, losses
from bench.contract import toy
from bench.data import Images
from bench.plugins.registry import ALGORITHMS
from bench.training.job import surroundings
from bench.training.population import first_mirrored
from bench.training.rounds import Run
from tests.by_hand import short
from tests.test_crew import hired

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SETTING = replace(toy.SETTING, augment="altflip", participation=0.5, rounds=6, epochs=1, eval_every=6)

# One image --------------------------------------------------------------------------------------------------


def images(**options: Any) -> Images:
    """Three images of two channels whose pixels all differ."""
    x = torch.arange(216, dtype=torch.uint8).view(3, 2, 6, 6)
    return Images(x, torch.tensor([0, 1, 2]), (0.25, 0.5), (0.5, 0.25), "altflip", **options)


def test_a_shift_is_a_window_of_the_reflected_image_and_mirrored_in_every_second_pass() -> None:
    source, rows, key = images(mirrored=torch.tensor([False, True, False])), torch.arange(3).repeat(60), keys.key(5)
    example = torch.arange(180)
    draws = keys.fold(key, example)  # as of every other augmentation
    shifts = torch.stack([(draws >> 8) & 0xFFFF, (draws >> 24) & 0xFFFF]) % 5
    assert len({*map(tuple, shifts.T.tolist())}) == 25
    reflected = F.pad(source.plain(torch.arange(3)), (2, 2, 2, 2), mode="reflect")
    for seen in (0, 1, 2, 7):
        drawn = source.augmented(rows, key, example, torch.full_like(example, seen))
        for row, (down, right), found in zip(rows.tolist(), shifts.T.tolist(), drawn, strict=True):
            window = reflected[row, :, down : down + 6, right : right + 6]
            assert torch.equal(found, window.flip(2) if bool(seen % 2) != (row == 1) else window)


def test_larger_images_are_shifted_by_a_sixteenth_and_small_ones_reflected_as_far_as_they_go() -> None:
    for side, pad in ((1, 2), (2, 2), (8, 2), (32, 2), (64, 4)):
        made = Images(
            torch.zeros(1, 1, side, side, dtype=torch.uint8), torch.zeros(1).long(), (0.0,), (1.0,), "altflip"
        )
        assert made.pad == pad and made.x is not None and made.x.shape == (1, side + 2 * pad, side + 2 * pad, 1)


def test_the_first_orientation_is_a_function_of_seed_and_row() -> None:
    rows = torch.arange(40)
    first = first_mirrored("altflip", keys.key(0), rows, "cpu")
    assert first is not None and first.long().tolist() == GOLDEN
    again, other = (first_mirrored("altflip", keys.key(seed), rows[7:], "cpu") for seed in (0, 1))
    assert again is not None and other is not None
    assert torch.equal(again, first[7:]) and not torch.equal(other, first[7:])
    assert first_mirrored("crop_flip", keys.key(0), rows, "cpu") is None


# fmt: off
GOLDEN = [
    1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1,
    0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1,
]
# fmt: on


class Lent:
    """Images that are read when they are asked for."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, tuple(x.shape), x.dtype

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.x[rows]

    def prefetch(self, rows: Tensor) -> None:
        pass


def test_what_is_gathered_from_a_file_keeps_its_orientation() -> None:
    x, mirrored = torch.arange(216, dtype=torch.uint8).view(3, 2, 6, 6), torch.tensor([True, False, True])
    look = ((0.25, 0.5), (0.5, 0.25), "altflip")
    file = Images(Lent(x), torch.arange(3), *look, mirrored=mirrored)
    index = torch.tensor([2, 1, 2])
    gathered, places = file.gather(index)
    for source, rows in ((file, index), (gathered, places)):
        drawn = source.augmented(rows, keys.key(1), torch.arange(3))
        assert torch.equal(drawn, images(mirrored=mirrored).augmented(index, keys.key(1), torch.arange(3)))


# One client -------------------------------------------------------------------------------------------------


def ramp(n: int, pixels: int = 8) -> Tensor:
    """Images that are brighter at the right: however they are shifted, they say which way round they are."""
    return (20 * torch.arange(pixels, dtype=torch.uint8)).expand(n, 1, pixels, pixels).contiguous()


def turned(x: Tensor) -> Tensor:
    """-1 for an image that is mirrored, 1 for the others: (B,)."""
    half = x.shape[3] // 2
    return (x[..., half:].mean((1, 2, 3)) - x[..., :half].mean((1, 2, 3))).sign()


def client(n: int, padding: int = 0, passes: Tensor | None = None) -> LocalData:
    source = Images(ramp(n), torch.arange(n) % 3, (0.5,), (0.5,), "altflip", mirrored=torch.arange(n) % 3 == 0)
    index = torch.cat([torch.arange(n), torch.zeros(padding, dtype=torch.int64)])
    return LocalData(
        source, index, torch.tensor(n), keys.key(1), torch.bincount(torch.arange(n) % 3, minlength=3), 4,
        client_key=keys.key(2), padded=padding > 0, passes=None if passes is None else F.pad(passes, (0, padding)),
    )  # fmt: skip


def orientations(batches: Any, n: int) -> list[dict[int, int]]:
    """Of each epoch, which way round each example was."""
    found: list[dict[int, int]] = [{}]
    for batch in batches:
        for example, way, weight in zip(batch.example.tolist(), turned(batch.x).tolist(), batch.weight, strict=False):
            if not weight:
                continue
            if len(found[-1]) == n:
                found.append({})
            assert example not in found[-1]
            found[-1][example] = int(way)
    return found


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("of", [{"epochs": 4}, {"steps": 12}])
def test_epochs_go_on_from_the_passes_made_before(of: dict[str, Any], padding: int) -> None:
    n, passes = 11, torch.arange(11) % 5
    found = orientations(client(n, padding, passes).batches(**of), n)
    assert len(found) == 4
    for epoch, each in enumerate(found):
        expected = {k: -1 if (k % 3 == 0) != bool((k % 5 + epoch) % 2) else 1 for k in range(n)}
        assert each == expected
    later = orientations(client(n, padding, passes).after(3).batches(**of), n)
    assert later[0] == found[3] and later[1] == found[2]


def test_two_views_are_the_two_orientations() -> None:
    (batch,) = client(3).batches(1, views=2, batch_size=3)
    assert torch.equal(turned(batch.x[:3]), -turned(batch.x[3:]))


@pytest.mark.parametrize("padding", [0, 5])
def test_a_part_of_the_examples_has_the_orientations_of_the_whole(padding: int) -> None:
    passes = torch.arange(12) % 5 % 2
    whole = orientations(client(12, padding, passes).batches(1), 12)[0]
    rest, aside = client(12, padding, passes).part(0.5, "validation")
    found: dict[int, int] = {}
    for part in (rest, aside):
        for batch in part.batches(1):
            rows = part.index[batch.example]
            ways = zip(rows.tolist(), turned(batch.x).tolist(), batch.weight.tolist(), strict=True)
            found |= {row: int(way) for row, way, weight in ways if weight}
    assert found == whole


# A run ------------------------------------------------------------------------------------------------------

MOST = sum(toy.SIZES)


@dataclass(frozen=True, kw_only=True)
class Ramps(toy.Toy):
    """The toy's labels, and images that say which way round they are."""

    def load(self, root: Path = Path()) -> Splits:
        splits = super().load(root)
        return replace(splits, train_x=ramp(len(splits.train_y)), test_x=ramp(len(splits.test_y)))


@dataclass(frozen=True, kw_only=True)
class Watches(Algorithm):
    """FedAvg, whose clients write down which way round each image was in each of their passes."""

    def init_client(self, task: Task) -> Tree:
        return {"ways": torch.zeros(MOST, task.rounds * task.epochs), "passes": torch.zeros(())}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        ways, passes, begun = private["ways"], private["passes"], 0
        for batch in data.batches(task.epochs):
            begun += int(batch.first == 0)
            rows = losses.one_hot(batch.example, MOST) * (batch.weight * turned(batch.x))[:, None]
            ways = ways + rows.sum(0)[:, None] * losses.one_hot(passes[None] + begun - 1, ways.shape[1])
        return shared, {"ways": ways, "passes": passes + task.epochs}


@dataclass(frozen=True, kw_only=True)
class Pooled(Watches):
    """The same with all images in one place: how often each was seen which way round."""

    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})

    def init_client(self, task: Task) -> Tree:
        return {"straight": torch.zeros(MOST), "mirrored": torch.zeros(MOST)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        straight, mirrored = private["straight"], private["mirrored"]
        for batch in data.batches(task.epochs):
            rows, way = losses.one_hot(data.index[batch.example], MOST) * batch.weight[:, None], turned(batch.x)
            straight, mirrored = straight + (way > 0).float() @ rows, mirrored + (way < 0).float() @ rows
        return shared, {"straight": straight, "mirrored": mirrored}


def run_of(algorithm: Algorithm, engine: str = "serial", setting: Any = SETTING, **how: Any) -> Run:
    return toy.run(algorithm, engine, setting=setting, dataset=Ramps(), **how)


@ENGINES
@pytest.mark.parametrize("epochs", [1, 3])
def test_over_two_consecutive_epochs_each_image_appears_once_in_each_orientation(engine: str, epochs: int) -> None:
    run = toy.finish(run_of(Watches(), engine, replace(SETTING, epochs=epochs)))
    population, found = run.population, 0
    assert len({int(run.store[k]["passes"]) for k in run.store.clients()}) > 1  # cohorts are irregular
    for k in run.store.clients():
        n, passes = len(population.index[k]), int(run.store[k]["passes"])
        ways = run.store[k]["ways"]
        seen = ways[:n, :passes]
        assert (seen.abs() == 1).all() and not ways[n:].any() and not ways[:, passes:].any()
        assert torch.equal(seen[:, 1:], -seen[:, :-1])
        if passes:
            official = torch.cat(run.job.split.clients).unique()[population.index[k]]
            first = first_mirrored("altflip", population.key, official, "cpu")
            assert first is not None and torch.equal(seen[:, 0] < 0, first)
            found += int(first.sum()) > 0
    assert found > 2


def test_stopping_workers_and_engines_change_no_orientation(tmp_path: Path) -> None:
    expected = toy.finish(run_of(Watches())).outcome().digest
    assert toy.finish(run_of(Watches(), "stacked")).outcome().digest == expected
    file = tmp_path / "checkpoint.pt"
    first = run_of(Watches(), checkpoint=file)
    for _ in range(3):
        first.saved = -math.inf  # save after this round, however quick it was
        first.step()
    second = run_of(Watches(), checkpoint=file)
    assert second.progress.round == 3 and toy.finish(second).outcome().digest == expected
    several, ray = hired(partial(surroundings, first.job))
    assert toy.finish(Run(first.job, crew=several)).outcome().digest == expected and ray.handed_out


@pytest.mark.parametrize("participation", [0.3, 1.0])
def test_pooled_images_alternate_by_the_passes_of_their_stream(participation: float) -> None:
    run = toy.finish(run_of(Pooled(), setting=replace(SETTING, rounds=7, eval_every=7, participation=participation)))
    straight, mirrored = run.store[-1]["straight"], run.store[-1]["mirrored"]
    assert (straight - mirrored).abs().max() <= 1
    assert int((straight + mirrored).sum()) == run.outcome().cost["train_samples"]
    assert (straight + mirrored).max() > 1 and (straight != mirrored).any()


def test_tuning_before_the_test_goes_on_from_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = Images.augmented, list[int]()

    def noted(self: Images, index: Tensor, key: Tensor, example: Tensor, before: Any = 0) -> Tensor:
        seen.append(int(before.max()))
        return made(self, index, key, example, before)

    monkeypatch.setattr(Images, "augmented", noted)
    for visit in (False, True):
        seen.clear()
        setting = replace(SETTING, participation=1.0, rounds=2, epochs=3, eval_every=2, final_visit=visit)
        toy.finish(run_of(ALGORITHMS["fedavg_ft"](finetune_epochs=4), setting=setting, sizes=(16, *[0] * 7)))
        trained = 9 if visit else 6
        after = range(trained, trained + 3)  # of the model right after its local work
        assert seen == [*range(trained), *after, *range(trained, trained + 4)]


@ENGINES
def test_images_at_the_server_alternate_by_round(engine: str) -> None:
    run = toy.run(short("fedic"), engine, setting=replace(SETTING, epochs=3, rounds=2, eval_every=2))
    for round in (0, 1):
        auxiliary = run.task_at(round).auxiliary
        assert auxiliary is not None and auxiliary.passes is not None and auxiliary.images.mirrored.any()
        assert auxiliary.passes.tolist() == [3 * round] * len(auxiliary.index)
    toy.finish(run)


def test_without_it_nothing_is_counted() -> None:
    run = toy.run(ALGORITHMS["fedavg"](), setting=replace(SETTING, augment="crop_flip"))
    assert run.population.visit(0, 3, {}).passes is None and not run.population.images.mirrored.any()
