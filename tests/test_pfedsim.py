"""pFedSim: FedAvg in its warm-up, weights by hand, local training among strangers, heads that are nobody else's."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=4, weight_decay=1e-2, clip=1.0)
ALL = replace(toy.SETTING, participation=1.0)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["pfedsim"](**fields), engine, setting=setting, sizes=sizes)


def module() -> Any:
    return importlib.import_module("bench.algorithms.pfedsim")


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_have_their_values_by_hand() -> None:
    """-log(1 - similarity) of 0.9999, 0.8, 0.5 and 0: 9.210340, 1.609438, 0.693147, 0."""
    similarity = torch.tensor([[1.0, 0.8, 0.5, 0.0]] * 4)
    assert module().shares(similarity, 0).tolist() == pytest.approx([0.8, 0.139794, 0.060206, 0.0], abs=1e-5)
    assert module().shares(torch.eye(4), 2).tolist() == [0.0, 0.0, 1.0, 0.0]
    twins = module().shares(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 1)
    assert twins.tolist() == [0.5, 0.5]


def test_heads_are_alike_by_the_mean_cosine_of_their_rows() -> None:
    """Rows at angles of 0 and 90 degrees, of any length; at 180 and 90; a row of zeros."""
    a, b = [[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 0.0]]
    c, none = [[-1.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]
    found = module().likeness(torch.tensor([a, b, c, none]))
    expected = [[1.0, 0.5, 0.0, 0.5], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.5]]
    assert torch.allclose(found, torch.tensor(expected))


# The warm-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_a_warm_up_is_fedavg(engine: str) -> None:
    run = toy.finish(start(engine=engine, warm_up=1.0))
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=SETTING))
    assert largest_difference(model(run), fedavg.progress.server) == 0.0
    assert run.outcome().metrics["personal"] == fedavg.outcome().metrics["personal"]
    mixed = toy.finish(start(engine=engine))
    assert mixed.outcome().metrics["personal"] != fedavg.outcome().metrics["personal"]
    assert largest_difference(tree.pick(mixed.progress.server["models"], 0), fedavg.progress.server) > 1e-3


def test_it_ends_halfway_and_everybody_goes_on_from_its_model() -> None:
    run = start(replace(toy.SETTING, rounds=5, participation=0.4, sampling="independent"))
    for _ in range(3):
        run.step()
        assert all(largest_difference(toy.received(run, k, run.progress.round), model(run)) == 0.0 for k in range(8))
    warm = tree.clone(model(run))
    for _ in range(2):
        run.step()
    assert largest_difference(model(run), warm) == 0.0
    late = [*run.population.cohort(3), *run.population.cohort(4)]
    for k in range(8):
        moved = largest_difference(tree.pick(run.progress.server["models"], k), warm)
        assert (moved > 0) == (k in late and toy.SIZES[k] > 0)


# Mixing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_among_strangers_it_is_local_training(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module(), "likeness", lambda heads: torch.zeros(len(heads), len(heads)))
    run = toy.finish(start(engine=engine, warm_up=0.0))
    local = toy.finish(toy.run(ALGORITHMS["local"](), engine, setting=SETTING))
    for k in local.store.clients():
        assert largest_difference(tree.pick(run.progress.server["models"], k), local.store[k]) == 0.0
    monkeypatch.undo()
    mixed = toy.finish(start(engine=engine, warm_up=0.0)).progress.server["models"]
    assert largest_difference(mixed, run.progress.server["models"]) > 1e-3


def test_bodies_are_mixed_and_heads_are_ones_own() -> None:
    run = start(ALL)
    for _ in range(3):
        run.step()
    server = run.progress.server
    for k in (0, 3, 7):
        weights = module().shares(server["similarity"], k)
        assert 0 < float(weights[k]) < 1 and int((weights > 0).sum()) > 2
        sent = toy.received(run, k, 3)
        assert largest_difference(sent["head"], tree.pick(server["models"]["head"], k)) == 0.0
        bodies = server["models"]["body"]
        mixed = tree.map(lambda leaf, w=weights: torch.tensordot(w.double(), leaf.double(), 1), bodies)
        assert largest_difference(sent["body"], mixed) < 1e-6
        assert largest_difference(sent["body"], tree.pick(server["models"]["body"], k)) > 1e-4


def test_a_round_tells_how_alike_those_are_that_took_part_in_it() -> None:
    run = start(warm_up=0.0)
    ids = (1, 4, 6, 7)  # client 6 has no examples
    sent = [toy.upload_once(run, k)[0] for k in ids]
    before = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    server = {**run.progress.server, "similarity": before}
    uploads = Uploads(sent, torch.tensor([float(toy.SIZES[k]) for k in ids]), torch.tensor(ids))
    after = run.algorithm.aggregate(run.task_at(0), server, uploads)["similarity"]
    alike = module().likeness(torch.stack([upload["head"]["weight"] for upload in sent]))
    for a in range(8):
        for b in range(8):
            expected = before[a, b]
            if a in ids and b in ids:
                expected = alike[ids.index(a), ids.index(b)] if 6 not in (a, b) else torch.tensor(0.0)
            assert after[a, b] == expected
    assert torch.equal(alike, alike.T)


def test_clients_of_the_same_classes_are_most_alike() -> None:
    """Dealt by label, clients k and k + 5 of 24 examples hold the same classes."""
    run = toy.finish(start(replace(ALL, rounds=6), sizes=(24,) * 8))
    for k, like in ((0, 5), (1, 6), (2, 7), (5, 0), (6, 1), (7, 2)):
        row = run.progress.server["similarity"][k].tolist()
        assert max((j for j in range(8) if j != k), key=lambda j: row[j]) == like


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_gets_the_model_of_the_warm_up(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=8, unseen=1, eval_every=8), engine))
    assert largest_difference(run.algorithm.send(run.task_at(7), run.progress.server, None), model(run)) == 0.0
    assert measured(run, "unseen") > 0.8 and run.outcome().metrics["generic"] is None


def test_a_model_goes_down_and_one_comes_up() -> None:
    run = toy.finish(start(ALL))
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == run.progress.cost["bytes_up"] == 4 * 8 * 4 * parameters
