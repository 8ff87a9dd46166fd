"""Facts of pFedHN: a round is a step down its clients' losses, through the hypernetwork, against autograd and torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run

ENGINES = ("serial", "stacked")
ONE_STEP = replace(toy.SETTING, momentum=0.0, epochs=1, batch_size=1000, rounds=2)
"""A client's work is one step on all its examples: what it changes is lr times its gradient."""
PLAIN: dict[str, Any] = {"server_momentum": 0.0, "server_decay": 0.0}


def start(setting: Any = toy.SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["pfedhn"](**fields), engine, setting=setting, sizes=sizes)


def stirred(run: Run) -> Run:
    """Give the output layer weights, as it has them after some rounds: embeddings then matter."""
    weight = tree.flatten(run.progress.server["output"]["weight"])
    weight = {path: 0.03 * keys.normal(keys.fold(keys.key(5), path), *leaf.shape) for path, leaf in weight.items()}
    output = {**run.progress.server["output"], "weight": tree.unflatten(weight)}
    run.progress.server = {**run.progress.server, "output": output}
    return run


def written(writer: dict[str, Tensor], client: int) -> Tree:
    """The hypernetwork in plain operations: a linear layer, three of ReLU and linear, and one for each leaf."""
    z = writer["embeddings"][client]
    for k in range(4):
        z = writer[f"hidden/{k}/weight"] @ (z if k == 0 else F.relu(z)) + writer[f"hidden/{k}/bias"]
    heads = {path.removeprefix("output/bias/"): b for path, b in writer.items() if path.startswith("output/bias/")}
    return tree.unflatten(
        {path: b + (z @ writer[f"output/weight/{path}"].flatten(1)).reshape(b.shape) for path, b in heads.items()}
    )


def writer_of(run: Run) -> dict[str, Tensor]:
    parts = {part: run.progress.server[part] for part in ("embeddings", "hidden", "output")}
    return {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(parts).items()}


def loss_of(run: Run, writer: dict[str, Tensor], client: int) -> Tensor:
    rows = run.population.index[client]
    if not len(rows):
        return torch.zeros(())
    logits = run.task.logits(written(writer, client), run.population.images.plain(rows))
    return F.cross_entropy(logits, run.population.images.y[rows])


def apart(run: Run, writer: dict[str, Tensor]) -> float:
    parts = {part: run.progress.server[part] for part in ("embeddings", "hidden", "output")}
    return tree.largest_difference(parts, tree.map(torch.Tensor.detach, tree.unflatten(writer)))


# A round --------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_a_round_of_single_steps_is_a_step_of_the_hypernetwork_down_the_mean_loss(engine: str) -> None:
    """Everything moves by eta lr J^T grad L, embeddings of the cohort included, those of others not at all."""
    run = stirred(start(ONE_STEP, engine, server_lr=0.5, **PLAIN))
    writer, cohort = writer_of(run), run.population.cohort(0)
    assert len(cohort) == 6
    mean = torch.stack([loss_of(run, writer, k) for k in cohort]).mean()
    gradient = torch.autograd.grad(mean, list(writer.values()))
    before = {path: leaf.detach() for path, leaf in writer.items()}
    expected = {
        path: leaf.detach() - 0.5 * toy.SETTING.lr * step
        for (path, leaf), step in zip(writer.items(), gradient, strict=True)
    }
    run.step()
    assert apart(run, expected) < 1e-6
    for part in ("embeddings", "hidden/0/weight", "hidden/3/bias", "output/bias/body/hidden/weight"):
        assert float((expected[part] - before[part]).abs().max()) > 1e-5, part
    idle = [k for k in range(8) if k not in cohort]
    assert torch.equal(run.progress.server["embeddings"][idle], before["embeddings"][idle])


def test_rounds_are_steps_of_torchs_sgd_with_clipping_decay_and_momentum() -> None:
    """Losses are multiplied so that a gradient of a norm above 50 is among them."""
    setting = replace(ONE_STEP, lr=30.0, rounds=3)
    run = stirred(start(setting, server_lr=1e-2, server_momentum=0.9, server_decay=0.1))
    writer, norms = writer_of(run), []
    optimiser = torch.optim.SGD(writer.values(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    for r in range(3):
        cohort = run.population.cohort(r)
        optimiser.zero_grad()
        (30.0 * torch.stack([loss_of(run, writer, k) for k in cohort]).mean()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(writer.values(), 50.0)))
        optimiser.step()
        run.exchange(run.task_at(r), run.algorithm.exchanges(run.task_at(r))[0])
        run.progress.round += 1
        assert apart(run, writer) < 1e-4
    assert max(norms) > 60


def test_what_the_decay_does_to_whoever_takes_no_part() -> None:
    run = start(replace(toy.SETTING, participation=0.3, rounds=1), server_lr=0.2, server_decay=0.5)
    before, cohort = run.progress.server["embeddings"], run.population.cohort(0)
    run.step()
    idle = [k for k in range(8) if k not in cohort]
    assert torch.allclose(run.progress.server["embeddings"][idle], before[idle] * (1 - 0.2 * 0.5), rtol=1e-5)


def test_where_clients_hardly_move_the_hypernetwork_does_not() -> None:
    run = stirred(start(replace(toy.SETTING, lr=1e-12), **PLAIN))
    before = tree.clone(run.progress.server)
    assert tree.largest_difference(before, toy.finish(run).progress.server) < 1e-6


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_a_hypernetwork_that_cannot_tell_clients_apart_is_fedavg(engine: str) -> None:
    """Units of zero leave the bias, and a rate of 1 moves it to the mean of what clients of one size trained."""
    setting, sizes = replace(toy.SETTING, rounds=3), (24,) * 8
    run = start(setting, engine, sizes, server_lr=1.0, **PLAIN)
    hidden = run.progress.server["hidden"]
    run.progress.server = {**run.progress.server, "hidden": {**hidden, "3": tree.zeros_like(hidden["3"])}}
    toy.finish(run)
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=setting, sizes=sizes)).progress.server
    model = run.algorithm.send(run.task, run.progress.server, 3)
    assert tree.largest_difference(model, fedavg) < 1e-5
    assert tree.largest_difference(model, run.task.init()) > 1e-2


# What is written ------------------------------------------------------------------------------------------------------


def test_the_first_models_are_the_initial_one_and_later_ones_differ() -> None:
    run = start(replace(toy.SETTING, rounds=5))

    def models() -> list[Tree]:
        return [run.algorithm.send(run.task, run.progress.server, k) for k in range(8)]

    assert all(tree.largest_difference(model, run.task.init()) == 0 for model in models())
    toy.finish(run)
    one, other = models()[:2]
    assert tree.largest_difference(one, other) > 1e-3
    expected = written({path: leaf.detach() for path, leaf in writer_of(run).items()}, 1)
    assert tree.largest_difference(other, expected) < 1e-6


def test_each_client_gets_a_model_of_its_own() -> None:
    """Clients 0 and 5 have the same classes under exchanged names, which no single model can learn."""

    def right(name: str) -> float:
        setting = replace(toy.SETTING, participation=1.0, rounds=60, eval_every=60)
        run = toy.run(ALGORITHMS[name](), "stacked", setting=setting, sizes=(24,) * 8)
        images, index = run.population.images, run.population.index
        assert sorted(images.y[index[0]].tolist()) == sorted(images.y[index[5]].tolist()) == [0] * 20 + [1] * 4
        images.y[index[5]] = 1 - images.y[index[5]]
        task, server = run.task, toy.finish(run).progress.server
        models = {k: {**run.algorithm.broadcast(task, server), **run.algorithm.send(task, server, k)} for k in (0, 5)}
        shares = [
            (task.logits(models[k], images.plain(index[k])).argmax(1) == images.y[index[k]]).float().mean()
            for k in (0, 5)
        ]
        return float(min(shares))

    assert right("pfedhn") > 0.95 and right("fedavg") < 0.8


def test_what_travels_does_not_depend_on_the_hypernetwork() -> None:
    small, large = (
        toy.finish(start(replace(toy.SETTING, rounds=1), hidden_size=h, hidden_layers=k, embedding_size=e))
        for h, k, e in ((10, 1, 2), (150, 4, 20))
    )
    assert large.progress.server["hidden"].keys() == set("01234")
    assert large.progress.server["embeddings"].shape == (8, 20)
    size = 6 * tree.nbytes(small.task.init())
    for way in ("bytes_down", "bytes_up"):
        assert small.progress.cost[way] == large.progress.cost[way] == size
    assert start().progress.server["embeddings"].shape == (8, 3)  # 1 + N // 4


def test_a_client_held_out_of_training_gets_the_model_of_the_mean_embedding() -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=6, unseen=1)))
    writer = {path: leaf.detach() for path, leaf in writer_of(run).items()}
    assert len(writer["embeddings"]) == 7
    writer["embeddings"] = writer["embeddings"].mean(0, keepdim=True)
    model = run.algorithm.send(run.task, run.progress.server, None)
    assert tree.largest_difference(model, written(writer, 0)) < 1e-6
    unseen = run.outcome().metrics["unseen"]
    assert unseen is not None and unseen > 0.5  # of six classes


# Batch norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["shared", "personal", "frozen"])
def test_batch_norm(statistics: str) -> None:
    """Running statistics are no output: they are averaged by size, or left where they are."""
    setting = replace(toy.SETTING, model="resnet8", norm="batch", statistics=statistics, epochs=1, lr=0.01)
    setting = replace(setting, rounds=2, participation=1.0, eval_every=2, eval_clients=1)
    runs = [start(setting, engine, (20, 9, 0), hidden_size=8) for engine in ENGINES]
    one, other = runs
    first = tree.split(one.task.init(), tree.is_statistic)[0]
    assert first and "stats" not in str(tree.flatten(one.progress.server["output"]).keys())
    mean = first
    if statistics == "shared":
        sent = [tree.split(toy.upload_once(one, k)[0], tree.is_statistic)[0] for k in (0, 1)]
        mean = tree.map(lambda a, b: (20 * a + 9 * b) / 29, *sent)
        assert tree.largest_difference(mean, first) > 1e-3
    for run in runs:
        run.exchange(run.task_at(0), run.algorithm.exchanges(run.task_at(0))[0])
        assert tree.largest_difference(run.progress.server["statistics"], mean) < 1e-4
        toy.finish(run)
    assert tree.largest_difference(toy.states(one), toy.states(other)) < 5e-4
