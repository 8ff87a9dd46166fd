"""FedRoD: a client's work against two optimisers written out, and whose logits are added where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import LocalData, Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size

SETTING = replace(toy.SETTING, participation=0.5, rounds=3, momentum=0.9, weight_decay=1e-2)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(engine: str = "serial", setting: Any = SETTING) -> Run:
    return toy.run(ALGORITHMS["fedrod"](), engine, setting=setting)


def some_head(run: Run) -> Tree:
    draw = torch.Generator().manual_seed(0)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=draw), run.task.init()["head"])


def parameters(part: Tree) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(part).values()]


def back(leaves: list[torch.nn.Parameter], form: Tree) -> Tree:
    return tree.unflatten(dict(zip(tree.flatten(form), (leaf.detach() for leaf in leaves), strict=True)))


def worked(run: Run, received: Tree, own: Tree, data: LocalData) -> tuple[Tree, Tree]:
    """Body and generic head by the softmax over n_c e^(logit_c), the personal head by plain cross-entropy of both."""
    setting, present = run.setting, torch.nonzero(data.class_counts).flatten()
    body, generic, personal = parameters(received["body"]), parameters(received["head"]), parameters(own)
    rules = [torch.optim.SGD(w, setting.lr, setting.momentum, weight_decay=setting.weight_decay)
             for w in (body + generic, personal)]  # fmt: skip
    for batch in data.batches(setting.epochs):
        z = torch.relu(F.linear(batch.x.flatten(1), *body))
        logits = F.linear(z, *generic)
        weighed = data.class_counts[present] * logits[:, present].exp()
        place = (batch.y[:, None] == present).float().argmax(1)
        balanced = -(weighed / weighed.sum(1, keepdim=True)).log()[torch.arange(len(place)), place].mean()
        both = F.cross_entropy(logits.detach() + F.linear(z.detach(), *personal), batch.y)
        for rule, w, value in zip(rules, (body + generic, personal), (balanced, both), strict=True):
            rule.zero_grad()
            value.backward()
            if setting.clip is not None:
                torch.nn.utils.clip_grad_norm_(w, setting.clip)
        for rule in rules:
            rule.step()
    model = {"body": back(body, received["body"]), "head": back(generic, received["head"])}
    return model, back(personal, own)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_client_runs_two_optimisers_that_do_not_meet(clip: float | None) -> None:
    run = run_of(setting=replace(SETTING, clip=clip))
    run.store[0] = {"head": some_head(run)}
    upload, kept = toy.upload_once(run)
    model, head = worked(run, run.progress.server, run.store[0]["head"], data_of(run, 0, 0))
    assert 1 < len(torch.nonzero(data_of(run, 0, 0).class_counts)) < 6
    assert largest_difference(upload, model) < 1e-5
    assert largest_difference(kept["head"], head) < 1e-5


@ENGINES
@pytest.mark.parametrize("clip", [None, 0.3])
def test_rounds_are_those_clients_work_averaged_by_size(engine: str, clip: float | None) -> None:
    run = run_of(engine, replace(SETTING, clip=clip))
    for round in range(2):
        received, cohort = run.progress.server, run.population.cohort(round)
        work = [worked(run, received, run.store[k]["head"], data_of(run, k, round)) for k in cohort]
        run.step()
        mean = mean_by_size(run, cohort, [model for model, _ in work])
        assert largest_difference(run.progress.server, mean) < 2e-5
        assert all(largest_difference(run.store[k]["head"], h) < 2e-5 for k, (_, h) in zip(cohort, work, strict=True))


def test_the_generic_model_scores_by_the_shared_head_and_the_personal_one_by_both_together() -> None:
    run = toy.finish(run_of())
    client, server = run.store.clients()[0], run.progress.server
    mine = run.store[client]["head"]
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def scores(*heads: Tree) -> Tensor:
        z = torch.relu(F.linear(x.flatten(1), *tree.flatten(server["body"]).values()))
        return torch.stack([F.linear(z, head["weight"], head["bias"]) for head in heads]).sum(0)

    generic = run.algorithm.global_model(run.task, server)
    personal = run.algorithm.personal_model(run.task, server, {"head": mine}, data_of(run, client, 2))
    assert generic is not None and personal is not None
    assert torch.allclose(run.task.logits(generic, x), scores(server["head"]), atol=1e-5)
    assert torch.allclose(run.task.logits(personal, x), scores(server["head"], mine), atol=1e-5)
    assert float((scores(server["head"], mine) - scores(server["head"])).abs().max()) > 0.1


@ENGINES
def test_who_never_took_part_predicts_as_the_generic_model(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, participation=0.25)))
    never = [k for k in range(run.population.training) if k not in run.store.clients()]
    task, server = run.task_at(2), run.progress.server
    models = run.evaluator.models(task, server, server, run.store, never, True)["personal"]
    assert never and all(largest_difference(model, server) == 0.0 for model in models)


@ENGINES
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert (toy.finish(run_of(engine, setting)).outcome().metrics["unseen"] or 0.0) > 0.8
