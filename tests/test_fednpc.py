"""FedNPC: steps on noise by automatic differentiation, what becomes of rows and biases, nothing without steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import PARTS
from bench.protocol.spelling import parse_algorithms
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, rounds=2)


def head(scale: float = 2.0) -> Tree:
    key = keys.key(3)
    return {"weight": scale * keys.normal(key, 6, 64) / 8, "bias": scale * keys.normal(keys.fold(key, "b"), 6)}


def corrected(start: Tree, **fields: Any) -> Tree:
    part: Any = PARTS["fednpc"](**fields)
    found: Tree = part.correct(toy.run(toy.Host()).task_at(1), {"head": start}, None)["head"]
    return found


def test_steps_descend_cross_entropy_of_noise_with_every_label() -> None:
    task, start = toy.run(toy.Host()).task_at(1), head()
    noise = keys.normal(keys.fold(task.key, "server", "fednpc", 1), 500, 64)
    w = [torch.nn.Parameter(start[name].clone()) for name in ("weight", "bias")]
    optimiser = torch.optim.SGD(w, lr=0.2, momentum=0.9)
    for _ in range(6):
        optimiser.zero_grad()
        logits = F.linear(noise, *w).repeat(6, 1)  # each row of noise with each label
        F.cross_entropy(logits, torch.arange(6).repeat_interleave(500)).backward()
        optimiser.step()
    found = corrected(start, steps=6, samples=500, lr=0.2)
    assert largest_difference(found, start) > 0.1
    for name, wanted in zip(("weight", "bias"), w, strict=True):
        assert torch.allclose(found[name], wanted.detach(), atol=1e-5)


def test_rows_and_differences_of_biases_shrink_and_in_the_end_nothing_is_left() -> None:
    def sizes(start: Tree) -> tuple[float, float]:
        apart = start["weight"] - start["weight"].mean(0)  # what all rows have in common no softmax sees
        return float(apart.norm(dim=1).mean()), float(start["bias"].std())

    seen = [sizes(corrected(head(), steps=steps, samples=2000)) for steps in (0, 4, 8, 2000)]
    for one, other in pairwise(seen):
        assert other[0] < one[0] and other[1] < one[1]
    assert seen[-1][1] < 0.1 * seen[0][1] and seen[-1][0] < 0.1 * seen[0][0]


def test_long_rows_shrink_more() -> None:
    """Which are those of frequent classes."""
    start = head(1.0)
    start["weight"][0] *= 6
    ratio = corrected(start, samples=2000)["weight"].norm(dim=1) / start["weight"].norm(dim=1)
    assert float(ratio[0]) < float(ratio[1:].min())


def test_no_steps_are_no_correction() -> None:
    assert largest_difference(corrected(head(), steps=0), head()) == 0.0
    (plain,) = parse_algorithms("fedavg")
    assert parse_algorithms("fedavg+fednpc(steps=0)") == [plain]


def test_training_and_bytes_are_fedavgs_and_the_uncorrected_model_stands_beside() -> None:
    runs = [toy.finish(toy.run(parse_algorithms(name)[0], setting=SETTING)) for name in ("fedavg", "fedavg+fednpc")]
    plain, tuned = (run.outcome() for run in runs)
    assert plain.digest == tuned.digest
    assert all(runs[0].progress.cost[key] == runs[1].progress.cost[key] for key in ("bytes_up", "bytes_down"))
    assert tuned.metrics["generic:uncorrected"] == plain.metrics["generic"]


def test_every_client_is_tuned_on_the_same_noise() -> None:
    part: Any = PARTS["fednpc"](samples=200)
    task, model = toy.run(toy.Host()).task_at(1), {"head": head()}
    stacked = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), model)
    both = torch.func.vmap(lambda each: part.correct(task, each, None))(stacked)
    for k, scale in enumerate((1.0, 2.0)):
        alone = part.correct(task, tree.scale(model, scale), torch.ones(6))
        assert largest_difference(tree.pick(both, k), alone) < 1e-5


def test_momentum_carries_a_head_of_short_rows_beyond_nothing() -> None:
    """So that after the reference's steps the likeliest class is the least likely one: the default takes fewer."""
    start, z = head(0.5), keys.normal(keys.key(9), 300, 64)
    agreed = []
    for fields in ({}, dict(PARTS["fednpc"].paper)):
        tuned = corrected(start, samples=2000, **fields)
        said = [F.linear(z, each["weight"], each["bias"]).argmax(1) for each in (start, tuned)]
        agreed.append(float((said[0] == said[1]).float().mean()))
    assert agreed[0] > 0.7 and agreed[1] < 0.1


def test_the_values_are_the_references() -> None:
    part = PARTS["fednpc"]()
    assert (part.steps, part.samples, part.lr, part.paper) == (10, 10_000, 0.1, {"steps": 27})


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    (method,) = parse_algorithms("fedavg+fednpc(samples=500)")
    assert measured(toy.finish(toy.run(method, engine, setting=setting)), "unseen") > 0.8
