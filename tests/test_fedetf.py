"""FedETF: its steps and the tuning of a client's head against loops written out, the frame, and what travels once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, tree
from bench.contract import toy
from bench.losses import cross_entropy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured, method

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=2, momentum=0.9, weight_decay=1e-2)
BODY = 64 * 64 + 64


def run_of(engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedetf"](**fields), engine, setting=setting, sizes=sizes)


def personal(run: Run, client: int = 0, kind: str = "personal") -> Tree:
    """A client's model when it is tested after the last round."""
    task, server = run.task_at(run.setting.rounds - 1), run.progress.server
    (model,) = run.evaluator.models(task, server, server, run.store, [client], True)[kind]
    return model


def written_out(w: Tree, x: Tensor) -> Tensor:
    """Cosines of projected features with the frame, times the scale."""
    z = torch.relu(F.linear(x.flatten(1), w["body"]["hidden"]["weight"], w["body"]["hidden"]["bias"]))
    u = F.linear(z, w["projection"]["weight"], w["projection"]["bias"])
    found: Tensor = w["scale"] * (u @ w["etf"].T) / u.norm(dim=1, keepdim=True)
    return found


def leaves_of(model: Tree, parts: tuple[str, ...]) -> tuple[Tree, list[Tensor]]:
    """A model of which some parts want gradients, and their leaves."""
    moving = tree.map(lambda leaf: leaf.clone().requires_grad_(), {part: model[part] for part in parts})
    return {**model, **moving}, list(tree.flatten(moving).values())


@pytest.mark.parametrize("projection", [None, 6, 17])
def test_the_frame_has_equal_angles_in_as_many_dimensions_as_are_projected_to(projection: int | None) -> None:
    server = run_of(projection=projection).progress.server
    assert server["etf"].shape == (6, projection or 6) and server["projection"]["weight"].shape[0] == (projection or 6)
    assert torch.allclose(server["etf"] @ server["etf"].T, 1.2 * torch.eye(6) - 0.2, atol=1e-6)


def test_steps_are_those_of_the_papers_loss() -> None:
    """The softmax is over n_c e^(logit_c), in which a class that the client has not is nothing."""
    run = run_of(scale=3.0)
    received, data = run.progress.server, data_of(run, 1)
    counts = torch.bincount(data.y, minlength=6)
    assert 1 < int((counts > 0).sum()) < 6 and int(counts.max()) > int(counts[counts > 0].min())
    w, leaves = leaves_of(received, ("body", "projection", "scale"))
    optimiser = torch.optim.SGD(leaves, 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        weighed = counts * written_out(w, batch.x).exp()
        optimiser.zero_grad()
        (-(weighed[torch.arange(len(batch.y)), batch.y] / weighed.sum(1)).log().mean()).backward()
        optimiser.step()
    upload, _ = toy.upload_once(run, 1)
    expected = tree.map(torch.Tensor.detach, {key: w[key] for key in ("body", "projection", "scale")})
    assert largest_difference(upload, expected) < 1e-5
    assert abs(float(upload["scale"]) - 3.0) > 1e-3


def test_of_equally_many_examples_the_loss_is_cross_entropy() -> None:
    run = run_of()
    data = replace(data_of(run, 0), class_counts=torch.full((6,), 7))
    model, (batch, *_) = run.progress.server, data.batches(1)
    logits = method(run).predict(run.task, model, batch.x)
    found = method(run).balanced(run.task, model, data, batch)
    assert float(found) == pytest.approx(float(cross_entropy(logits, batch)), abs=1e-5)
    other = method(run).balanced(run.task, model, replace(data, class_counts=torch.arange(1, 7)), batch)
    assert abs(float(found) - float(other)) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_frame_never_moves_and_travels_once(engine: str) -> None:
    run = run_of(engine, replace(SETTING, rounds=3, participation=0.5, eval_every=3))
    frame = run.progress.server["etf"].clone()
    cost = toy.finish(run).progress.cost
    cohorts = [run.population.cohort(round) for round in range(3)]
    visits, clients = sum(map(len, cohorts)), len({k for cohort in cohorts for k in cohort})
    model = BODY + 6 * 64 + 6 + 1
    assert visits > clients
    assert cost["bytes_down"] == 4 * (visits * model + clients * 6 * 6)
    assert cost["bytes_up"] == 4 * visits * model
    assert torch.equal(run.progress.server["etf"], frame)


def tuned(run: Run, model: Tree, parts: tuple[str, ...], lr: float, batches: Any, counts: Tensor | None = None) -> Tree:
    w, leaves = leaves_of(model, parts)
    optimiser = torch.optim.SGD(leaves, lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    for batch in batches:
        logits = written_out(w, batch.x)
        optimiser.zero_grad()
        F.cross_entropy(logits if counts is None else logits + counts.log(), batch.y).backward()
        optimiser.step()
    return tree.map(torch.Tensor.detach, w)


def test_a_client_trains_once_more_and_then_its_head_and_the_projection_in_turn() -> None:
    """Two epochs as the setting has them, then twice three of each at rates of their own, by plain cross-entropy."""
    run = toy.finish(run_of(alternations=2))
    visit = run.population.visit(0, 1, {})
    data = replace(data_of(run, 0), key=visit.key)
    counts = torch.bincount(data.y, minlength=6)
    model = tuned(run, run.progress.server, ("body", "projection", "scale"), 0.05, data.batches(2, "adapt 0"), counts)
    assert largest_difference({**model, "etf": run.progress.server["etf"]}, model) == 0.0
    spent = 2
    for part, lr in (("etf", 0.1), ("projection", 0.05)) * 2:
        model = tuned(run, model, (part,), lr, data.batches(3, f"adapt {spent}"))
        spent += 3
    assert spent == 14
    assert largest_difference(personal(run), model) < 1e-4
    assert largest_difference({"etf": model["etf"]}, {"etf": run.progress.server["etf"]}) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_without_alternations_the_frame_stays_and_with_one_only_head_and_projection_differ(engine: str) -> None:
    without, once = (personal(toy.finish(run_of(engine, alternations=n))) for n in (0, 1))
    apart = {key: largest_difference({"it": without[key]}, {"it": once[key]}) > 1e-3 for key in without}
    assert apart == {"body": False, "projection": True, "scale": False, "etf": True}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_class_that_nobody_holds_harms_nobody(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, participation=1.0), sizes=(20, 9, 0)))
    assert tree.is_finite(run.progress.server)
    x = run.population.images.plain(torch.arange(29))
    assert bool(method(run).predict(run.task, run.progress.server, x).isfinite().all())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_is_tuned_as_everybody_is(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    run = toy.finish(run_of(engine, setting))
    assert measured(run, "unseen") > 0.8 and measured(run, "personal") > 0.8
    stages = run.algorithm.newcomer_adaptation(run.task)
    assert stages == run.algorithm.adaptation(run.task)
    assert largest_difference(personal(run, 7, "unseen"), run.progress.server) > 1e-3


def test_the_balanced_loss_matters() -> None:
    def unweighed(logits: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        return cross_entropy(logits, batch)

    mine = toy.finish(run_of()).progress.server
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.algorithms.fedetf.balanced_softmax", unweighed)
        other = toy.finish(run_of()).progress.server
    assert largest_difference(mine, other) > 1e-3
