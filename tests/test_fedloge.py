"""FedLoGe: a client's work against three optimisers written out, the three rules of a personal model, and what is
sent once.
"""

from __future__ import annotations

import importlib
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
FAST: dict[str, Any] = {"etf_steps": 100}
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
module: Any = importlib.import_module("bench.algorithms.fedloge")
RULES = ("P0", "P1", "P2")


def run_of(engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedloge"](**FAST, **fields), engine, setting=setting)


def parameters(part: Tree) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(part).values()]


def back(leaves: list[torch.nn.Parameter], form: Tree) -> Tree:
    return tree.unflatten(dict(zip(tree.flatten(form), (leaf.detach() for leaf in leaves), strict=True)))


def worked(run: Run, received: Tree, own: Tree, data: LocalData) -> tuple[Tree, Tree]:
    """The body learns through the frame; both heads read the features that it had before its step."""
    setting = run.setting
    groups = [parameters(part) for part in (received["body"], received["head"], own)]
    rules = [torch.optim.SGD(w, setting.lr, setting.momentum, weight_decay=setting.weight_decay) for w in groups]
    for batch in data.batches(setting.epochs):
        z = torch.relu(F.linear(batch.x.flatten(1), *groups[0]))
        heads = [(z, list(received["etf"].values())), (z.detach(), groups[1]), (z.detach(), groups[2])]
        losses = [F.cross_entropy(F.linear(features, *head), batch.y) for features, head in heads]
        for rule, w, value in zip(rules, groups, losses, strict=True):
            rule.zero_grad()
            value.backward()
            if setting.clip is not None:
                torch.nn.utils.clip_grad_norm_(w, setting.clip)
        for rule in rules:
            rule.step()
    body, head, mine = (
        back(w, form) for w, form in zip(groups, (received["body"], received["head"], own), strict=True)
    )
    return {"body": body, "head": head}, mine


@ENGINES
@pytest.mark.parametrize("clip", [None, 0.3])
def test_clients_run_three_optimisers_that_do_not_meet_and_are_averaged_by_size(
    engine: str, clip: float | None
) -> None:
    run = run_of(engine, replace(SETTING, clip=clip), etf_norm=1.0)
    for round in range(2):
        received, cohort = run.progress.server, run.population.cohort(round)
        work = [worked(run, received, run.store[k]["head"], data_of(run, k, round)) for k in cohort]
        run.step()
        mean = mean_by_size(run, cohort, [model for model, _ in work])
        after = run.progress.server
        assert largest_difference({"body": after["body"], "head": after["head"]}, mean) < 2e-5
        assert all(largest_difference(run.store[k]["head"], h) < 2e-5 for k, (_, h) in zip(cohort, work, strict=True))
        assert largest_difference(after["etf"], received["etf"]) == 0.0


def scores(body: Tree, x: Tensor, *heads: tuple[Tensor, Tensor]) -> Tensor:
    z = torch.relu(F.linear(x.flatten(1), *tree.flatten(body).values()))
    return torch.stack([F.linear(z, weight, bias) for weight, bias in heads]).sum(0)


@pytest.mark.parametrize("rule", RULES)
def test_all_rules_are_reported_and_the_chosen_one_is_the_personal_model(rule: str) -> None:
    """P0: Phi' h + a. P1: that, and Phi h + e. P2: Phi' h + e, and Psi h + a. Rows of Phi' are |Phi_c| Psi_c."""
    run = toy.finish(run_of(personal_rule=rule))
    client, server = run.store.clients()[0], run.progress.server
    (psi, a), (phi, e) = ((head["weight"], head["bias"]) for head in (server["head"], run.store[client]["head"]))
    longer = torch.stack([row * own.square().sum().sqrt() for row, own in zip(psi, phi, strict=True)])
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = {
        "P0": scores(server["body"], x, (longer, a)),
        "P1": scores(server["body"], x, (longer, a), (phi, e)),
        "P2": scores(server["body"], x, (longer, e), (psi, a)),
        "unrealigned": scores(server["body"], x, (psi, a), (phi, e)),
    }
    given = run.task, server, run.store[client], data_of(run, client, 2)
    variants, personal = run.algorithm.personal_variants(*given), run.algorithm.personal_model(*given)
    assert variants.keys() == wanted.keys() and personal is not None
    for name, model in variants.items():
        assert torch.allclose(run.task.logits(model, x), wanted[name], atol=1e-4), name
        assert name == rule or float((wanted[name] - wanted[rule]).abs().max()) > 1e-2
    assert largest_difference(personal, variants[rule]) == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_every_evaluation_has_all_rules(rule: str) -> None:
    outcome = toy.finish(run_of(personal_rule=rule)).outcome()
    for row in outcome.rounds:
        assert row["personal"] == row[f"personal:{rule}"]
        assert all(row[f"personal:{name}"] is not None for name in (*RULES, "unrealigned"))


def test_the_generic_model_has_rows_of_one_length_and_the_rows_of_the_shared_head() -> None:
    run = toy.finish(run_of())
    server = run.progress.server
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    psi, a = server["head"]["weight"], server["head"]["bias"]
    model = run.algorithm.global_model(run.task, server)
    assert model is not None
    equal = torch.stack([1.7 * row / row.square().sum().sqrt() for row in psi])
    assert torch.allclose(run.task.logits(model, x), scores(server["body"], x, (equal, a)), atol=1e-4)
    for rule, bias in (("drop", 0 * a), ("scale", 1.7 * a / psi.norm(dim=1))):
        other = ALGORITHMS["fedloge"](generic_bias=rule, **FAST).global_model(run.task, server)
        assert torch.allclose(run.task.logits(other, x), scores(server["body"], x, (equal, bias)), atol=1e-4)


@pytest.mark.parametrize("participation", [0.5, 1.0])
def test_a_frame_is_sent_to_a_client_once(participation: float) -> None:
    run = toy.finish(run_of(setting=replace(SETTING, participation=participation)))
    model = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    frame = 6 * 64 + 6
    visits = sum(len(run.population.cohort(r)) for r in range(run.setting.rounds))
    clients = len(run.store.clients())
    cost = run.outcome().cost
    assert cost["bytes_down"] == 4 * (visits * model + clients * frame)
    assert cost["bytes_up"] == 4 * visits * model


@ENGINES
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert (toy.finish(run_of(engine, setting)).outcome().metrics["unseen"] or 0.0) > 0.8


def spread(v: Tensor, mask: Tensor, norm: float, steps: int) -> Tensor:
    """Equation 4 by torch's own gradients and Adam, over the entries that survive."""
    moving = torch.nn.Parameter(v.clone())
    optimiser = torch.optim.Adam([moving], lr=1e-4)
    for _ in range(steps):
        w = moving * mask
        unit = F.normalize(w, dim=1)
        cosine = (unit @ unit.T).masked_fill(torch.eye(len(v), dtype=torch.bool), -2.0)
        angles = cosine.amax(1).arccos()
        loss = (w.norm(dim=1) - norm).square().sum() - angles.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return moving.detach()


@pytest.mark.parametrize(("classes", "d"), [(7, 40), (30, 9)])
def test_a_frame_is_spread_as_by_torchs_adam(classes: int, d: int) -> None:
    draw = torch.Generator().manual_seed(classes)
    mask = (torch.rand(classes, d, generator=draw) > 0.4).double()
    v = F.normalize(torch.randn(classes, d, generator=draw, dtype=torch.float64), dim=1) * mask
    before = v.clone()
    found, wanted = module._spread(v, mask, 0.8, 60), spread(v, mask, 0.8, 60)
    assert float((wanted - v).abs().max()) > 3e-3
    assert torch.allclose(found, wanted, rtol=0.0, atol=1e-9)
    assert torch.equal(v, before) and bool((found[mask == 0] == 0).all())


@pytest.mark.parametrize("classes", [2, 255, 256, 257, 600])
def test_nearest_vectors_are_found_block_by_block(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAIRS", 1)  # 256 rows at a time
    u = F.normalize(torch.randn(classes, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64), dim=1)
    cosine, j = module._nearest(u)
    others = (u @ u.T).masked_fill(torch.eye(classes, dtype=torch.bool), -2.0)
    assert torch.allclose(cosine, others.amax(1), rtol=0.0, atol=1e-12)
    assert torch.equal(j, others.argmax(1))
