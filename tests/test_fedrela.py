"""FedReLa: FedAvg until it relabels, chances by numpy, labels that change once, towards rarer classes only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench import Batch, LocalData, Tree, keys, tree
from bench.contract import toy
from bench.data import Images
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured, method, trained

SETTING = replace(toy.SETTING, participation=1.0, rounds=4, weight_decay=1e-2)
EVEN = (120, 120, 120, 120)
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""
EAGER: dict[str, Any] = {"start": 0.5, "top": 0.5}


def run_of(
    name: str = "fedrela", engine: str = "serial", setting: Any = SETTING, sizes: Any = toy.SIZES, **fields: Any
) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=replace(setting, clients=len(sizes)), sizes=sizes)


def data_of(run: Run, client: int, round: int = 0) -> LocalData:
    visit = run.population.visit(client, round, {})
    data = LocalData(
        run.population.images, visit.index, torch.tensor(len(visit.index)), visit.key, visit.class_counts, 16
    )
    return replace(data, client_key=visit.client_key)


def labels(run: Run, model: Tree, client: int, round: int = 0) -> list[int]:
    found: list[int] = method(run).relabelled(run.task, model, data_of(run, client, round)).tolist()
    return found


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("off", [{"start": 1.0}, {"top": 0.0, "start": 0.0}])
def test_switched_off_it_is_fedavg(engine: str, off: dict[str, float]) -> None:
    runs = [toy.finish(run_of(name, engine, **fields)) for name, fields in (("fedrela", off), ("fedavg", {}))]
    assert largest_difference(*(run.progress.server for run in runs)) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_with_even_classes_nobody_relabels(engine: str) -> None:
    runs = [
        toy.finish(run_of(name, engine, sizes=EVEN, **fields)) for name, fields in (("fedrela", EAGER), ("fedavg", {}))
    ]
    assert largest_difference(*(run.progress.server for run in runs)) == 0.0


@pytest.mark.equivalence
def test_it_is_fedavg_until_labels_change() -> None:
    run, fedavg = run_of(**EAGER), run_of("fedavg")
    for round in range(4):
        run.step()
        fedavg.step()
        assert (largest_difference(run.progress.server, fedavg.progress.server) == 0.0) == (round < 2)


def test_at_its_defaults_it_changes_something() -> None:
    setting = replace(SETTING, rounds=10)
    runs = [toy.finish(run_of(name, setting=setting)) for name in ("fedrela", "fedavg")]
    assert largest_difference(*(run.progress.server for run in runs)) > 1e-5


def by_hand(q: Any, y: Any, counts: Any, top: float) -> Any:
    """Entry by entry."""
    n, classes = q.shape
    score = np.zeros_like(q)
    for i in range(n):
        alike = q[y == y[i]]
        for j in range(classes):
            score[i, j] = (q[i, j] - alike[:, j].mean()) / max(alike[:, j].std(), 1e-6)
    rarity = [1 - (c - min(counts)) / (max(counts) - min(counts)) for c in counts]
    chance = np.zeros_like(q)
    for j in range(classes):
        threshold = sorted(score[:, j])[n - 1 - min(int(top * n), n - 1)]
        for i in range(n):
            chance[i, j] = max(np.tanh(score[i, j] - threshold), 0) * max(rarity[j] - rarity[y[i]], 0)
    return chance


@pytest.mark.parametrize("top", [0.05, 0.3, 1.0])
def test_chances_are_those_by_hand(top: float) -> None:
    run = run_of(top=top)
    data = data_of(run, LOPSIDED)
    q = torch.rand(len(data.y), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
    found = method(run).chances(q, data).numpy()
    expected = by_hand(q.numpy(), data.y.numpy(), data.class_counts.tolist(), top)
    assert np.abs(found - expected).max() < 1e-6 and (expected > 0.05).sum() >= 3


def test_four_examples_on_paper() -> None:
    """Of class 0, of which there are three, the first looks most like class 1: 0.8 against a mean of 0.4; the single
    example of class 1 is its own mean.
    """
    q = torch.tensor([[0.2, 0.8], [0.8, 0.2], [0.8, 0.2], [0.1, 0.9]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1])
    images = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), y, (0.5,), (0.5,))
    data = LocalData(images, torch.arange(4), torch.tensor(4), keys.key(1), torch.tensor([3, 1]), 16)
    z = 0.4 / np.sqrt((0.4**2 + 2 * 0.2**2) / 3)
    for top, threshold in ((0.25, 0.0), (0.0, z)):  # the second highest score of label 1, and the highest
        found = method(run_of(top=top)).chances(q, data)
        assert float(found[0, 1]) == pytest.approx(np.tanh(z - threshold), abs=1e-9)
        assert float(found.sum()) == pytest.approx(float(found[0, 1]), abs=1e-9)


def test_labels_change_towards_rarer_classes_as_often_as_chances_say() -> None:
    run = run_of(**EAGER)
    model, data = toy.finish(run_of("fedavg")).progress.server, data_of(run, LOPSIDED)
    q = run.task.logits(model, run.population.images.plain(data.index)).double().softmax(1)
    chance = by_hand(q.numpy(), data.y.numpy(), data.class_counts.tolist(), 0.5)
    changed = np.zeros(len(data.y))
    for seed in range(300):
        again = replace(data, client_key=keys.key(seed))
        y = method(run).relabelled(run.task, model, again)
        moved = y != data.y
        assert bool((data.class_counts[y] < data.class_counts[data.y])[moved].all())
        changed += moved.numpy()
    expected = 1 - (1 - chance).prod(1)
    assert np.abs(changed / 300 - expected).max() < 0.12 and abs((changed / 300 - expected).mean()) < 0.015
    assert expected.sum() > 2


def test_of_several_labels_the_likeliest_is_taken() -> None:
    run, data = run_of(), data_of(run_of(), LOPSIDED)

    class Sure(type(run.algorithm)):  # type: ignore[misc]
        def chances(self, said: torch.Tensor, data: LocalData) -> torch.Tensor:
            return torch.tensor([0.0, 1.1, 1.3, 0.0, 1.2, 0.0]).expand(len(data.y), 6)

    assert set(Sure().relabelled(run.task, run.progress.server, data).tolist()) == {2}


def test_labels_stay_changed_for_the_rest_of_the_run() -> None:
    """The model that gave them is that of the first late round, at each client; later ones do not matter."""
    run = run_of(**EAGER)
    models = []
    for _ in range(4):
        models.append(run.progress.server)
        run.step()
    assert largest_difference(run.store[LOPSIDED]["teacher"], models[2]) == 0.0
    first, later = labels(run, models[2], LOPSIDED, 2), labels(run, models[2], LOPSIDED, 3)
    assert first == later != data_of(run, LOPSIDED).y.tolist()


def test_a_late_step_is_one_on_the_changed_labels() -> None:
    run = run_of(start=0.0, top=0.5)
    run.progress.server = toy.finish(run_of("fedavg")).progress.server
    y, data = torch.tensor(labels(run, run.progress.server, LOPSIDED)), data_of(run, LOPSIDED)
    assert y.tolist() != data.y.tolist()
    batches = [Batch(batch.x, y[batch.example], batch.weight) for batch in data.batches(2)]
    upload, private = toy.upload_once(run, LOPSIDED)
    assert largest_difference(upload, trained(run, run.progress.server, batches)) < 1e-6
    assert float(private["relabelled"]) == 1.0
    assert data_of(run, LOPSIDED).y.tolist() == data.y.tolist()  # the true labels are as they were


def test_nothing_is_sent_that_fedavg_does_not_send() -> None:
    costs = [toy.finish(run_of(name)).progress.cost for name in ("fedrela", "fedavg")]
    assert all(costs[0][way] == costs[1][way] for way in ("bytes_up", "bytes_down"))


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_engines_agree_and_padding_counts_for_nothing(model: str) -> None:
    setting = replace(SETTING, rounds=1, epochs=1, model=model, norm="batch" if model == "resnet8" else "group")
    sizes = (20, 9, 0, 0, 0, 0, 0, 0) if model == "resnet8" else toy.SIZES
    runs = [toy.finish(run_of("fedrela", engine, setting, sizes, start=0.0)) for engine in ("serial", "stacked")]
    assert largest_difference(*(tree.parameters(toy.states(run)) for run in runs)) < 1e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(toy.run(ALGORITHMS["fedrela"](), engine, setting=setting)), "unseen") > 0.8


def test_the_defaults_are_the_releases() -> None:
    method = ALGORITHMS["fedrela"]()
    assert (method.start, method.top) == (0.9, 0.05)
