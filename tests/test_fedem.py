"""FedEM: FedAvg with one component, both steps by hand, a likelihood that does not fall, mixtures that are found."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured, method, trained, two_groups

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
PLAIN = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedem"](**fields), engine, setting=setting, sizes=sizes)


def component(models: Tree, m: int) -> Tree:
    return {part: models[part][f"component{m}"] for part in ("body", "head")}


def costs(run: Run, client: int, count: int = 3) -> Tensor:
    """The cross-entropy of each example, as it is, under each component: (n, M)."""
    x, y = run.population.images.plain(run.population.index[client]), data_of(run, client).y
    each = [run.task.logits(component(run.progress.server, m), x) for m in range(count)]
    return torch.stack([F.cross_entropy(scores, y, reduction="none") for scores in each], 1)


def responsible(costs: Tensor, mixture: Tensor) -> Tensor:
    joint = mixture * (-costs).exp()
    return joint / joint.sum(1, keepdim=True)


# Steps ----------------------------------------------------------------------------------------------------------------


def test_responsibilities_have_their_values_by_hand() -> None:
    module = importlib.import_module("bench.algorithms.fedem")
    rows = torch.tensor([[0.1, 2.0], [1.5, 0.2], [0.7, 0.7]])
    share = module.responsibilities(rows, torch.tensor([0.5, 0.5]))
    expected = torch.tensor([[0.869892, 0.130108], [0.214165, 0.785835], [0.5, 0.5]])
    assert torch.allclose(share, expected, atol=1e-6)
    third = replace(data_of(start(), 0), n=torch.tensor(3), index=torch.arange(3))
    mixture = module.maximised(share, torch.tensor([0.5, 0.5]), third)
    assert torch.allclose(mixture, torch.tensor([0.528019, 0.471981]), atol=1e-6)
    uneven = module.responsibilities(rows[:1], torch.tensor([0.2, 0.8]))
    assert float(uneven[0, 0]) == pytest.approx(0.2 * math.exp(-0.1) / (0.2 * math.exp(-0.1) + 0.8 * math.exp(-2.0)))
    assert module.responsibilities(rows, torch.tensor([0.0, 1.0]))[:, 1].tolist() == [1.0] * 3


@pytest.mark.parametrize("client", [0, 3])
def test_components_are_trained_on_what_is_theirs(client: int) -> None:
    """Each on the mean over a batch of q times cross-entropy, q of the received models, whatever the order."""
    run = start(PLAIN)
    run.step()
    run.store[client] = {"mixture": torch.tensor([0.2, 0.5, 0.3])}
    share = responsible(costs(run, client), torch.tensor([0.2, 0.5, 0.3]))
    upload, kept = toy.upload_once(run, client, run.task_at(1))
    assert torch.allclose(kept["mixture"], share.mean(0), atol=1e-6)
    for m in range(3):
        w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(component(run.progress.server, m)).values()]
        optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
        for batch in data_of(run, client, 1).batches(2):
            optimiser.zero_grad()
            scores = F.linear(torch.relu(F.linear(batch.x.flatten(1), w[0], w[1])), w[2], w[3])
            (share[batch.example, m] * F.cross_entropy(scores, batch.y, reduction="none")).mean().backward()
            optimiser.step()
        expected = dict(zip(tree.flatten(component(upload, m)), (p.detach() for p in w), strict=True))
        assert largest_difference(component(upload, m), tree.unflatten(expected)) < 5e-6


def test_a_component_that_is_hardly_responsible_hardly_moves() -> None:
    """All responsibilities of a batch may be far below one in sum."""
    run = start(replace(toy.SETTING, momentum=0.0))
    run.store[0] = {"mixture": torch.tensor([1 - 2e-6, 1e-6, 1e-6])}
    upload, _ = toy.upload_once(run)
    moved = [largest_difference(component(upload, m), component(run.progress.server, m)) for m in range(3)]
    assert moved[0] > 1e-2 and 0 < max(moved[1:]) < 1e-6


def test_the_likelihood_of_a_client_alone_never_falls() -> None:
    setting = replace(toy.SETTING, clients=1, participation=1.0, momentum=0.0, epochs=1, batch_size=1000, rounds=12)
    run = start(replace(setting, lr=0.1), sizes=(96,))
    found = []
    for _ in range(12):
        mixture = run.store[0]["mixture"]
        found.append(float((mixture * (-costs(run, 0)).exp()).sum(1).log().sum()))
        run.step()
    assert found == sorted(found) and found[-1] > found[0] + 20


# Rounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_one_component_is_fedavg(engine: str) -> None:
    run = toy.finish(start(engine=engine, components=1))
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=SETTING))
    assert largest_difference(component(run.progress.server, 0), fedavg.progress.server) == 0.0
    assert run.outcome().metrics["personal"] == fedavg.outcome().metrics["personal"]
    three = toy.finish(start(engine=engine)).progress.server
    assert largest_difference(component(three, 0), fedavg.progress.server) > 1e-3


def test_components_start_apart_and_equal_ones_stay_equal() -> None:
    run = start()
    server = run.progress.server
    assert largest_difference(component(server, 0), run.task.init()) == 0.0
    assert largest_difference(component(server, 1), component(server, 2)) > 0.01
    run.progress.server = {part: dict.fromkeys(server[part], server[part]["component0"]) for part in server}
    toy.finish(run)
    assert largest_difference(component(run.progress.server, 0), component(run.progress.server, 2)) == 0.0
    assert torch.allclose(run.store[0]["mixture"], torch.full((3,), 1 / 3))


def test_the_server_averages_each_component() -> None:
    run = start(replace(toy.SETTING, participation=1.0))
    sent = [toy.upload_once(run, k)[0] for k in range(8)]
    run.step()
    for m in range(3):
        mean = mean_by_size(run, range(8), [component(upload, m) for upload in sent])
        assert largest_difference(component(run.progress.server, m), mean) < 1e-6
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == run.progress.cost["bytes_up"] == 8 * 3 * 4 * parameters


def test_clients_of_two_label_permutations_find_their_component() -> None:
    """Each component has begun with one of the groups."""
    run = start(replace(toy.SETTING, participation=1.0, rounds=3), sizes=(24,) * 8, components=2)
    two_groups(run)
    begun = [trained(run, run.task.init(), data_of(run, k).batches(10)) for k in (0, 7)]
    run.progress.server = {part: {f"component{m}": w[part] for m, w in enumerate(begun)} for part in ("body", "head")}
    toy.finish(run)
    mixtures = torch.stack([run.store[k]["mixture"] for k in range(8)])
    assert torch.allclose(mixtures.sum(1), torch.ones(8), atol=1e-6)
    assert mixtures.argmax(1).tolist() == [0] * 4 + [1] * 4 and (mixtures.max(1).values > 0.9).all()


# Tests ----------------------------------------------------------------------------------------------------------------


def test_a_mixture_of_probabilities_is_what_is_tested() -> None:
    run = start()
    x, weights = run.population.images.plain(torch.arange(5)), torch.tensor([0.2, 0.3, 0.5])
    scores = run.algorithm.predict(run.task, {**run.progress.server, "mixture": weights}, x)
    each = [run.task.logits(component(run.progress.server, m), x).softmax(1) for m in range(3)]
    mixed = 0.2 * each[0] + 0.3 * each[1] + 0.5 * each[2]
    assert torch.allclose(scores.exp(), mixed, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_take_one_more_step_for_the_test_and_those_of_newcomers_eleven(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=3, participation=0.3, unseen=1), engine))
    task, server, seen = run.task_at(2), run.progress.server, run.store.clients()
    idle = next(k for k in range(7) if k not in seen)
    for client in (next(k for k in seen if toy.SIZES[k]), idle, 7):
        mixture = run.store[client]["mixture"]
        for _ in range(1 if client in seen else 11):
            mixture = responsible(costs(run, client), mixture).mean(0)
        named = run.evaluator.models(task, server, server, run.store, [client], True)
        (model,) = named["unseen" if client == 7 else "personal"]
        assert torch.allclose(model["mixture"], mixture, atol=1e-5)
        assert largest_difference({part: model[part] for part in server}, server) == 0.0
    assert run.outcome().metrics["generic"] is None and measured(run, "unseen") > 0.3


def test_without_labels_all_components_count_alike() -> None:
    run = start()
    run.step()
    data = data_of(run, 0).unlabelled()
    fresh = run.algorithm.newcomer(run.task, run.progress.server, data)
    assert torch.allclose(fresh["mixture"], torch.full((3,), 1 / 3))
    assert method(run).costs(run.task, run.progress.server, data).abs().max() == 0
