"""Feature shift: a camera of each client's own, the same in training and in tests, and nothing where it is off."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import keys
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig
from bench.splits import shift
from bench.splits.shift import CAMERAS, shifted
from bench.sweep import driver
from bench.sweep.config import Sweep, parse_dataset
from bench.sweep.pool import InProcess
from bench.validation.recount import recount
from bench.validation.report import validate

SETTING = replace(toy.SETTING, rounds=1, epochs=1, unseen=2)
SPLITS = toy.Toy().load()
SPLIT = toy.split(SPLITS)


def seen(seed: int = 0, **changed: Any) -> tuple[Any, Any]:
    return shifted(toy.Toy(), SPLITS, SPLIT, replace(SETTING, **changed), seed)


def sweep(overrides: dict[str, Any]) -> Sweep:
    method, data = ALGORITHMS["fedavg"](), parse_dataset("digits")
    return Sweep(algorithms=(method,), datasets=(data,), overrides=overrides, data_root=Path("."))


def pictures(n: int = 4, channels: int = 3) -> Tensor:
    return keys.uniform(keys.key(3), n * channels * 64).reshape(n, channels, 8, 8)


def test_each_clients_images_are_changed_by_its_own_camera_and_the_official_ones_are_not() -> None:
    splits, split = seen(shift="contrast")
    official = torch.arange(180)
    assert torch.equal(splits.test_x[official], SPLITS.test_x[official]) and torch.equal(splits.train_y, SPLITS.train_y)
    gains = set()
    for client, (rows, tests, were) in enumerate(zip(SPLIT.clients, split.tests, SPLIT.tests, strict=True)):
        key = keys.fold(keys.key(0), "shift", client)
        for before, after in (
            (SPLITS.train_x[rows], splits.train_x[rows]), (SPLITS.test_x[were], splits.test_x[tests]),
        ):  # fmt: skip
            wanted = shift.contrast(before.float() / 255, key, key, 1.0).clamp(0, 1) * 255
            assert torch.equal(after, wanted.round().to(torch.uint8))
        assert torch.equal(splits.test_y[tests], SPLITS.test_y[were])
        gains.add(float(shift.contrast(torch.ones(1, 1, 1, 1), key, key, 1.0)))
    assert len(gains) == len(SPLIT.clients)
    assert torch.cat([official, *split.tests]).tolist() == list(range(len(splits.test_y)))
    dealt = torch.zeros(len(SPLITS.train_y), dtype=torch.bool).index_fill(0, torch.cat(SPLIT.clients), True)
    assert torch.equal(splits.train_x[~dealt], SPLITS.train_x[~dealt])


def test_it_is_a_function_of_the_splits_seed_and_of_nothing_else() -> None:
    first, again, other = (seen(seed, shift="colour")[0].train_x for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(seen(1, shift="colour", split_seed=0)[0].train_x, first)


def test_clients_held_out_may_be_shifted_more_or_alone() -> None:
    alone, split = seen(shift="colour", severity=0.0, unseen_severity=1.0)
    for client, (rows, tests) in enumerate(zip(SPLIT.clients, split.tests, strict=True)):
        if len(rows):
            assert torch.equal(alone.train_x[rows], SPLITS.train_x[rows]) == (client < 6)
            assert torch.equal(alone.test_x[tests], SPLITS.test_x[SPLIT.tests[client]]) == (client < 6)
    assert seen(shift="colour", severity=0.0)[0] is SPLITS and seen()[0] is SPLITS


@pytest.mark.parametrize("name", CAMERAS)
def test_a_camera_keeps_the_shape_does_nothing_at_severity_0_and_less_at_less(name: str) -> None:
    x, moved = pictures(), []
    for severity in (0.0, 0.1, 1.0):
        y = CAMERAS[name](x, keys.key(8), keys.key(9), severity)
        assert y.shape == x.shape and bool(y.isfinite().all())
        moved.append(float((y - x).abs().mean()))
    assert moved[0] < 1e-6 < moved[2] and moved[1] <= moved[2]
    assert CAMERAS[name](x[:0], keys.key(8), keys.key(9), 1.0).shape == x[:0].shape
    assert CAMERAS[name](pictures(2, 1), keys.key(8), keys.key(9), 1.0).shape == (2, 1, 8, 8)


def test_what_each_camera_does() -> None:
    x, key = pictures(), keys.key(8)
    stretched = shift.contrast(x, key, key, 1.0)
    slope = (stretched - stretched.mean()) / (x - x.mean())
    assert float(slope.std()) < 1e-3 and 0.5 <= float(slope.mean()) <= 1.5
    grey = shift.colour(x[:, :1], key, key, 1.0)
    slope = (grey - grey.mean()) / (x[:, :1] - x[:, :1].mean())
    assert float(slope.std()) < 1e-3  # one channel: a contrast
    mixed = shift.colour(x, key, key, 1.0)
    flat, other = ((each - 0.5).movedim(1, 0).flatten(1) for each in (x, mixed))
    one = torch.cat([flat, torch.ones(1, flat.shape[1])])
    found = torch.linalg.lstsq(one.T, other.T).solution.T
    torch.testing.assert_close(found @ one, other, rtol=1e-3, atol=1e-4)
    assert float((found[:, :3] - torch.eye(3)).diagonal().abs().max()) <= 0.5
    assert 0 < float((found[:, :3] - torch.diag(found[:, :3].diagonal())).abs().max()) <= 0.25
    assert float(shift.blur(x, key, key, 1.0).var()) < float(x.var())
    noisy = shift.noise(x, key, keys.key(1), 1.0) - x
    assert 0 < float(noisy.std()) < 0.11 and abs(float(noisy.mean())) < 0.02
    assert torch.equal(shift.noise(x, key, keys.key(1), 1.0) - x, noisy)
    assert not torch.equal(shift.noise(x, key, keys.key(2), 1.0) - x, noisy)


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_at_severity_0_a_run_has_the_bits_of_one_without(engine: str) -> None:
    runs = [
        toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=replace(SETTING, **more))).outcome()
        for more in ({}, {"shift": "colour", "severity": 0.0}, {"shift": "colour"})
    ]
    assert runs[0].digest == runs[1].digest != runs[2].digest and runs[0].metrics == runs[1].metrics


def test_generic_models_are_tested_on_the_official_images_and_clients_on_their_own() -> None:
    run = toy.run(ALGORITHMS["fedavg"](), setting=replace(SETTING, shift="contrast", severity=1.9))
    run.step()
    population, server = run.population, run.progress.server
    assert len(population.official) == 180 and len(population.test) == 180 + sum(map(len, SPLIT.tests))
    task = run.task_at(0)
    (told,) = run.evaluator.generic(task, server)["generic"]
    assert int(told[2].sum()) == 180
    plain = toy.run(ALGORITHMS["fedavg"](), setting=SETTING).population.test.plain(torch.arange(180))
    answers = run.task.logits(server, plain).argmax(1)
    right = int(told[2][told[0] == told[1]].sum())
    assert right == int((answers == SPLITS.test_y).sum())
    own = population.tests[0]
    answers = run.task.logits(server, population.test.plain(own)).argmax(1)
    found = run.evaluator.personal(task, server, run.store, [0], False)["personal"][0]
    assert int(found[2][found[0] == found[1]].sum()) == int((answers == population.test.y[own]).sum())


def test_models_that_are_handed_in_are_tested_on_the_images_of_their_clients(tmp_path: Path) -> None:
    few = {"rounds": 1, "epochs": 1, "unseen": 2, "shift": "contrast"}
    (ended,) = driver.run(sweep(few).expand(), tmp_path, pool=InProcess(), keep_models=True)
    (one,) = validate(tmp_path, Path(".")).inspected
    assert ended.status == "done" and one.record is not None and one.asked is not None
    assert recount(one.record, one.asked, Path(".")) == []
    other = replace(one.asked, setting=replace(one.asked.setting, shift="none"))
    differ = {said.split()[0] for said in recount(one.record, other, Path("."))}
    assert "personal" in differ and "generic" not in differ


# What is said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"severity": 2.0}, "severity = 2.0: nothing is shifted; leave it out, or choose --set shift=colour"),
        ({"shift": "blur", "unseen_severity": 2.0}, "unseen_severity = 2.0: no client is held out; say how many"),
        ({"shift": "blur", "attack": "pgd"}, "attack = pgd: images that are shifted (blur) are not attacked"),
        ({"shift": "fog"}, "shift = 'fog': must be one of none, colour, contrast, blur, noise"),
        ({"shift": "blur", "severity": math.inf}, "severity = inf: must be a number from 0"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        sweep(overrides).expand()
    assert said in str(caught.value)


def test_images_in_files_are_not_shifted() -> None:
    splits = replace(SPLITS, train_x=object())  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="shift = blur: these images are read from files while a run trains"):
        shifted(toy.Toy(), splits, SPLIT, replace(SETTING, shift="blur"), 0)
