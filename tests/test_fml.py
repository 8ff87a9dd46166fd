"""FML: steps of both models against a loop written out, Local and FedAvg where neither learns from the other."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done

SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=0.5)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str = "fml", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def shifted(model: Tree, by: float) -> Tree:
    return tree.map(lambda leaf: leaf + by * torch.arange(leaf.numel()).reshape(leaf.shape).cos(), model)


def test_the_divergence_is_from_the_teacher_who_is_not_taught() -> None:
    ALGORITHMS["fml"]()
    divergence = import_module("bench.algorithms.fml").divergence
    teacher, logits = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    assert float(divergence(teacher, logits)) == pytest.approx(0.130812, abs=1e-6)  # of (1/4, 3/4) from halves
    w = [teacher.clone().requires_grad_(), logits.clone().requires_grad_()]
    slopes = torch.autograd.grad(divergence(*w).sum(), w, allow_unused=True)
    assert slopes[0] is None
    assert slopes[1] is not None and slopes[1].tolist() == [pytest.approx([0.25, -0.25])]


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
@ENGINES
def test_who_does_not_learn_is_as_if_alone(engine: str, setting: Any) -> None:
    """The own models are Local's, what travels is FedAvg's, bit for bit, each whatever the other does."""
    local, fedavg = (done(run_of(name, engine, setting)) for name in ("local", "fedavg"))
    deaf, dumb = (done(run_of("fml", engine, setting, **fields)) for fields in ({"learn": 0.0}, {"teach": 0.0}))
    assert largest_difference(private(deaf), private(local)) == 0.0
    assert largest_difference(dumb.progress.server, fedavg.progress.server) == 0.0
    least = 1e-4 if setting is SETTING else 1e-6
    assert largest_difference(private(dumb), private(local)) > least
    assert largest_difference(deaf.progress.server, fedavg.progress.server) > least


@pytest.mark.parametrize(("learn", "teach"), [(0.5, 0.5), (0.2, 0.7)])
def test_both_models_take_the_steps_of_the_paper(learn: float, teach: float) -> None:
    """Each by an optimiser of its own, and clipped by itself."""
    run = run_of(setting=replace(SETTING, momentum=0.9), learn=learn, teach=teach)
    run.store[0] = shifted(run.task.init(), 0.05)
    own, travelling = ([torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(model).values()]
                       for model in (run.store[0], run.progress.server))  # fmt: skip
    optimisers = [torch.optim.SGD(w, run.setting.lr, 0.9, weight_decay=1e-2) for w in (own, travelling)]
    for batch in data_of(run, 0).batches(run.setting.epochs):
        one, two = (logits_of(w, batch.x) for w in (own, travelling))
        for w, mine, other, share in ((own, one, two, learn), (travelling, two, one, teach)):
            apart = F.kl_div(mine.log_softmax(1), other.detach().softmax(1), reduction="batchmean")
            loss = (1 - share) * F.cross_entropy(mine, batch.y) + share * apart
            for p, slope in zip(w, torch.autograd.grad(loss, w), strict=True):
                p.grad = slope
            torch.nn.utils.clip_grad_norm_(w, 0.5)
        for optimiser in optimisers:
            optimiser.step()
    upload, kept = toy.upload_once(run)
    for found, w in ((kept, own), (upload, travelling)):
        expected = tree.unflatten(dict(zip(tree.flatten(found), (p.detach() for p in w), strict=True)))
        assert largest_difference(found, expected) < 1e-5


def logits_of(w: list[torch.nn.Parameter], x: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x.flatten(1), *w[:2])), *w[2:])


@ENGINES
def test_two_that_change_places_change_what_they_become(engine: str) -> None:
    found = []
    for learn, teach, turn in ((0.3, 0.6, 1), (0.6, 0.3, -1)):
        run = run_of("fml", engine, replace(SETTING, participation=1.0), learn=learn, teach=teach)
        models = (run.task.init(), shifted(run.task.init(), 0.1))[::turn]
        run.progress.server, run.store[0] = models
        found.append(toy.upload_once(run)[::turn])
    assert max(largest_difference(*pair) for pair in zip(*found, strict=True)) < 1e-6


def test_the_more_they_learn_the_more_alike_they_are() -> None:
    apart = []
    for share in (0.0, 0.5, 0.9):
        run = run_of(setting=replace(toy.SETTING, epochs=20), learn=share, teach=share)
        run.store[0] = shifted(run.task.init(), 0.1)
        upload, kept = toy.upload_once(run)
        x = run.population.images.plain(run.population.index[1])  # of another client
        one, two = (run.task.logits(model, x).log_softmax(1) for model in (upload, kept))
        apart.append(float(F.kl_div(one, two, reduction="batchmean", log_target=True)))
    assert apart == sorted(apart, reverse=True) and apart[2] < 0.5 * apart[0]


def test_own_models_stay_and_are_tested_and_a_newcomer_has_the_received_one() -> None:
    run = toy.finish(run_of(setting=replace(SETTING, participation=0.25, unseen=1)))
    received, task = run.progress.server, run.task_at(2)
    size = tree.nbytes(received)
    clients = sum(len(run.population.cohort(r)) for r in range(3))
    assert run.progress.cost["bytes_down"] == run.progress.cost["bytes_up"] == clients * size
    known = list(run.store.clients())
    never = [k for k in range(run.population.training) if k not in known]
    models = run.evaluator.models(task, received, received, run.store, [known[0], never[0]], True)["personal"]
    assert largest_difference(models[0], run.store[known[0]]) == 0.0
    assert largest_difference(models[1], received) == 0.0
    assert largest_difference(run.store[never[0]], run.task.init()) == 0.0
    held_out = run.evaluator.models(task, received, received, run.store, [7], True)["unseen"][0]
    assert largest_difference(held_out["body"], received["body"]) == 0.0
    assert [str(stage) for stage in stages(run.algorithm.newcomer_adaptation(task))] == ["5 epochs of head at 1 × lr"]
    generic = run.algorithm.global_model(task, received)
    assert generic is not None and largest_difference(generic, received) == 0.0
