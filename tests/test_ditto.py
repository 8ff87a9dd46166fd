"""Ditto: its steps against a loop written out, and what a client has that never took part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, losses, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of

SETTING = replace(toy.SETTING, rounds=3, participation=0.25, momentum=0.9, weight_decay=1e-2)
PULL = 0.7


def run_of(name: str = "ditto", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def solved(run: Run, start: Tree, anchor: Tree, batches: list[Batch], pull: float) -> Tree:
    """torch's SGD on cross-entropy + pull / 2 |w - anchor|^2, all leaves of the toy's network in their order."""
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(start).values()]
    still = list(tree.flatten(anchor).values())
    setting = run.setting
    optimiser = torch.optim.SGD(w, setting.lr, setting.momentum, weight_decay=setting.weight_decay)
    for batch in batches:
        optimiser.zero_grad()
        apart = torch.stack([(p - a).square().sum() for p, a in zip(w, still, strict=True)]).sum()
        (entropy(w, batch) + pull / 2 * apart).backward()
        if setting.clip is not None:
            torch.nn.utils.clip_grad_norm_(w, setting.clip)
        optimiser.step()
    return tree.unflatten(dict(zip(tree.flatten(start), (p.detach() for p in w), strict=True)))


def entropy(w: list[torch.nn.Parameter], batch: Batch) -> Tensor:
    hidden = torch.relu(batch.x.flatten(1) @ w[0].T + w[1])
    return F.cross_entropy(hidden @ w[2].T + w[3], batch.y)


def shifted(model: Tree) -> Tree:
    return tree.map(lambda leaf: leaf + 0.02 * torch.arange(leaf.numel()).reshape(leaf.shape).cos(), model)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_both_models_take_the_steps_of_the_paper(clip: float | None) -> None:
    """The received model without a pull, the client's own from where it was with one, each by an optimiser."""
    run = run_of(setting=replace(SETTING, clip=clip), pull=PULL)
    run.store[0] = shifted(run.task.init())
    upload, kept = toy.upload_once(run)
    received, batches = run.progress.server, list(data_of(run, 0, 0).batches(run.setting.epochs))
    assert largest_difference(upload, solved(run, received, received, batches, 0.0)) < 5e-6
    assert largest_difference(kept, solved(run, run.store[0], received, batches, PULL)) < 5e-6
    assert largest_difference(kept, solved(run, run.store[0], received, batches, 0.0)) > 1e-3


def test_the_global_model_does_not_see_personal_ones_and_they_are_not_sent() -> None:
    runs = [run_of(setting=replace(SETTING, clip=0.5)) for _ in range(2)]
    runs[1].store.initial = shifted(runs[1].store.initial)
    one, other = (toy.finish(run).progress.server for run in runs)
    assert largest_difference(one, other) == 0.0
    assert largest_difference(runs[0].store[0], runs[1].store[0]) > 0 or 0 not in runs[0].store.clients()


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("unseen", [0, 2])
def test_who_never_took_part_has_the_received_model_after_one_local_update(unseen: int, engine: str) -> None:
    """Held out of training or never drawn; no head is tuned on top, and nothing of it is kept."""
    run = toy.finish(run_of(engine=engine, setting=replace(SETTING, unseen=unseen), pull=PULL))
    population, last = run.population, run.setting.rounds - 1
    training = range(population.training)
    never = [k for k in training if k not in run.store.clients() and len(population.index[k])]
    clients = [population.size - 1] if unseen else never[:2]
    assert clients
    received, task = run.progress.server, run.task_at(last)
    named = run.evaluator.models(task, received, received, run.store, clients, True)
    kind = "unseen" if unseen else "personal"
    for client, model in zip(clients, named[kind], strict=True):
        batches = list(data_of(run, client, last).batches(run.setting.epochs))
        assert largest_difference(model, solved(run, received, received, batches, PULL)) < 1e-5
        assert largest_difference(run.store[client], run.task.init()) == 0.0
    assert [name for name in named if name.startswith(f"{kind}:")] == ([] if unseen else ["personal:after"])
    assert stages(run.algorithm.newcomer_adaptation(task)) == ()


def test_its_first_round_starts_a_personal_model_from_the_initial_one() -> None:
    run = run_of(pull=PULL)
    first = run.population.cohort(0)
    round, client = next((r, k) for r in (1, 2) for k in run.population.cohort(r) if k not in first)
    while run.progress.round < round:
        run.step()
    received, task = run.progress.server, run.task_at(round)
    _, kept = toy.upload_once(run, client, task)
    batches = list(data_of(run, client, round).batches(run.setting.epochs))
    assert largest_difference(kept, solved(run, run.task.init(), received, batches, PULL)) < 5e-6


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_is_served_by_the_global_model_and_not_as_training_alone_would(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    runs = [toy.finish(run_of(name, engine, setting)) for name in ("ditto", "local")]
    assert (runs[0].outcome().metrics["unseen"] or 0.0) > 0.8
    ditto, local = (
        run.evaluator.models(run.task_at(7), run.progress.server, run.progress.server, run.store, [7], True)["unseen"][
            0
        ]
        for run in runs
    )
    assert largest_difference(ditto, local) > 1e-2


def test_there_a_loss_part_has_its_say_where_labels_are_known() -> None:
    run = run_of(pull=PULL)
    data, task, received = data_of(run, 0, 0), run.task, run.progress.server

    def balanced(logits: Tensor, features: Tensor | None, batch: Batch) -> Tensor:
        return losses.balanced_softmax(logits, batch, data.class_counts)

    composed, focal = parse_algorithms(f"ditto(pull={PULL})+balanced_softmax,ditto(pull={PULL})+focal")
    mine, plain = composed.newcomer(task, received, data), run.algorithm.newcomer(task, received, data)
    assert largest_difference(mine, run.algorithm.newcomer(replace(task, objective=balanced), received, data)) == 0.0
    assert largest_difference(mine, plain) > 1e-3
    without = data.unlabelled()
    assert largest_difference(
        focal.newcomer(task, received, without), run.algorithm.newcomer(task, received, without)
    ) == 0.0  # fmt: skip


def test_a_stronger_pull_keeps_whoever_never_took_part_closer() -> None:
    def distance(pull: float) -> float:
        run = run_of(pull=pull)
        gap = tree.sub(run.algorithm.newcomer(run.task, run.progress.server, data_of(run, 0, 0)), run.progress.server)
        return float(tree.dot(gap, gap))

    assert distance(0.0) > distance(1.0) > distance(5.0) > 0
