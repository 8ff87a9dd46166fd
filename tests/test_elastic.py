"""Elastic aggregation: steps by hand, a client's sensitivity against a loop written out, FedAvg where all are alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Batch, Tree, Uploads, evaluating, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training import engine as engines
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of

SETTING = replace(toy.SETTING, rounds=3)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def stepped(
    ends: list[list[float]], sensitivities: list[list[float]], weights: Any = None, **fields: Any
) -> list[float]:
    """Where the server goes from zero; clients are of equal size."""
    server: Tree = {"body": {}, "head": {"w": torch.zeros(len(ends[0]))}}
    trees: list[Tree] = [
        {"body": {}, "head": {"w": torch.tensor(end)}, "sensitivity": {"body": {}, "head": {"w": torch.tensor(each)}}}
        for end, each in zip(ends, sensitivities, strict=True)
    ]
    uploads = Uploads(trees, torch.ones(len(ends)), weights=None if weights is None else torch.tensor(weights))
    algorithm: Any = ALGORITHMS["elastic"](**fields)
    found = algorithm.aggregate(None, server, uploads)
    assert found.keys() == server.keys()
    return [float(x) for x in found["head"]["w"]]


def test_the_steps_by_hand() -> None:
    """Three clients, of whose parameters two are of interest to them, and one is not."""
    ends = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [6.0, 6.0, 6.0]]
    sensitivities = [[4.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert stepped(ends, sensitivities) == pytest.approx([3 * 1.0, 3 * 0.5, 3 * 1.0])
    assert stepped(ends, sensitivities, tau=0.0) == pytest.approx([3 * 0.5, 0.0, 3 * 1.0])
    weighed = stepped(ends, sensitivities, [0.5, 0.5, 0.0])
    assert weighed == pytest.approx([1.5 * (1.5 - 3 / 4), 1.5 * 0.5, 1.5])


@pytest.mark.equivalence
def test_where_all_are_alike_and_the_least_step_is_1_it_is_fedavg() -> None:
    run = run_of("elastic", tau=1.0)
    sent = [toy.upload_once(run, k)[0] for k in (0, 1, 4)]
    alike = [{**each, "sensitivity": sent[0]["sensitivity"]} for each in sent]
    sizes = torch.tensor([60.0, 44.0, 9.0])
    found, other = (
        run.algorithm.aggregate(run.task, run.progress.server, Uploads(each, sizes)) for each in (alike, sent)
    )
    mean = Uploads([{key: each[key] for key in found} for each in sent], sizes).mean()
    assert largest_difference(found, mean) == 0.0
    assert largest_difference(other, mean) > 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_a_clients_sensitivity_is_how_predictions_change_with_each_parameter(decay: float) -> None:
    run = run_of("elastic", decay=decay)
    start = tree.flatten(run.progress.server)
    found, batches = [torch.zeros_like(leaf) for leaf in start.values()], 0
    for batch in data_of(run, 0).batches(1, "sensitivity"):
        w = [leaf.clone().requires_grad_() for leaf in start.values()]
        logits = torch.relu(batch.x.flatten(1) @ w[0].T + w[1]) @ w[2].T + w[3]
        logits.square().sum(1).mean().backward()
        slopes = [leaf.grad.abs() for leaf in w if leaf.grad is not None]
        found = [decay * old + (1 - decay) * new for old, new in zip(found, slopes, strict=True)]
        batches += 1
    wanted = tree.unflatten(dict(zip(start, (each / (1 - decay**batches) for each in found), strict=True)))
    sent = toy.upload_once(run)[0]
    assert batches == 4 and largest_difference(sent["sensitivity"], wanted) < 1e-4
    assert largest_difference(wanted, tree.zeros_like(wanted)) > 0.1
    fedavg = toy.upload_once(run_of("fedavg"))[0]
    assert largest_difference({key: sent[key] for key in fedavg}, fedavg) == 0.0


@ENGINES
def test_labels_have_no_say_in_it_and_an_empty_client_none(engine: str) -> None:
    run = run_of("elastic", engine)
    images = run.population.images
    before = toy.upload_once(run)[0]["sensitivity"]
    images.y.copy_(images.y.roll(1))
    after = toy.upload_once(run)[0]["sensitivity"]
    assert largest_difference(before, after) == 0.0
    empty = toy.upload_once(run, toy.SIZES.index(0))[0]["sensitivity"]
    assert largest_difference(empty, tree.zeros_like(empty)) == 0.0


@ENGINES
def test_at_the_default_it_is_not_fedavg(engine: str) -> None:
    runs = [toy.finish(run_of(name, engine)).progress.server for name in ("elastic", "fedavg")]
    assert largest_difference(*runs) > 1e-2


@ENGINES
def test_a_step_is_between_tau_and_1_more(engine: str) -> None:
    run, fedavg = (run_of(name, engine, replace(SETTING, participation=1.0)) for name in ("elastic", "fedavg"))
    start = fedavg.progress.server
    run.step()
    fedavg.step()
    moved, usual = (tree.flatten(tree.sub(each.progress.server, start)) for each in (run, fedavg))
    for path, mean in usual.items():
        told = mean.abs() > 1e-3
        ratio = (moved[path] / mean)[told]
        assert 0.5 - 1e-2 < float(ratio.min()) < float(ratio.max()) < 1.5 + 1e-2
    assert any(float((moved[path] / mean)[mean.abs() > 1e-3].std()) > 0.05 for path, mean in usual.items())


def test_running_statistics_are_means_and_have_no_sensitivity() -> None:
    run = run_of("elastic", setting=BATCH_NORM)
    server, sensitivity = run.progress.server, toy.upload_once(run, 1)[0]["sensitivity"]
    assert not any(map(tree.is_statistic, tree.flatten(sensitivity)))
    alike = tree.map(torch.ones_like, sensitivity)
    sent = [{**tree.map(lambda leaf, far=far: leaf + far, server), "sensitivity": alike} for far in (1.0, 4.0)]
    found = run.algorithm.aggregate(run.task, server, Uploads(sent, torch.tensor([2.0, 1.0])))
    statistics, params = tree.split(tree.sub(found, server), tree.is_statistic)
    assert all(torch.allclose(leaf, torch.tensor(2.0)) for leaf in tree.flatten(statistics).values())
    assert all(torch.allclose(leaf, torch.tensor(1.0), atol=1e-5) for leaf in tree.flatten(params).values())


def test_padding_has_no_say_in_it() -> None:
    """Of stacked clients one has a batch, and three of nothing but padding."""
    run = run_of("elastic")
    visits = [run.population.visit(k, 0, {}) for k in (0, 4)]
    images, shared = run.population.images, run.progress.server
    results, _ = engines.BY_NAME["stacked"](run.algorithm.local_update, run.task_at(0), shared, images, visits)
    for client, (upload, _) in zip((0, 4), results, strict=True):
        alone = toy.upload_once(run, client)[0]["sensitivity"]
        assert largest_difference(upload["sensitivity"], alone) < 1e-4


def test_it_is_measured_in_evaluation_mode() -> None:
    run = run_of("elastic", setting=BATCH_NORM)
    task, (batch,) = run.task_at(0), data_of(run, 1).batches(1, "sensitivity")

    def length(params: Tree, batch: Batch) -> Tensor:
        return task.logits(params, batch.x).square().sum(1).mean()

    def still(params: Tree, batch: Batch) -> Tensor:
        with evaluating():
            return length(params, batch)

    measured, wanted, other = (
        toy.upload_once(run, 1)[0]["sensitivity"],
        *(tree.map(torch.abs, task.gradient(each, run.progress.server, batch)[1]) for each in (still, length)),
    )
    scale = tree.norm(wanted)
    assert tree.norm(tree.sub(measured, wanted)) < 1e-3 * scale < tree.norm(tree.sub(other, wanted))


def test_twice_as_much_comes_up_after_one_epoch_more() -> None:
    run, fedavg = toy.finish(run_of("elastic")), toy.finish(run_of("fedavg"))
    assert run.progress.cost["bytes_down"] == fedavg.progress.cost["bytes_down"]
    assert run.progress.cost["bytes_up"] == 2 * fedavg.progress.cost["bytes_up"]
    assert run.progress.cost["train_samples"] == pytest.approx(1.5 * fedavg.progress.cost["train_samples"])
