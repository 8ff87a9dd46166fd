"""IFCA: FedAvg with one cluster, choices and means by hand, groups that are found, models that nobody chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured, method, trained, two_groups

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
ALL = replace(toy.SETTING, participation=1.0)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["ifca"](**fields), engine, setting=setting, sizes=sizes)


def cluster(models: Tree, k: int) -> Tree:
    return {part: models[part][f"cluster{k}"] for part in ("body", "head")}


def costs(run: Run, client: int) -> list[float]:
    """The mean cross-entropy of each cluster's model on all of a client's examples."""
    x, y = run.population.images.plain(run.population.index[client]), data_of(run, client).y
    count = len(run.progress.server["head"])
    return [float(F.cross_entropy(run.task.logits(cluster(run.progress.server, k), x), y)) for k in range(count)]


def best(run: Run, client: int) -> int:
    values = costs(run, client)
    return values.index(min(values))


# One cluster ----------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_one_cluster_is_fedavg(engine: str, weights: str) -> None:
    setting = replace(SETTING, client_weights=weights)
    run = toy.finish(start(setting, engine, clusters=1))
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=setting))
    assert largest_difference(cluster(run.progress.server, 0), fedavg.progress.server) == 0.0
    assert run.outcome().metrics["personal"] == fedavg.outcome().metrics["personal"]
    two = toy.finish(start(setting, engine))
    assert largest_difference(cluster(two.progress.server, 0), fedavg.progress.server) > 0


# Clients --------------------------------------------------------------------------------------------------------------


def test_clusters_start_apart_and_the_first_as_everybody() -> None:
    run = start(clusters=4)
    assert largest_difference(cluster(run.progress.server, 0), run.task.init()) == 0.0
    for k in range(4):
        for other in range(k):
            assert largest_difference(cluster(run.progress.server, k), cluster(run.progress.server, other)) > 0.01


@pytest.mark.parametrize("client", [0, 1, 4, 5])
def test_a_client_trains_the_model_of_least_loss_and_no_other(client: int) -> None:
    run = start(replace(toy.SETTING, momentum=0.9, weight_decay=1e-2), clusters=3)
    for _ in range(2):
        run.step()
    upload, _ = toy.upload_once(run, client, run.task_at(2))
    mine = best(run, client)
    assert upload["chosen"].tolist() == [float(k == mine) for k in range(3)]
    for k in range(3):
        before = cluster(run.progress.server, k)
        expected = trained(run, before, data_of(run, client, 2).batches(2)) if k == mine else before
        assert largest_difference(cluster(upload, k), expected) < (5e-6 if k == mine else 1e-30)
        assert (largest_difference(cluster(upload, k), before) > 0) == (k == mine)


def test_all_examples_count_alike_in_the_choice() -> None:
    """Of 300, the 256 of a first batch have label 0 and cost 0.52 or 2.07, the other 44 label 1 and 2.52 or 0.57."""
    run = start(sizes=(300, *[20] * 7))
    rows = run.population.index[0]
    run.population.images.y[rows] = (torch.arange(300) >= 256).long()
    nothing, server = tree.zeros_like(run.task.init()), run.progress.server
    for k, likes in enumerate(([2.0, 0.0], [0.5, 2.0])):
        server["body"][f"cluster{k}"] = nothing["body"]
        server["head"][f"cluster{k}"] = {**nothing["head"], "bias": torch.tensor([*likes, 0.0, 0.0, 0.0, 0.0])}
    assert costs(run, 0) == pytest.approx([244 / 300, 555 / 300], abs=0.01)
    assert method(run).choice(run.task, server, data_of(run, 0)).tolist() == [1.0, 0.0]


def test_of_equal_models_the_first_is_chosen() -> None:
    run = start(clusters=3)
    server = run.progress.server
    run.progress.server = {part: dict.fromkeys(server[part], server[part]["cluster1"]) for part in ("body", "head")}
    assert all(toy.upload_once(run, k)[0]["chosen"].tolist() == [1.0, 0.0, 0.0] for k in (0, 3, 6))


def test_choices_follow_models_whatever_their_places() -> None:
    one, other = start(clusters=3), start(clusters=3)
    server, places = one.progress.server, (2, 0, 1)
    other.progress.server = {
        part: {f"cluster{k}": server[part][f"cluster{place}"] for k, place in enumerate(places)}
        for part in ("body", "head")
    }
    for run in (one, other):
        toy.finish(run)
    for k, place in enumerate(places):
        assert largest_difference(cluster(other.progress.server, k), cluster(one.progress.server, place)) == 0.0


# The server -----------------------------------------------------------------------------------------------------------


def test_a_cluster_is_the_mean_of_those_that_chose_it_and_stays_if_nobody_did() -> None:
    run = start(ALL, clusters=3)
    run.step()
    before, ids = run.progress.server, (0, 1, 3, 6)  # client 6 has no examples
    sent = [toy.upload_once(run, k, run.task_at(1))[0] for k in ids]
    for upload, mine in zip(sent, (2, 0, 2, 1), strict=True):
        upload["chosen"] = torch.eye(3)[mine]
    sizes = torch.tensor([float(toy.SIZES[k]) for k in ids], dtype=torch.float64)
    after = run.algorithm.aggregate(run.task_at(1), before, Uploads(sent, sizes, torch.tensor(ids)))
    assert largest_difference(cluster(after, 1), cluster(before, 1)) == 0.0
    assert largest_difference(cluster(after, 0), cluster(sent[1], 0)) < 1e-7
    mean = mean_by_size(run, (0, 3), [cluster(sent[0], 2), cluster(sent[2], 2)])
    assert largest_difference(cluster(after, 2), mean) < 1e-6


def test_all_models_go_down_and_one_comes_up_with_the_choice() -> None:
    run = start(ALL, clusters=3)
    run.step()
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == 8 * 3 * 4 * parameters
    assert run.progress.cost["bytes_up"] == 8 * (4 * parameters + 3 * 4)


def test_two_groups_of_clients_are_found() -> None:
    run = start(replace(ALL, rounds=6), sizes=(24,) * 8)
    two_groups(run)
    toy.finish(run)
    chosen = [int(method(run).choice(run.task, run.progress.server, data_of(run, k)).argmax()) for k in range(8)]
    assert chosen in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_everybody_is_tested_with_its_choice_by_training_data(engine: str) -> None:
    """Whoever took part, never did, or is held out; nothing is tuned."""
    run = toy.finish(start(replace(toy.SETTING, rounds=3, participation=0.3, unseen=1), engine, clusters=3))
    task, server, seen = run.task_at(2), run.progress.server, run.store.clients()
    idle = next(k for k in range(7) if k not in seen)
    for client in (next(k for k in seen if toy.SIZES[k]), idle, 7):
        named = run.evaluator.models(task, server, server, run.store, [client], True)
        (model,) = named["unseen" if client == 7 else "personal"]
        assert largest_difference(model, cluster(server, best(run, client))) == 0.0
    assert set(run.algorithm.global_variants(task, server)) == {"cluster0", "cluster1", "cluster2"}
    assert run.outcome().metrics["generic"] is None and measured(run, "unseen") > 0.3
