"""FedBN: which layers stay and which travel, FedAvg where there is no norm layer or one client, and newcomers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Tree, models, tree
from bench.contract import toy
from bench.models.layers import convolve
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, epochs=1, weight_decay=1e-2)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch")
GROUP_NORM = replace(BATCH_NORM, norm="group")
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
NORMED = pytest.mark.parametrize("setting", [BATCH_NORM, GROUP_NORM], ids=["batch norm", "group norm"])


def run_of(name: str, engine: str = "serial", setting: Any = BATCH_NORM, sizes: Any = FEW) -> Run:
    return toy.run(ALGORITHMS[name](), engine, setting=setting, sizes=toy.SIZES if setting.model == "mlp" else sizes)


def norms(model: Tree) -> dict[str, Any]:
    """The leaves that a norm layer of ResNet-8 has, by the layers that are followed by one."""
    units = [f"body/{unit}/{layer}/" for unit in ("stage1_1", "stage2_1", "stage3_1") for layer in ("first", "second")]
    layers = ["body/stem/", *units, "body/stage2_1/shortcut/", "body/stage3_1/shortcut/"]
    leaves = tree.flatten(model)
    return {path: leaf for path, leaf in leaves.items() if any(path.startswith(f"{layer}norm/") for layer in layers)}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_on_a_network_without_norm_layers_it_is_fedavg_without_a_generic_model(engine: str) -> None:
    setting = replace(SETTING, model="mlp", rounds=3, clip=1.0, momentum=0.9, unseen=1)
    fedbn, fedavg = (toy.finish(run_of(name, engine, setting)) for name in ("fedbn", "fedavg"))
    assert largest_difference(fedbn.progress.server, fedavg.progress.server) == 0.0
    assert tree.nbytes(fedbn.store.initial) == 0
    mine, theirs = fedbn.outcome().metrics, fedavg.outcome().metrics
    assert mine["generic"] is None and theirs["generic"] is not None
    for metric in ("personal", "personal.masked", "unseen"):
        assert mine[metric] == theirs[metric]


@pytest.mark.equivalence
@NORMED
def test_a_single_client_is_fedavg(setting: Any) -> None:
    setting = replace(setting, clients=1)
    fedbn, fedavg = (toy.finish(run_of(name, setting=setting, sizes=(20,))) for name in ("fedbn", "fedavg"))
    model = tree.merge(fedbn.progress.server, fedbn.store[0])
    assert largest_difference(model, fedavg.progress.server) < 1e-6


@NORMED
def test_norm_layers_stay_those_of_shortcuts_too_and_all_else_travels(setting: Any) -> None:
    run = run_of("fedbn", setting=setting)
    whole = tree.flatten(run.task.init())
    kept = norms(run.task.init())
    assert len(kept) == 9 * (4 if setting.norm == "batch" else 2)
    toy.finish(run)
    upload, private = toy.upload_once(run)
    assert set(tree.flatten(private)) == set(kept)
    assert set(tree.flatten(upload)) == set(tree.flatten(run.progress.server)) == set(whole) - set(kept)
    sent = sum(leaf.nbytes for path, leaf in whole.items() if path not in kept)
    assert run.progress.cost["bytes_up"] == run.progress.cost["bytes_down"] == 2 * 8 * sent
    moved = {path: leaf for path, leaf in tree.flatten(run.store[0]).items()}
    other, start = tree.flatten(run.store[1]), tree.flatten(run.store.initial)
    for path in kept:
        assert float((moved[path] - other[path]).abs().max()) > 1e-6, path
        assert float((moved[path] - start[path]).abs().max()) > 1e-6, path


@NORMED
def test_a_round_is_fedavgs_from_ones_own_norm_layers(setting: Any) -> None:
    """A client trains as in FedAvg from the merged model; what travels is averaged by size."""
    run = run_of("fedbn", setting=setting)
    run.step()
    server = run.progress.server
    trained = []
    for client in (0, 1):
        fedavg = run_of("fedavg", setting=setting)
        fedavg.progress.server = tree.merge(server, run.store[client])
        trained.append(toy.upload_once(fedavg, client, fedavg.task_at(1))[0])
    run.step()
    for client, model in enumerate(trained):
        own = tree.flatten(run.store[client])
        assert max(float((leaf - own[path]).abs().max()) for path, leaf in norms(model).items()) < 1e-6
    one, two = (tree.flatten(model) for model in trained)
    for path, leaf in tree.flatten(run.progress.server).items():
        assert torch.allclose(leaf, (20 * one[path] + 9 * two[path]) / 29, atol=1e-6), path


def test_it_is_not_fedavg_with_running_statistics_at_the_client() -> None:
    """There the norm layers' weights and biases travel. For FedBN that setting changes nothing."""
    own = replace(BATCH_NORM, statistics="personal")
    fedbn, same, fedavg = run_of("fedbn"), run_of("fedbn", setting=own), run_of("fedavg", setting=own)
    for run in (fedbn, same, fedavg):
        toy.finish(run)
    assert largest_difference(fedbn.progress.server, same.progress.server) == 0.0
    assert fedbn.outcome().metrics["personal"] == same.outcome().metrics["personal"]
    path = "body/stage1_1/first/conv/weight"
    mine, theirs = (tree.flatten(run.progress.server)[path] for run in (fedbn, fedavg))
    assert float((mine - theirs).abs().max()) > 1e-4


@NORMED
def test_engines_agree(setting: Any) -> None:
    runs = (toy.finish(run_of("fedbn", engine, replace(setting, rounds=1))) for engine in ("serial", "stacked"))
    assert largest_difference(*(toy.states(run) for run in runs)) < 2e-4


def newcomer(engine: str, setting: Any) -> tuple[Run, Tree]:
    """The model of a client held out, before its head is tuned."""
    run = toy.finish(run_of("fedbn", engine, replace(setting, unseen=1, rounds=1), sizes=(9, 5, 0, 0, 0, 0, 0, 8)))
    task, server = run.task_at(0), run.progress.server
    named = run.evaluator.models(task, server, server, run.store, [7], False)
    (model,) = named["unseen:0 epochs" if setting.unseen_labels else "unseen"]
    return run, model


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_finds_its_own_statistics_under_the_received_layers(engine: str) -> None:
    run, model = newcomer(engine, BATCH_NORM)
    received = tree.flatten(run.progress.server)
    leaves = tree.flatten(model)
    assert all(torch.equal(leaves[path], leaf) for path, leaf in received.items())
    x = run.population.images.plain(run.population.index[7])
    z = convolve(model["body"]["stem"]["conv"], x, padding=1)
    stats = model["body"]["stem"]["norm"]["stats"]
    spread = z.std((0, 2, 3))
    assert float(((stats["mean"] - z.mean((0, 2, 3))) / spread).abs().max()) < 0.1
    assert float((stats["var"] / spread.square()).log().abs().max()) < 0.2


def test_a_client_held_out_learns_weights_of_norm_layers_where_it_has_labels() -> None:
    plain = replace(BATCH_NORM, weight_decay=0.0)
    start = tree.split(norms(models.build("resnet8", 6, (1, 8, 8), "batch").init(torch.tensor(1))), tree.is_statistic)
    for labels in (True, False):
        _, model = newcomer("serial", replace(plain, unseen_labels=labels))
        found = tree.split(norms(model), tree.is_statistic)
        assert (largest_difference(found[1], start[1]) > 1e-2) == labels
        assert (largest_difference(found[1], start[1]) == 0.0) != labels
        assert largest_difference(found[0], start[0]) > 1e-2


def test_a_client_held_out_gets_a_model_that_knows_its_classes() -> None:
    setting = replace(BATCH_NORM, rounds=3, epochs=2, unseen=1, eval_every=3)
    run = toy.finish(run_of("fedbn", setting=setting, sizes=(40, 30, 20, 0, 0, 0, 0, 26)))
    assert measured(run, "unseen") > 0.8
