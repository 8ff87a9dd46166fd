"""FedAFA: FedAvg until its epilogue, generated features that the model takes for rare classes, its loss by autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured, method, trained

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2)
CNN = replace(SETTING, model="small_cnn")
EVEN = (120, 120, 120, 120)
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""


def run_of(
    name: str = "fedafa", engine: str = "serial", setting: Any = SETTING, sizes: Any = toy.SIZES, **fields: Any
) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=replace(setting, clients=len(sizes)), sizes=sizes)


def personalised(run: Run, client: int = LOPSIDED) -> Tree:
    """What the epilogue makes of the server's model at a client."""
    task = run.task_at(run.setting.rounds - 1)
    upload, private = toy.upload_once(run, client, task, run.algorithm.exchanges(task)[-1])
    assert upload == {} and float(private["done"]) == 1.0
    own: Tree = private["own"]
    return own


def personal(run: Run, client: int = LOPSIDED) -> Tree:
    task = run.task_at(run.setting.rounds - 1)
    shared = toy.received(run, client)
    model = run.algorithm.personal_model(task, shared, run.store[client], data_of(run, client))
    assert model is not None
    return model


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_the_server_is_fedavgs_and_without_epochs_clients_too(engine: str) -> None:
    fedavg = toy.finish(run_of("fedavg", engine)).progress.server
    for epochs, moved in ((0, False), (1, True)):
        run = toy.finish(run_of("fedafa", engine, epochs=epochs))
        assert largest_difference(run.progress.server, fedavg) == 0.0
        assert (largest_difference(personal(run), fedavg) > 1e-4) == moved
        assert largest_difference(personal(run)["body"], fedavg["body"]) == 0.0


def test_before_the_epilogue_personal_models_are_the_generic_one() -> None:
    run = run_of()
    run.step()
    assert [len(run.algorithm.exchanges(run.task_at(round))) for round in (0, 1)] == [1, 2]
    assert largest_difference(personal(run), run.progress.server) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_of_several_blocks_the_last_one_moves(engine: str) -> None:
    run = toy.finish(run_of("fedafa", engine, CNN))
    before, after = run.progress.server["body"], personal(run)["body"]
    for key in ("conv1", "conv2"):
        assert largest_difference(after[key], before[key]) == 0.0
    assert largest_difference(after["hidden"], before["hidden"]) > 1e-5


def hidden(model: Tree, x: Tensor) -> Tensor:
    return torch.relu(F.linear(x.flatten(1), *tree.flatten(model["body"]).values()))


def test_without_generated_features_the_head_is_tuned_on_balanced_draws() -> None:
    run = run_of(generate=0.0, epochs=2)
    data, received = data_of(run, LOPSIDED, 1), run.progress.server
    draws = list(data.batches(2, weights=(1 / data.class_counts.clamp(min=1))[data.y]))
    w = [torch.nn.Parameter(leaf.clone()) for leaf in received["head"].values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.5, weight_decay=1e-2)
    for batch in draws:
        optimiser.zero_grad()
        F.cross_entropy(F.linear(hidden(received, batch.x), *w), batch.y).backward()
        optimiser.step()
    wanted = dict(zip(received["head"], (each.detach() for each in w), strict=True))
    assert largest_difference(personalised(run)["head"], wanted) < 1e-6
    rare = float(data.class_counts[data.class_counts > 0].min() / data.n)
    drawn = torch.cat([batch.y for batch in draws])
    assert (drawn == data.class_counts.where(data.class_counts > 0, torch.tensor(999)).argmin()).float().mean() > rare


def trained_run(**fields: Any) -> Run:
    """A run whose server has a model that knows the classes."""
    run, other = run_of(**fields), run_of("fedavg", setting=replace(SETTING, rounds=6), sizes=EVEN)
    run.progress.server = toy.finish(other).progress.server
    return run


def made_by_hand(
    run: Run, batch: Batch, counts: list[int], seeds: str, accept: float = 0.5
) -> tuple[list[Tensor], list[bool]]:
    """Example by example, by the paper's recipe and the client's draws."""
    model, y, most = run.progress.server, batch.y.tolist(), max(counts)
    f, (w, b) = hidden(model, batch.x), model["head"].values()
    draws = keys.uniform_rows(keys.fold(batch.keys, "seeds"), 1 + len(y))
    noises = keys.uniform_rows(keys.fold(batch.keys, "noise"), f.shape[1])
    features, used = [], []
    for k, label in enumerate(y):
        gap = [max(counts[other] - counts[label], 0) / most for other in y]
        weights = gap if seeds == "majority" else [1 - each for each in gap]
        waits = [float(-torch.log1p(-u)) / p if p else float("inf") for u, p in zip(draws[k, 1:], weights, strict=True)]
        seed = f[waits.index(min(waits))]
        noise = noises[k] - (seed.max() + seed.min()) / 2
        z = (seed + noise.clamp(-1, 1)).clamp(torch.zeros(()), seed.max())
        for _ in range(10):
            slope = w.T @ ((w @ z + b).softmax(0) - F.one_hot(torch.tensor(label), 6))
            z = (z - 0.5 * slope / slope.norm()).clamp(torch.zeros(()), seed.max())
        sure = float((w @ z + b).softmax(0)[label])
        features.append(z)
        used.append(float(draws[k, 0]) < 1 - counts[label] / most and max(weights) > 0 and sure >= accept)
    return features, used


@pytest.mark.parametrize(("seeds", "accept"), [("majority", 0.5), ("release", 0.5), ("majority", 0.84)])
def test_features_are_made_as_by_hand(seeds: str, accept: float) -> None:
    run = trained_run(seeds=seeds, accept=accept)
    data, task = data_of(run, LOPSIDED), run.task_at(1)
    made, accepted = [], []
    for batch in data.batches(2, weights=(1 / data.class_counts.clamp(min=1))[data.y]):
        f = hidden(run.progress.server, batch.x)
        found, used = method(run).generated(task, run.progress.server, f, batch, data.class_counts)
        features, wanted = made_by_hand(run, batch, data.class_counts.tolist(), seeds, accept)
        made.append((found - torch.stack(features))[torch.tensor(wanted)])
        accepted += used.tolist()
        assert used.tolist() == wanted
        sure = run.task.model.logits(run.progress.server["head"], found).softmax(1)
        assert bool((sure[torch.arange(len(batch.y)), batch.y][used] >= accept).all())
    assert sum(accepted) >= 3 and sum(accepted) < len(accepted)
    assert float(torch.cat(made).abs().max()) < 1e-4


def test_the_loss_mixes_both_by_its_weight() -> None:
    run = trained_run(generate=0.7)
    data, received = data_of(run, LOPSIDED, 1), run.progress.server
    w = [torch.nn.Parameter(leaf.clone()) for leaf in received["head"].values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.5, weight_decay=1e-2)
    for batch in data.batches(1, weights=(1 / data.class_counts.clamp(min=1))[data.y]):
        made, used = made_by_hand(run, batch, data.class_counts.tolist(), "majority")
        f = hidden(received, batch.x)
        mixed = torch.stack([new if use else old for new, old, use in zip(made, f, used, strict=True)])
        optimiser.zero_grad()
        parts = [F.cross_entropy(F.linear(each, *w), batch.y) for each in (mixed, f)]
        (0.7 * parts[0] + 0.3 * parts[1]).backward()
        optimiser.step()
    wanted = dict(zip(received["head"], (each.detach() for each in w), strict=True))
    assert largest_difference(personalised(run)["head"], wanted) < 1e-5
    assert largest_difference(personalised(trained_run(generate=0.0))["head"], wanted) > 1e-4


def test_with_even_classes_nothing_is_generated() -> None:
    run = run_of(sizes=EVEN)
    data = data_of(run, 0)
    batch, model = next(data.batches(1)), run.progress.server
    f = hidden(model, batch.x)
    assert not method(run).generated(run.task, model, f, batch, data.class_counts)[1].any()
    heads = [personalised(run_of(sizes=EVEN, generate=share), 0)["head"] for share in (0.0, 1.0)]
    assert largest_difference(*heads) < 1e-6


def test_channels_of_noise_are_no_longer_than_one() -> None:
    """Without steps of the attack a feature differs from some seed by that noise, or less."""
    run = run_of(setting=CNN, attack_steps=0, accept=0.0)
    data = data_of(run, LOPSIDED)
    batch = next(data.batches(1))
    body = run.progress.server["body"]
    f = run.task.model.blocks[1].run(body, run.task.model.blocks[0].run(body, batch.x))
    made, used = method(run).generated(run.task, run.progress.server, f, batch, data.class_counts)
    apart = (made.reshape(f.shape)[:, None] - f[None]).flatten(3).norm(dim=3).amax(2).amin(1)
    assert f.ndim == 4 and bool(used.any()) and float(apart.max()) <= 1 + 1e-5 and float(apart.min()) > 0.1


def test_nothing_is_sent_that_fedavg_does_not_send_but_the_model_once_more() -> None:
    run, fedavg = toy.finish(run_of()), toy.finish(run_of("fedavg"))
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"]
    model = tree.nbytes({key: run.progress.server[key] for key in ("body", "head")})
    assert run.progress.cost["bytes_down"] - fedavg.progress.cost["bytes_down"] == 8 * model


def test_what_stands_still_is_in_evaluation_mode() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", batch_size=1000, momentum=0.0, weight_decay=0.0)
    run = run_of("fedafa", setting=setting, generate=0.0)
    run.progress.server = tree.map_paths(lambda path, leaf: leaf + 0.3 * tree.is_statistic(path), run.progress.server)
    data, received, blocks = data_of(run, LOPSIDED, 1), run.progress.server, run.task.model.blocks
    (batch,) = data.batches(1, weights=(1 / data.class_counts.clamp(min=1))[data.y])
    f = batch.x
    for block in blocks[:-1]:
        f = block.run(received["body"], f)

    def loss(own: Tree, batch: Batch) -> Tensor:
        return F.cross_entropy(run.task.model.logits(own["head"], blocks[-1].run(own["body"], f)), batch.y)

    own = {"body": {key: received["body"][key] for key in blocks[-1].keys}, "head": received["head"]}
    _, gradient, following = run.task.gradient(loss, own, batch)
    wanted = tree.merge(following, tree.add(tree.parameters(own), gradient, -0.05))
    found = personalised(run)
    assert largest_difference(tree.parameters(found), tree.parameters(wanted)) < 1e-5


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
    sizes = (20, 9, 0, 0, 0, 0, 0, 0)
    runs = [toy.finish(run_of("fedafa", engine, setting, sizes)) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-3


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(toy.run(ALGORITHMS["fedafa"](), engine, setting=setting)), "unseen") > 0.8


def test_the_setting_trains_before() -> None:
    run = run_of()
    upload, _ = toy.upload_once(run, LOPSIDED)
    data = data_of(run, LOPSIDED)
    assert largest_difference(upload, trained(run, run.progress.server, data.batches(2))) < 1e-6
