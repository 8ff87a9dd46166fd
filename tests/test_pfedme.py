"""pFedMe: its two loops written out, what the solver solves, where the server goes, and which model is tested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Batch, Tree, Uploads, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SETTING = replace(toy.SETTING, rounds=2, weight_decay=1e-2, clip=0.5)
PLAIN = replace(toy.SETTING, rounds=3, participation=0.25, momentum=0.0)
ONE_BATCH = replace(PLAIN, epochs=1, batch_size=1000)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0, eval_every=2)
FEW = (5, 3, 0, 0, 0, 0, 0, 0)
EMPTY = toy.SIZES.index(0)


def run_of(name: str = "pfedme", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def written_out(
    run: Run, start: Tree, batches: list[Batch], pull: float, inner: int, outer_lr: float
) -> tuple[Tree, Tree]:
    """w and theta: for each batch a new one of torch's optimisers takes some steps on it, then w follows."""
    setting, paths = run.setting, list(tree.flatten(start))
    w = [leaf.clone() for leaf in tree.flatten(start).values()]
    theta = [torch.nn.Parameter(leaf.clone()) for leaf in w]
    for batch in batches:
        rule = torch.optim.SGD(theta, setting.lr, setting.momentum, weight_decay=setting.weight_decay)
        for _ in range(inner):
            rule.zero_grad()
            logits = F.linear(torch.relu(F.linear(batch.x.flatten(1), *theta[:2])), *theta[2:])
            apart = torch.stack([(p - a).square().sum() for p, a in zip(theta, w, strict=True)]).sum()
            (F.cross_entropy(logits, batch.y) + pull / 2 * apart).backward()
            if setting.clip is not None:
                torch.nn.utils.clip_grad_norm_(theta, setting.clip)
            rule.step()
        w = [a - outer_lr * pull * (a - p.detach()) for a, p in zip(w, theta, strict=True)]
    found = w, [p.detach() for p in theta]
    first, second = (tree.unflatten(dict(zip(paths, each, strict=True))) for each in found)
    return first, second


def batches_of(run: Run, client: int = 0, round: int = 0) -> list[Batch]:
    return list(data_of(run, client, round).batches(run.setting.epochs))


@pytest.mark.parametrize(("clip", "pull", "inner", "outer_lr"), [(None, 15.0, 5, 0.005), (0.5, 4.0, 3, None)])
def test_both_loops_are_those_of_the_paper(clip: float | None, pull: float, inner: int, outer_lr: float | None) -> None:
    """theta goes on from where it was, the momentum of its solver does not."""
    run = run_of(setting=replace(SETTING, clip=clip), pull=pull, inner_steps=inner, outer_lr=outer_lr)
    rate = run.setting.lr if outer_lr is None else outer_lr
    upload, kept = toy.upload_once(run)
    w, theta = written_out(run, run.progress.server, batches_of(run), pull, inner, rate)
    assert largest_difference(upload, w) < 5e-6
    assert largest_difference(kept, theta) < 5e-6
    assert largest_difference(w, theta) > 1e-3 and largest_difference(w, run.progress.server) > 1e-4


def test_the_solver_ends_where_the_gradient_is_the_pull() -> None:
    """grad f(theta) = pull (w - theta), and w steps along this gradient, which is the envelope's."""
    run = run_of(setting=replace(ONE_BATCH, model="linear"), inner_steps=100, outer_lr=0.01)
    (batch,), w = batches_of(run), run.progress.server
    upload, theta = toy.upload_once(run)
    _, gradient, _ = run.task.gradient(run.task.loss, theta, batch)
    assert largest_difference(gradient, tree.scale(tree.sub(w, theta), 15.0)) < 1e-5
    assert largest_difference(upload, tree.add(w, gradient, -0.01)) < 1e-6
    assert float(tree.norm(gradient)) > 0.1


@pytest.mark.equivalence
@ENGINES
def test_where_rate_and_pull_are_inverse_w_is_theta(engine: str) -> None:
    run = run_of(engine=engine, setting=PLAIN, pull=20.0, outer_lr=0.05)
    upload, kept = toy.upload_once(run)
    assert largest_difference(upload, kept) < 1e-6 and largest_difference(upload, run.progress.server) > 1e-2


@pytest.mark.equivalence
@pytest.mark.parametrize("fields", [{"inner_steps": 0}, {"server_lr": 0}, {"pull": 0}])
@ENGINES
def test_without_steps_of_a_solver_or_the_server_or_a_pull_the_server_stands_still(
    engine: str, fields: dict[str, Any]
) -> None:
    run = toy.finish(run_of(engine=engine, **{"inner_steps": 2, **fields}))
    assert largest_difference(run.progress.server, run.task.init()) == 0.0
    theta_moved = largest_difference(run.store[0], run.task.init()) > 1e-3
    assert theta_moved == ("inner_steps" not in fields)


@pytest.mark.equivalence
def test_without_a_pull_theta_is_trained_alone() -> None:
    """From the received model, on each batch five times."""
    run, local = run_of(setting=PLAIN, pull=0), run_of("local", setting=PLAIN)
    repeated = (batch for batch in batches_of(run) for _ in range(5))
    expected = local.task.sgd(local.task.loss, run.progress.server, repeated)
    assert largest_difference(toy.upload_once(run)[1], expected) == 0.0


@ENGINES
def test_at_the_defaults_it_is_not_fedavg(engine: str) -> None:
    run, fedavg = toy.finish(run_of(engine=engine)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(run.progress.server, fedavg.progress.server) > 1e-3
    assert largest_difference(run.store[0], run.progress.server) > 1e-3


@pytest.mark.parametrize(("server_lr", "wanted"), [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0), (2.0, 5.0)])
def test_the_server_steps_along_the_mean_update(server_lr: float, wanted: float) -> None:
    """From 1 towards the mean of 2 and 6, which weigh 3 and 1; running statistics are the mean of theirs."""

    def model(value: float) -> Tree:
        norm = {"weight": torch.tensor([value]), "stats": {"mean": torch.tensor([10 * value])}}
        return {"body": {"norm": norm}, "head": {"w": torch.tensor([value])}}

    uploads = Uploads([model(2.0), model(6.0)], torch.tensor([3.0, 1.0]))
    following = ALGORITHMS["pfedme"](server_lr=server_lr).aggregate(run_of().task, model(1.0), uploads)
    assert float(following["head"]["w"]) == float(following["body"]["norm"]["weight"]) == wanted
    assert float(following["body"]["norm"]["stats"]["mean"]) == 30.0


def test_tested_is_theta_of_the_clients_last_round() -> None:
    """Not w, as in the reference, nor what was received, nor the initial model."""
    run = run_of(setting=PLAIN)
    run.step()
    client = run.population.cohort(0)[0]
    upload, theta = toy.upload_once(run_of(setting=PLAIN), client)
    task, server = run.task_at(1), run.progress.server
    (tested,) = run.evaluator.models(task, server, server, run.store, [client], True)["personal"]
    assert largest_difference(tested, theta) == 0.0
    assert min(largest_difference(tested, each) for each in (upload, server, run.task.init())) > 1e-3


@ENGINES
@pytest.mark.parametrize("unseen", [0, 2])
def test_who_never_took_part_solves_from_the_received_model(unseen: int, engine: str) -> None:
    run = toy.finish(run_of(engine=engine, setting=replace(PLAIN, unseen=unseen), inner_steps=2))
    population, server, task = run.population, run.progress.server, run.task_at(2)
    never = [k for k in range(population.training) if k not in run.store.clients() and len(population.index[k])]
    client = population.size - 1 if unseen else never[0]
    named = run.evaluator.models(task, server, server, run.store, [client], True)
    (tested,) = named["unseen" if unseen else "personal"]
    _, theta = written_out(run, server, batches_of(run, client, 2), 15.0, 2, run.setting.lr)
    assert largest_difference(tested, theta) < 1e-5
    assert largest_difference(run.store[client], run.task.init()) == 0.0
    assert stages(run.algorithm.newcomer_adaptation(task)) == ()


@ENGINES
def test_without_examples_a_client_keeps_what_it_has_and_sends_what_it_received(engine: str) -> None:
    run = run_of(engine=engine, setting=replace(SETTING, participation=1.0))
    before = tree.scale(run.task.init(), 2.0)
    run.store[EMPTY] = before
    upload, kept = toy.upload_once(run, EMPTY)
    assert largest_difference(upload, run.progress.server) == largest_difference(kept, before) == 0.0
    run.step()
    assert largest_difference(run.store[EMPTY], before) == 0.0


@ENGINES
def test_each_step_of_the_solver_is_counted_and_nothing_more_travels(engine: str) -> None:
    run, fedavg = toy.finish(run_of(engine=engine, inner_steps=2)), toy.finish(run_of("fedavg", engine))
    assert run.progress.cost["train_samples"] == 2 * fedavg.progress.cost["train_samples"]
    for what in ("bytes_down", "bytes_up"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]


def test_engines_agree_under_batch_norm_and_statistics_are_averaged_whatever_the_server_does() -> None:
    runs = [run_of(engine=each, setting=BATCH_NORM, server_lr=0.0, inner_steps=2) for each in ("serial", "stacked")]
    for run in runs:
        run.step()
    assert largest_difference(*map(toy.states, runs)) < 2e-4
    moved, initial = (tree.split(each, tree.is_statistic) for each in (runs[0].progress.server, runs[0].task.init()))
    assert largest_difference(moved[0], initial[0]) > 1e-3 and largest_difference(moved[1], initial[1]) == 0.0
    upload, kept = toy.upload_once(runs[0])
    assert largest_difference(*(tree.split(each, tree.is_statistic)[0] for each in (upload, kept))) == 0.0
