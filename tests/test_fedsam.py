"""FedSAM and FedASAM: steps against a loop written out, FedAvg where the worst point is here, and flatter minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, LocalData, tree
from bench.contract import toy
from bench.optim import worst_nearby
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, momentum=0.9, weight_decay=1e-2, clip=0.5)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else (20, 9, 0, 0, 0, 0, 0, 0)
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def batches(run: Run) -> list[Batch]:
    """The batches of client 0 in round 0."""
    visit = run.population.visit(0, 0, {})
    n = torch.tensor(len(visit.index))
    data = LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.setting.batch_size)
    return list(data.batches(run.setting.epochs))


def entropy(w: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of the toy's network: the hidden layer's weight and bias, the head's weight and bias."""
    hidden = torch.relu(x.flatten(1) @ w[0].T + w[1])
    return F.cross_entropy(hidden @ w[2].T + w[3], y)


@pytest.mark.parametrize(
    ("eta", "weight", "bias"),
    [
        (None, [4.0, 2.0], 17.0),  # g = 3, 4, 12, which is 13 long
        (0.0, [4.0, 14.0], 17.0),  # T = 1, 2, 1 and so T g = 3, 8, 12
        (0.5, [7.75, 23.0], 17.0),  # T = 1.5, 2.5, 1 and so T g = 4.5, 10, 12
    ],
)
def test_the_worst_point_has_its_place_by_hand(eta: float | None, weight: list[float], bias: float) -> None:
    """w + rho T² g / |T g|, with rho as much as |T g| is."""
    here = {"weight": torch.tensor([1.0, -2.0]), "bias": torch.tensor([5.0])}
    gradient = {"a": {"weight": torch.tensor([3.0, 4.0]), "bias": torch.tensor([12.0])}}
    rho = {None: 13.0, 0.0: 217**0.5, 0.5: 264.25**0.5}[eta]
    worst = worst_nearby({"a": {**here, "stats": {"mean": torch.tensor([7.0])}}}, gradient, rho, eta)["a"]
    assert worst["weight"].tolist() == pytest.approx(weight)
    assert worst["bias"].tolist() == pytest.approx([bias])
    assert worst["stats"]["mean"].tolist() == [7.0]


def test_without_a_slope_the_worst_point_is_here() -> None:
    here = {"weight": torch.tensor([1.0, -2.0])}
    assert largest_difference(worst_nearby(here, tree.zeros_like(here), 1.0, 0.2), here) == 0.0


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("eta", [None, 0.2])
def test_where_the_worst_point_is_here_it_is_fedavg(engine: str, eta: float | None) -> None:
    runs = run_of("fedsam", engine, rho=0.0, eta=eta), run_of("fedavg", engine), run_of("fedsam", engine, eta=eta)
    off, fedavg, on = (toy.finish(run).progress.server for run in runs)
    assert largest_difference(off, fedavg) == 0.0
    assert largest_difference(on, fedavg) > 1e-4


@pytest.mark.equivalence
@pytest.mark.parametrize(("engine", "apart"), [("serial", 0.0), ("stacked", 1e-5)])
def test_where_the_worst_point_is_here_it_is_fedavg_under_batch_norm_too(engine: str, apart: float) -> None:
    """Stacked convolutions sum in another order once their weights differ by client."""
    runs = run_of("fedsam", engine, BATCH_NORM, rho=0.0), run_of("fedavg", engine, BATCH_NORM)
    assert largest_difference(*(toy.finish(run).progress.server for run in runs)) <= apart


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("rho", "eta"), [(0.1, None), (2.0, None), (0.7, 0.2), (0.7, 0.0)])
def test_steps_are_those_of_the_papers(rho: float, eta: float | None, clip: float | None) -> None:
    """The gradient at the worst point, then clipping, decay at the point itself, and momentum."""
    run = run_of("fedsam", setting=replace(SETTING, clip=clip), rho=rho, eta=eta)
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(run.progress.server).values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    for batch in batches(run):
        gradient = torch.autograd.grad(entropy(w, batch.x, batch.y), w)
        with torch.no_grad():
            sizes = [p.abs() + eta if eta is not None and p.ndim == 2 else torch.ones_like(p) for p in w]
            norm = torch.cat([(t * g).flatten() for t, g in zip(sizes, gradient, strict=True)]).norm()
            away = [rho * t**2 * g / norm for t, g in zip(sizes, gradient, strict=True)]
            if eta is None:
                assert torch.cat([one.flatten() for one in away]).norm() == pytest.approx(rho, rel=1e-5)
        worst = [(p + one).detach().requires_grad_() for p, one in zip(w, away, strict=True)]
        for p, g in zip(w, torch.autograd.grad(entropy(worst, batch.x, batch.y), worst), strict=True):
            p.grad = g
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(w, clip)
        optimiser.step()
    upload, _ = toy.upload_once(run)
    for mine, theirs in zip(tree.flatten(upload).values(), w, strict=True):
        assert torch.allclose(mine, theirs, atol=5e-6)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_running_statistics_move_once_a_step_and_at_the_point_itself(engine: str) -> None:
    """After one step they are FedAvg's; the weights are not."""
    setting = replace(BATCH_NORM, batch_size=1000)
    states = [toy.finish(run_of(name, engine, setting)).progress.server for name in ("fedsam", "fedavg")]
    parts = [tree.split(state, tree.is_statistic) for state in states]
    assert largest_difference(parts[0][0], parts[1][0]) == 0.0
    assert largest_difference(parts[0][1], parts[1][1]) > 1e-4


def sharpness(run: Run) -> tuple[float, float]:
    """Loss of the model on all training images, and how much higher it is 0.3 along its gradient."""
    images = run.population.images
    rows = torch.cat(run.population.index)
    x, y = images.plain(rows), images.y[rows]
    w = [leaf.requires_grad_() for leaf in tree.flatten(tree.clone(run.progress.server)).values()]
    here = entropy(w, x, y)
    gradient = torch.autograd.grad(here, w)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    there = entropy([p + 0.3 * g / norm for p, g in zip(w, gradient, strict=True)], x, y)
    return here.item(), (there - here).item()


def test_minima_are_flatter() -> None:
    setting = replace(toy.SETTING, participation=1.0, rounds=15, eval_every=15)
    (loss, sharp), (flat_loss, flat) = (
        sharpness(toy.finish(run_of("fedsam", "stacked", setting, rho=rho))) for rho in (0.0, 0.3)
    )
    assert flat < 0.8 * sharp
    assert flat_loss < 2 * loss + 0.1  # and it is a minimum


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedsam", engine, setting)), "unseen") > 0.8


@pytest.mark.parametrize("name", ["fedsam", "fedasam"])
def test_an_epoch_costs_two(name: str) -> None:
    sam, fedavg = (toy.finish(run_of(each)).outcome().cost["train_flops"] for each in (name, "fedavg"))
    assert sam is not None and fedavg is not None and sam == pytest.approx(2 * fedavg, rel=0.01)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_body_without_weights_stays_in_the_tree(engine: str) -> None:
    """ASAM goes by the path of a leaf, and an empty sub-tree has none."""
    run = toy.finish(run_of("fedsam", engine, replace(SETTING, model="frozen"), eta=0.2))
    assert run.progress.server["body"] == {}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_fedasam_is_fedsam_relative_to_sizes_and_fedavg_where_the_worst_point_is_here(engine: str) -> None:
    def trained(name: str, **fields: Any) -> tree.Tree:
        return toy.finish(run_of(name, engine, **fields)).progress.server

    asam = trained("fedasam")
    assert largest_difference(asam, trained("fedsam", rho=0.7, eta=0.2)) == 0.0
    assert largest_difference(trained("fedasam", rho=0.0), trained("fedavg")) == 0.0
    assert min(largest_difference(asam, trained(name)) for name in ("fedsam", "fedavg")) > 1e-4
    assert largest_difference(asam, trained("fedasam", eta=0.0)) > 1e-4


def test_of_fedasam_the_scale_of_weights_does_not_matter_but_for_eta() -> None:
    """A hidden layer twice and a head half as large compute the same, and have their worst points at the same losses.
    Biases, whose sizes are 1, stand still.
    """
    run = run_of("fedasam")
    batch, here = batches(run)[0], run.progress.server
    scale = {"body": 2.0, "head": 0.5}
    there = tree.map_paths(lambda path, w: scale[path.split("/")[0]] * w * (not path.endswith("bias")), here)
    here = tree.map_paths(lambda path, w: w * (not path.endswith("bias")), here)

    def rise(params: tree.Tree, eta: float | None) -> float:
        gradient = run.task.gradient(run.task.loss, params, batch)[1]
        gradient = tree.map_paths(lambda path, g: g * (not path.endswith("bias")), gradient)
        losses = (run.task.loss(w, batch) for w in (params, worst_nearby(params, gradient, 0.3, eta)))
        start, end = (float(loss) for loss in losses)
        return end - start

    assert rise(there, 0.0) == pytest.approx(rise(here, 0.0), rel=1e-4) and rise(here, 0.0) > 0.01
    assert abs(rise(there, None) - rise(here, None)) > 0.1 * rise(here, None)
