"""FedCM: its steps against a loop written out, the momentum of a linear loss, FedAvg where it has no share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, LocalData, Loss, Task, Tree, Uploads, losses, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.composed import Composed
from bench.protocol.settings import Setting
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=3, momentum=0.0)
DECAYED = replace(SETTING, momentum=0.5, weight_decay=1e-2, clip=1.0, lr_decay=0.5)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
SLOPE = (0.3, -0.1, 0.2, 0.0, -0.5, 0.1)


@dataclass(frozen=True, kw_only=True)
class Linear(Loss):
    """The head's bias has the same gradient everywhere."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        return losses.mean(logits @ torch.tensor(SLOPE), batch)


def run_of(algorithm: Any, engine: str = "serial", setting: Setting = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    made = ALGORITHMS[algorithm](**fields) if isinstance(algorithm, str) else algorithm
    return toy.run(made, engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def batches(run: Run, client: int, round: int) -> list[Batch]:
    visit = run.population.visit(client, round, {})
    n = torch.tensor(len(visit.index))
    data = LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.setting.batch_size)
    return list(data.batches(run.setting.epochs))


def score(w: Tree, x: Tensor) -> Tensor:
    z = torch.relu(x.flatten(1) @ w["body"]["hidden"]["weight"].T + w["body"]["hidden"]["bias"])
    logits: Tensor = z @ w["head"]["weight"].T + w["head"]["bias"]
    return logits


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, DECAYED, replace(DECAYED, participation=0.5), BATCH_NORM])
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_where_a_clients_gradient_is_all_it_is_fedavg(setting: Setting, engine: str) -> None:
    runs = run_of("fedcm", engine, setting, alpha=1.0), run_of("fedavg", engine, setting)
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) == 0.0


def test_at_the_default_it_is_not_and_the_first_round_is_fedavgs_at_a_tenth_of_the_rate() -> None:
    run, fedavg = run_of("fedcm"), run_of("fedavg", setting=replace(SETTING, lr=0.005))
    run.step()
    fedavg.step()
    assert largest_difference(model(run), model(fedavg)) < 1e-6
    run.step()
    fedavg.step()
    assert largest_difference(model(run), model(fedavg)) > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_momentum_of_a_linear_loss_is_known(momentum: float) -> None:
    """Delta_t = (1 - (1 - alpha)^t) g, whatever the sizes of clients, the rates of rounds and their momentum; of the
    last up to what a client that takes few steps has not yet met.
    """
    setting = replace(SETTING, rounds=4, momentum=momentum, lr_decay=0.7)
    run = run_of(Composed(ALGORITHMS["fedcm"](alpha=0.3), (Linear(),)), setting=setting)
    assert run.progress.server["momentum"]["head"]["bias"].eq(0).all()
    for t in range(1, 5):
        run.step()
        expected = (1 - 0.7**t) * torch.tensor(SLOPE)
        assert torch.allclose(run.progress.server["momentum"]["head"]["bias"], expected, atol=1e-5)


@pytest.mark.parametrize(("alpha", "server_lr"), [(0.1, 1.0), (0.4, 0.5)])
def test_two_rounds_are_those_of_the_paper(alpha: float, server_lr: float) -> None:
    setting = replace(SETTING, rounds=2, lr_decay=0.5)
    run = run_of("fedcm", setting=setting, alpha=alpha, server_lr=server_lr)
    w = tree.flatten(model(run))
    delta = {path: torch.zeros_like(leaf) for path, leaf in w.items()}
    for r, lr in enumerate((0.05, 0.025)):
        step = {path: torch.zeros_like(leaf) for path, leaf in w.items()}
        gradient = {path: torch.zeros_like(leaf) for path, leaf in w.items()}
        for client, n in enumerate(toy.SIZES):
            mine = {path: leaf.clone().requires_grad_() for path, leaf in w.items()}
            stream = batches(run, client, r)
            for batch in stream:
                loss = F.cross_entropy(score(tree.unflatten(dict(mine)), batch.x), batch.y)
                slopes = torch.autograd.grad(loss, list(mine.values()))
                with torch.no_grad():
                    for (path, leaf), slope in zip(mine.items(), slopes, strict=True):
                        leaf -= lr * (alpha * slope + (1 - alpha) * delta[path])
            for path, leaf in mine.items():
                share, moved = n / sum(toy.SIZES), leaf.detach() - w[path]
                step[path] += share * moved
                gradient[path] -= share * moved / max(len(stream), 1) / lr
        w = {path: leaf + server_lr * step[path] for path, leaf in w.items()}
        delta = gradient
    toy.finish(run)
    assert largest_difference(model(run), tree.unflatten(w)) < 1e-5
    assert largest_difference(run.progress.server["momentum"], tree.unflatten(delta)) < 1e-4
    assert max(float(leaf.abs().max()) for leaf in delta.values()) > 1e-2


def test_the_server_follows_the_mean_and_averages_statistics() -> None:
    run = run_of("fedcm", setting=BATCH_NORM, server_lr=0.25)
    old = model(run)
    uploads = Uploads([toy.upload_once(run, k)[0] for k in (0, 1)], torch.tensor([20.0, 9.0]))
    found = run.algorithm.aggregate(run.task_at(0), run.progress.server, uploads)
    mean = uploads.mean()
    (statistics, params), (expected, whole) = (
        tree.split({key: each[key] for key in old}, tree.is_statistic) for each in (found, mean)
    )
    assert statistics and largest_difference(statistics, expected) == 0.0
    start = tree.parameters(old)
    assert largest_difference(params, tree.add(start, tree.sub(whole, start), 0.25)) < 1e-6
    assert not any(tree.is_statistic(path) for path in tree.flatten(found["momentum"]))


def test_clients_drift_apart_less() -> None:
    """Each step is drawn along one direction, so that what clients do is more alike."""
    apart = []
    for alpha in (1.0, 0.1):
        run = run_of("fedcm", alpha=alpha, setting=replace(SETTING, rounds=5))
        for _ in range(4):
            run.step()
        old = tree.parameters(model(run))
        moves = [tree.sub(tree.parameters(toy.upload_once(run, k, run.task_at(4))[0]), old) for k in (0, 1, 3)]
        norms = [float(tree.dot(a, a).sqrt()) for a in moves]
        pairs = ((0, 1), (0, 2), (1, 2))
        apart.append(sum(1 - float(tree.dot(moves[i], moves[j])) / norms[i] / norms[j] for i, j in pairs) / 3)
    assert apart[1] < 0.5 * apart[0]


def test_the_momentum_is_sent_down_and_nothing_more_comes_up() -> None:
    run, fedavg = toy.finish(run_of("fedcm")), toy.finish(run_of("fedavg"))
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"]
    assert run.progress.cost["bytes_down"] == 2 * fedavg.progress.cost["bytes_down"]


def test_engines_agree_under_batch_norm_and_with_decay() -> None:
    for setting in (BATCH_NORM, DECAYED):
        runs = [run_of("fedcm", engine, setting) for engine in ("serial", "stacked")]
        assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < 2e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedcm", engine, setting)), "unseen") > 0.8
