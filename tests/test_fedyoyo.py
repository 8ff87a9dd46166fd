"""FedYoYo: effective numbers and priors by hand, its steps against a loop written out, FedAvg where it is off."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2, clip=1.0, augment="crop")
PLAIN = replace(SETTING, augment="none")
"""Both views are the same."""
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
OFF: dict[str, Any] = {"distil": 0.0, "tau": 0.0}
NOW: dict[str, Any] = {"warmup": 1}
"""The teaching has its whole weight from the first round on."""
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""
EFFECTIVE = torch.tensor([30.0, 20.0, 10.0, 5.0, 3.0, 2.0])

fedyoyo = importlib.import_module("bench.algorithms.fedyoyo")


def run_of(name: str, engine: str = "serial", setting: Setting = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def trained(run: Run, client: int = LOPSIDED, round: int = 0) -> Tree:
    task = run.task_at(round)
    return toy.upload_once(run, client, task, run.algorithm.exchanges(task)[-1])[0]


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])


def score(w: Tree, x: Tensor) -> Tensor:
    logits: Tensor = hidden(w["body"], x) @ w["head"]["weight"].T + w["head"]["bias"]
    return logits


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_switched_off_it_is_fedavg_of_doubled_batches(engine: str) -> None:
    """Of images that are twice the same; only rounding tells them from once."""
    runs = run_of("fedyoyo", engine, PLAIN, **OFF), run_of("fedavg", engine, PLAIN)
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) < 1e-5


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_equal_views_teach_nothing(engine: str) -> None:
    runs = [run_of("fedyoyo", engine, PLAIN, distil=distil, **NOW) for distil in (0.0, 50.0)]
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) < 1e-4


@pytest.mark.parametrize("on", [{"tau": 1.5}, {"distil": 1.5}])
def test_each_of_the_two_changes_something_at_its_default(on: dict[str, Any]) -> None:
    states = [model(toy.finish(run_of("fedyoyo", **{**OFF, **fields}))) for fields in (on, {})]
    assert largest_difference(*states) > 1e-4


@pytest.mark.parametrize("own", [0.1, 1.0])
def test_mixtures_once_and_again_differ_unless_nothing_else_is_in_them(own: float) -> None:
    states = [model(toy.finish(run_of("fedyoyo", own=own, mixing=mixing))) for mixing in ("once", "drift")]
    assert (largest_difference(*states) > 1e-3) == (own < 1)


def numbers(rows: Any, classes: Any) -> list[float]:
    """1 / aᵀRa of each class, by all pairs."""
    found = []
    for c in range(3):
        mine = rows[classes == c]
        if len(mine) > 1:
            cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in mine] for b in mine]
            found.append(1 / np.mean(cosines))
        else:
            found.append(float(len(mine)))
    return found


def test_effective_numbers_by_hand() -> None:
    """Of two alike one, of two at right angles two, and of none none."""
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 9.0], [5.0, 5.0]])
    of_class = F.one_hot(torch.tensor([0, 0, 1, 1, 2]), 4).float()
    assert fedyoyo.effective_numbers(rows, of_class).tolist() == pytest.approx([1, 2, 1, 0])
    padded = of_class.clone()
    padded[1] = padded[3] = 0
    assert fedyoyo.effective_numbers(rows, padded).tolist() == pytest.approx([1, 1, 1, 0])
    draws = np.random.default_rng(3)
    drawn, classes = draws.normal(size=(20, 5)) + 0.7, draws.integers(0, 3, 20)
    of_class = F.one_hot(torch.from_numpy(classes), 3).float()
    found = fedyoyo.effective_numbers(torch.from_numpy(drawn).float(), of_class)
    assert found.tolist() == pytest.approx(numbers(drawn, classes), rel=1e-4)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert fedyoyo.effective_numbers(opposite, torch.ones(2, 1)).tolist() == pytest.approx([1e6])


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_cohort_measures_and_what_it_measured_is_the_prior_of_the_same_round(engine: str) -> None:
    run = run_of("fedyoyo", engine, replace(PLAIN, rounds=1))
    body, expected = run.progress.server["body"], np.ones(6)
    for client in range(8):
        data = data_of(run, client)
        if not len(data.index):
            continue
        x, y = data.images.plain(data.index), data.y
        z = hidden(body, x)
        apart = z - torch.stack([z[y == c].mean(0) if (y == c).any() else z[0] for c in range(6)])[y]
        for start in range(0, len(y), 16):
            here = slice(start, start + 16)
            for c in y[here].unique().tolist():
                mine = apart[here][y[here] == c].double().numpy()
                along = mine / np.maximum(np.linalg.norm(mine, axis=1, keepdims=True), 1e-12)
                expected[c] += 1 if len(mine) == 1 else 1 / max(((along.mean(0)) ** 2).sum(), 1e-6)
    believed = expected <= 1e4
    expected[~believed] = expected[believed].mean()
    run.step()
    assert run.progress.server["effective"].tolist() == pytest.approx(expected.tolist(), rel=1e-2)
    prior = run.algorithm.broadcast(run.task, run.progress.server)["prior"]
    assert prior.tolist() == pytest.approx((expected / expected.sum()).tolist(), rel=1e-2)


def estimated(last: list[float], *sent: list[float]) -> list[float]:
    run = run_of("fedyoyo")
    algorithm: Any = run.algorithm
    uploads = Uploads([{"effective": torch.tensor(each)} for each in sent], torch.ones(len(sent)))
    server = {**run.progress.server, "effective": torch.tensor(last)}
    found: list[float] = algorithm.estimate(run.task, server, uploads)["effective"].tolist()
    return found


def test_estimates_by_hand() -> None:
    """The first is the sum and one, but for what is not believed; a later one moves by a tenth, and by 100 at most."""
    assert estimated([0.0] * 3, [1.0, 2.0, 3.0], [0.0, 5.0, 2e4]) == pytest.approx([2, 8, 5])
    assert estimated([10.0, 50.0, 60.0], [19.0, 5e4, 9.0]) == pytest.approx([11, 150, 55])
    assert estimated([10.0, 5000.0], [19.0, 0.0]) == pytest.approx([11, 4900])


def test_a_prior_is_even_as_long_as_nothing_is_known() -> None:
    run = run_of("fedyoyo")
    assert toy.received(run, 0)["prior"].tolist() == pytest.approx([1 / 6] * 6)
    run.progress.server["effective"] = EFFECTIVE
    assert toy.received(run, 0)["prior"].tolist() == pytest.approx((EFFECTIVE / 70).tolist())


def test_what_one_view_teaches_by_hand() -> None:
    """The first image is taken for what it is, the second is not, the third is padding."""
    first = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    second = torch.tensor([[0.5, 1.0], [0.0, 0.0], [0.0, 3.0]], requires_grad=True)
    y, weight = torch.tensor([0, 0, 0]).repeat(2), torch.tensor([1.0, 1.0, 0.0]).repeat(2)
    batch = Batch(torch.zeros(6, 1), y, weight, views=2)
    value = fedyoyo.self_taught(torch.cat([first, second]), batch, 2.0)
    p, q = (np.exp(each) / np.exp(each).sum() for each in (np.array([1.0, 0.0]), np.array([0.25, 0.5])))
    assert value.item() == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)
    value.backward()
    assert first.grad is None or first.grad.eq(0).all()
    assert (
        second.grad is not None
        and second.grad[1:].eq(0).all()
        and second.grad[0].tolist() == pytest.approx(((q - p) / 2).tolist(), abs=1e-6)
    )
    nobody = Batch(torch.zeros(6, 1), 1 - y, weight, views=2)
    assert fedyoyo.self_taught(torch.cat([first[:1].repeat(3, 1), second]), nobody, 2.0).item() == 0.0


@pytest.mark.parametrize("round", [0, 4, 30])
@pytest.mark.parametrize("mixing", ["once", "drift"])
def test_steps_are_those_of_the_papers_loss(mixing: str, round: int) -> None:
    setting = replace(SETTING, clip=None, momentum=0.9, batch_size=8, rounds=40)
    run = run_of("fedyoyo", setting=setting, mixing=mixing, warmup=20, distil=4.0, own=0.2)
    run.progress.server = {**toy.finish(run_of("fedavg")).progress.server, "effective": EFFECTIVE}
    visit = run.population.visit(LOPSIDED, round, {})
    data = replace(data_of(run, LOPSIDED), key=visit.key)
    mine, prior = data.class_counts / len(data.index), EFFECTIVE / 70
    weight, mixture = 4.0 * min((round + 1) / 20, 1.0), 0.8 * prior + 0.2 * mine
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model(run)).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    taught = 0
    for batch in data.batches(2, views=2):
        z = score(w, batch.x) + (mixture**1.5 + 1e-9).log()
        half = len(z) // 2
        loss = F.cross_entropy(z, batch.y)
        right = z[:half].argmax(1) == batch.y[:half]
        if right.any():
            said, wanted = (z[half:][right] / 1.5).log_softmax(1), (z[:half][right] / 1.5).softmax(1).detach()
            loss = loss + weight * F.kl_div(said, wanted, reduction="batchmean")
            taught += int(right.sum())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mixture = 0.8 * mixture + 0.2 * mine if mixing == "drift" else mixture
    assert 10 < taught < 2 * len(data.index)
    assert largest_difference(trained(run, round=round), tree.map(torch.Tensor.detach, w)) < 5e-5


def test_views_of_an_image_come_to_agree_the_more_they_teach() -> None:
    apart = []
    for distil in (0.0, 1.0, 3.0):
        run = run_of("fedyoyo", setting=replace(SETTING, epochs=10), distil=distil, **NOW)
        run.progress.server = {**toy.finish(run_of("fedavg")).progress.server, "effective": EFFECTIVE}
        data = data_of(run, LOPSIDED)
        shift = 1.5 * (0.9 * EFFECTIVE / 70 + 0.1 * data.class_counts / len(data.index)).log()
        upload, (batch,) = trained(run), data.batches(1, "test", views=2, batch_size=100)
        first, second = (score(upload, batch.x) + shift).log_softmax(1).chunk(2)
        apart.append(float((first.exp() * (first - second)).sum(1).mean()))
    assert apart == sorted(apart, reverse=True) and apart[2] < 0.8 * apart[0]


def test_effective_numbers_come_up_and_the_prior_goes_down_twice_with_a_model() -> None:
    run, fedavg = toy.finish(run_of("fedyoyo")), toy.finish(run_of("fedavg"))
    assert run.progress.cost["bytes_up"] - fedavg.progress.cost["bytes_up"] == 2 * 8 * 4 * 6
    down = fedavg.progress.cost["bytes_down"]
    assert run.progress.cost["bytes_down"] == 2 * down + 2 * 2 * 8 * 4 * 6
    assert ALGORITHMS["fedyoyo"].tier == "L"


def test_engines_agree_under_batch_norm_and_padding_counts_for_nothing() -> None:
    for setting, most in ((BATCH_NORM, 2e-4), (replace(SETTING, rounds=1, clip=None), 2e-5)):
        runs = [toy.finish(run_of("fedyoyo", engine, setting, **NOW)) for engine in ("serial", "stacked")]
        assert largest_difference(*(model(run) for run in runs)) < most


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedyoyo", engine, setting)), "unseen") > 0.8
