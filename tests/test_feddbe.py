"""FedDBE: prologue and steps against loops written out, FedAvg where both parts are off, and what the bias does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Exchange, LocalData, Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, rounds=3, momentum=0.9, weight_decay=1e-2, clip=0.5)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", participation=1.0, rounds=1, epochs=1)
PLAIN = replace(toy.SETTING, momentum=0.5, weight_decay=1e-2)
OFF = {"pull": 0.0, "personal_bias": False}


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else (20, 9, 0, 0, 0, 0, 0, 0)
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


def batches(run: Run, client: int) -> list[Batch]:
    """A client's batches in round 0."""
    visit = run.population.visit(client, 0, {})
    n = torch.tensor(len(visit.index))
    data = LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.setting.batch_size)
    return list(data.batches(run.setting.epochs))


def written_out(
    run: Run, client: int, share: float, pull: float = 0.0, consensus: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tree, Tensor, Tensor]:
    """Train the toy's network the long way: the model, the bias, the running mean of features."""
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model(run)).items()}
    w = tree.unflatten(dict(leaves))
    b = (torch.zeros(64) if bias is None else bias.clone()).requires_grad_(bias is not None)
    optimiser = torch.optim.SGD(
        [*leaves.values(), *([b] if bias is not None else [])], 0.05, run.setting.momentum, weight_decay=1e-2
    )
    running = torch.zeros(64)
    for batch in batches(run, client):
        z = torch.relu(batch.x.flatten(1) @ w["body"]["hidden"]["weight"].T + w["body"]["hidden"]["bias"])
        running = (1 - share) * running.detach() + share * z.mean(0)
        loss = F.cross_entropy((z + b) @ w["head"]["weight"].T + w["head"]["bias"], batch.y)
        if consensus is not None:
            loss = loss + pull * ((running - consensus) ** 2 / 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return tree.map(torch.Tensor.detach, w), b.detach(), running.detach()


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
def test_without_bias_and_pull_it_is_fedavg(engine: str, setting: Any) -> None:
    """Under clipping and decay: the running mean is in no norm; and the prologue leaves no trace."""
    off, fedavg = toy.finish(run_of("feddbe", engine, setting, **OFF)), toy.finish(run_of("fedavg", engine, setting))
    assert largest_difference(model(off), model(fedavg)) == 0.0
    assert all(largest_difference(state, off.store.initial) == 0.0 for state in off.store.all())


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("off", OFF)
def test_each_part_by_itself_is_not_fedavg(engine: str, off: str) -> None:
    runs = run_of("feddbe", engine, **{off: OFF[off]}), run_of("fedavg", engine)
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) > 1e-4


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_the_prologue_asks_all_training_clients_and_moves_nothing(share: float, engine: str) -> None:
    setting = replace(PLAIN, participation=0.25, unseen=1)
    run = run_of("feddbe", engine, setting, feature_momentum=share)
    before = tree.clone(model(run))
    task = run.task_at(0)
    prologue, usual = run.algorithm.exchanges(task)
    assert usual == Exchange() and run.algorithm.exchanges(run.task_at(1)) == (Exchange(),)
    run.exchange(task, prologue)
    means = [written_out(run, client, share)[2] for client in range(7)]
    expected = sum(n * mean for n, mean in zip(toy.SIZES[:7], means, strict=True)) / sum(toy.SIZES[:7])
    consensus = run.progress.server["consensus"]
    assert largest_difference({"it": consensus}, {"it": expected}) < 1e-5 and float(consensus.max()) > 0.1
    assert largest_difference(before, model(run)) == 0.0
    assert run.progress.cost["bytes_up"] == 7 * 64 * 4
    assert run.progress.cost["train_samples"] == 2 * sum(toy.SIZES[:7])
    toy.finish(run)
    assert torch.equal(run.progress.server["consensus"], consensus)  # for good


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_steps_are_those_of_the_papers_loss(share: float) -> None:
    run = run_of("feddbe", setting=PLAIN, pull=5.0, feature_momentum=share)
    consensus, bias = torch.linspace(0, 1, 64), torch.linspace(-0.3, 0.5, 64)
    run.progress.server["consensus"] = consensus
    run.store[0] = {"bias": bias}
    upload, kept = toy.upload_once(run, exchange=Exchange())
    expected, moved, _ = written_out(run, 0, share, 5.0, consensus, bias)
    assert largest_difference(upload, expected) < 5e-6
    assert largest_difference(kept, {"bias": moved}) < 5e-6
    assert largest_difference(kept, {"bias": bias}) > 1e-3


def test_the_bias_is_clipped_by_itself() -> None:
    """A first step from a bias of zero moves the model alike whether there is a bias or not."""
    setting = replace(SETTING, epochs=1, batch_size=1000, clip=0.01)
    uploads = []
    for personal_bias in (True, False):
        run = run_of("feddbe", setting=setting, personal_bias=personal_bias)
        upload, kept = toy.upload_once(run, exchange=Exchange())
        uploads.append(upload)
        assert float(kept["bias"].norm()) == pytest.approx(0.05 * 0.01 if personal_bias else 0.0, rel=1e-3)
    assert largest_difference(*uploads) < 1e-7


def test_the_pull_brings_mean_features_to_the_consensus() -> None:
    distances = []
    for pull in (0.0, 5.0, 50.0):
        run = run_of("feddbe", setting=PLAIN, pull=pull)
        run.step()
        consensus = run.progress.server["consensus"]
        x = run.population.images.plain(run.population.index[0])
        body = toy.upload_once(run, 0, run.task_at(1))[0]["body"]
        distances.append(float((run.task.model.features(body, x).mean(0) - consensus).norm()))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.5 * distances[0]


def test_the_personal_model_adds_the_bias_to_features_and_the_generic_one_does_not() -> None:
    run = toy.finish(run_of("feddbe"))
    server, task = run.progress.server, run.task_at(2)
    bias = torch.linspace(-1, 1, 64)
    visit = run.population.visit(0, 2, {"bias": bias})
    n = torch.tensor(len(visit.index))
    data = LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, 16)
    personal = run.algorithm.personal_model(task, server, visit.private, data)
    assert personal is not None
    x = run.population.images.plain(visit.index)
    z = task.model.features(server["body"], x)
    expected = (z + bias) @ server["head"]["weight"].T + server["head"]["bias"]
    assert torch.allclose(task.logits(personal, x), expected, atol=1e-5)
    generic = run.algorithm.global_model(task, server)
    assert generic is not None and largest_difference(generic, model(run)) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_the_generic_model_and_it_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    run = toy.finish(run_of("feddbe", engine, setting))
    assert 7 not in run.store.clients()
    assert measured(run, "unseen") > 0.8
