"""RedGrape: a client's work by automatic differentiation, classes' gradients, FedAvg without its two ideas, draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import LocalData, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=3, momentum=0.9, weight_decay=1e-2)
EVERY_CLASS = (120, 120, 120, 120)
MODEL = ("body", "head", "attractor")
OFF: dict[str, Any] = {"balance": 0.0, "attract": False}


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **more: Any) -> Run:
    sizes = more.pop("sizes", toy.SIZES)
    return toy.run(ALGORITHMS[name](**more), engine, setting=replace(setting, clients=len(sizes)), sizes=sizes)


def part_of(run: Run, *parts: str) -> Tree:
    return {key: run.progress.server[key] for key in parts}


@pytest.mark.equivalence
@pytest.mark.parametrize(("engine", "apart"), [("stacked", 0.0), ("serial", 1e-6)])
def test_without_both_heads_and_balance_it_is_fedavg(engine: str, apart: float) -> None:
    """To the bit where FedAvg's steps are taken one leaf after the other, too: serially they are fused."""
    off, fedavg = (toy.finish(run_of(*each, engine=engine)) for each in (("redgrape",), ("fedavg",)))
    assert largest_difference(part_of(off, "body"), part_of(fedavg, "body")) > 1e-3
    off = toy.finish(run_of("redgrape", engine, **OFF))
    assert largest_difference(part_of(off, "body", "head"), part_of(fedavg, "body", "head")) <= apart
    assert not any(leaf.any() for leaf in tree.flatten(off.progress.server["attractor"]).values())


@pytest.mark.parametrize("on", [{"balance": 0.1, "attract": False}, {"balance": 0.0, "attract": True}])
def test_each_idea_changes_something(on: dict[str, Any]) -> None:
    runs = [toy.finish(run_of("redgrape", **fields)) for fields in (on, OFF)]
    assert largest_difference(*(part_of(run, "body", "head") for run in runs)) > 1e-3


def hidden(body: Sequence[Tensor], x: Tensor) -> Tensor:
    return torch.relu(F.linear(x.flatten(1), *body))


def class_gradients(run: Run, server: Tree, data: LocalData) -> dict[int, tuple[Tensor, ...]]:
    x, y = run.population.images.plain(data.index), data.y
    body, head = ([leaf.clone() for leaf in tree.flatten(server[part]).values()] for part in ("body", "head"))
    head = [leaf.requires_grad_() for leaf in head]
    return {
        int(c): torch.autograd.grad(F.cross_entropy(F.linear(hidden(body, x[y == c]), *head), y[y == c]), head)
        for c in y.unique()
    }


def by_hand(run: Run, server: Tree, client: int, round: int, balance: float, count: int) -> Tree:
    """The client's steps, with torch's SGD and an update of the first head beside it."""
    data, c = data_of(run, client, round), run.task.num_classes
    w = [torch.nn.Parameter(leaf.clone()) for part in MODEL for leaf in tree.flatten(server[part]).values()]
    body, head, other = w[:2], w[2:4], w[4:]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    drawn = data_of(run, client, round).of_each_class(count)
    rows = drawn.index[: int(drawn.n)]
    x, y = run.population.images.plain(rows), run.population.images.y[rows]
    there = y.unique().tolist()
    missing = [k for k in range(c) if k not in there and server["known"][k] > 0]
    for batch in data.batches(2):
        pull = [torch.zeros_like(leaf) for leaf in head]
        if there:
            pull = list(torch.autograd.grad(F.cross_entropy(F.linear(hidden(body, x).detach(), *head), y), head))
        if missing:
            others = [server["prototypes"][name][missing].mean(0) for name in ("weight", "bias")]
            sums = (len(there) * p + len(missing) * o for p, o in zip(pull, others, strict=True))
            pull = [total / (len(there) + len(missing)) for total in sums]
        z = hidden(body, batch.x)
        optimiser.zero_grad()
        F.cross_entropy(F.linear(z, *head) + F.linear(z, *other), batch.y).backward()
        norms = [float(leaf.grad.norm()) for leaf in head if leaf.grad is not None]
        optimiser.step()
        with torch.no_grad():
            for leaf, p, norm in zip(head, pull, norms, strict=True):
                leaf.sub_(0.05 * balance * norm * p / max(float(p.norm()), 1e-12))
    paths = [path for part in MODEL for path in tree.flatten({part: server[part]})]
    return tree.unflatten({path: leaf.detach() for path, leaf in zip(paths, w, strict=True)})


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_round_is_the_papers(engine: str) -> None:
    """From the second on, with a class of which no gradient is known."""
    run = run_of("redgrape", engine, replace(SETTING, rounds=2), balance=0.7, per_class=3)
    run.step()
    known = run.progress.server["known"].clone()
    assert bool(known.all())
    known[3] = 0
    before = run.progress.server = {**run.progress.server, "known": known}
    cohort = range(8)
    drawn = [int(data_of(run, k, 1).of_each_class(3).n) for k in cohort]
    assert 0 in drawn and max(drawn) >= 9  # some client has nothing to balance with
    run.step()
    wanted = mean_by_size(run, cohort, [by_hand(run, before, k, 1, 0.7, 3) for k in cohort])
    assert largest_difference(part_of(run, *MODEL), wanted) < 5e-5
    found: dict[int, list[tuple[Tensor, ...]]] = {}
    for k in cohort:
        for c, gradient in class_gradients(run, before, data_of(run, k, 1)).items():
            found.setdefault(c, []).append(gradient)
    assert max(map(len, found.values())) > 1
    for c, gradients in found.items():
        for name, each in zip(("weight", "bias"), zip(*gradients, strict=True), strict=True):
            assert torch.allclose(run.progress.server["prototypes"][name][c], torch.stack(each).mean(0), atol=1e-5)


def test_nothing_is_balanced_before_gradients_are_known() -> None:
    runs = [toy.finish(run_of("redgrape", setting=replace(SETTING, rounds=1), balance=b)) for b in (0.0, 5.0)]
    assert largest_difference(*(part_of(run, *MODEL) for run in runs)) == 0.0


def test_a_client_that_has_all_classes_needs_nobodys_gradient() -> None:
    run = run_of("redgrape", sizes=EVERY_CLASS)
    run.step()
    uploads = []
    for scale in (1.0, -9.0):
        run.progress.server = {
            **run.progress.server,
            "prototypes": tree.scale(run.progress.server["prototypes"], scale),
        }
        uploads.append(toy.upload_once(run, 0, run.task_at(1))[0])
    assert largest_difference(*({key: upload[key] for key in MODEL} for upload in uploads)) == 0.0


def test_a_class_that_nobody_has_keeps_its_gradient() -> None:
    run = run_of("redgrape")
    run.step()
    before, task = run.progress.server, run.task_at(1)
    uploads = [toy.upload_once(run, k, task)[0] for k in (0, 5)]
    absent = sum(upload["seen"] for upload in uploads) == 0
    assert bool(absent.any()) and not bool(absent.all())
    after = run.algorithm.aggregate(task, before, Uploads(uploads, torch.tensor([60.0, 3.0])))
    for name in ("weight", "bias"):
        same = (after["prototypes"][name] == before["prototypes"][name]).flatten(1).all(1)
        assert same.tolist() == absent.tolist()
    assert bool(after["known"].all())


def test_the_second_head_takes_up_the_imbalance_and_is_not_tested() -> None:
    """Rows of frequent classes grow in it, as far as the first one is held back."""
    run = toy.finish(run_of("redgrape"))
    model = run.algorithm.global_model(run.task_at(2), run.progress.server)
    assert model is not None and largest_difference(model, part_of(run, "body", "head")) == 0.0
    assert float(run.progress.server["attractor"]["weight"].abs().max()) > 1e-2
    apart = tree.sub(run.progress.server["head"], tree.add(run.task.init()["head"], run.progress.server["attractor"]))
    assert float(apart["weight"].abs().max()) > 1e-3


def test_bytes_are_two_heads_and_a_gradient_of_each_class() -> None:
    run = run_of("redgrape", setting=replace(SETTING, rounds=1))
    c, d = 6, run.task.model.feature_size
    each = tree.nbytes(part_of(run, "body", "head")) + 4 * (c * d + c) + 4 * c * (c * d + c) + 4 * c
    toy.finish(run)
    assert (run.progress.cost["bytes_down"], run.progress.cost["bytes_up"]) == (8 * each, 8 * each)


def test_draws_are_of_each_class_that_has_enough_and_new_in_each_round() -> None:
    run = run_of("redgrape")
    seen = set()
    for round in range(3):
        data = data_of(run, 0, round)
        drawn = data.of_each_class(4)
        n, had = int(drawn.n), torch.bincount(data.y, minlength=6)
        rows = drawn.index[:n]
        assert rows.unique().numel() == n and set(rows.tolist()) <= set(data.index.tolist())
        counts = torch.bincount(data.images.y[rows], minlength=6)
        assert counts.tolist() == torch.where(had >= 4, 4, 0).tolist() == drawn.class_counts.tolist()
        assert sum(int(batch.weight.sum()) for batch in drawn.plain_batches()) == n
        assert data.samples() == pytest.approx(len(drawn.index) / 3)
        assert data.of_each_class(4).index.tolist() == drawn.index.tolist()
        assert data.of_each_class(4, "another").index.tolist() != drawn.index.tolist()
        seen.add(tuple(rows.tolist()))
    assert len(seen) == 3
    assert int(data_of(run, 0).unlabelled().of_each_class(1).n) == 0
    assert int(data_of(run, 6).of_each_class(2).n) == 0  # which has no examples


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1)
    sizes = (20, 9, 0, 0, 0, 0, 0, 0)
    runs = [toy.finish(run_of("redgrape", engine, setting, sizes=sizes)) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("redgrape", engine, setting)), "unseen") > 0.8
