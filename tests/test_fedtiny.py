"""FedTiny: what is pruned stays out, candidates are judged, masks move by turns, and few bytes travel."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Exchange, Tree, keys, models, sparse, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, done, measured, method

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
HOSTILE = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=0.5, rounds=4)
DEEP = replace(HOSTILE, model="lenet5", rounds=3, epochs=1, lr=0.01)
NORMED = replace(HOSTILE, clients=3, participation=1.0, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (9, 5, 0)
LARGE = toy.Toy(enlarged=2, test=30)


def start(engine: str = "serial", setting: Any = HOSTILE, name: str = "fedtiny", **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    dataset = LARGE if setting.model == "lenet5" else toy.Toy()
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, dataset=dataset, sizes=sizes)


def module() -> Any:
    return importlib.import_module("bench.algorithms.fedtiny")


def plan(run: Run) -> Any:
    return method(run).plan(run.task)


def row(run: Run, body: Tree) -> Tensor:
    found: Tensor = plan(run).weights.row(body, torch.device("cpu"))
    return found


def by_layer(run: Run, mask: Tensor) -> list[int]:
    """How many each layer keeps."""
    return [int(part.sum()) for part in mask.split(plan(run).weights.sizes)]


def spent(run: Run) -> tuple[float, float]:
    return run.progress.cost["bytes_down"], run.progress.cost["bytes_up"]


def trip(run: Run, client: int = 0, verb: str = "local_update", round: int = 0) -> Tree:
    """What a client sends in an exchange of a round."""
    task = run.task_at(round)
    exchange = next(each for each in run.algorithm.exchanges(task) if each.client == verb)
    return toy.upload_once(run, client, task, exchange)[0]


# Equivalences ---------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("setting", [HOSTILE, NORMED, replace(HOSTILE, model="linear")], ids=["mlp", "bn", "linear"])
def test_at_density_1_it_is_fedavg(setting: Any, engine: str) -> None:
    run, fedavg = (start(engine, setting, name, **f) for name, f in (("fedtiny", {"density": 1.0}), ("fedavg", {})))
    if engine == "stacked":  # it is not stacked: the same engine for both
        fedavg = start("serial", setting, "fedavg")
    run, fedavg = done(run), done(fedavg)
    models = [each.algorithm.global_model(each.task, each.progress.server) for each in (run, fedavg)]
    assert models[0] is not None and models[1] is not None
    assert largest_difference(models[0], models[1]) == 0.0
    for cost in ("bytes_up", "bytes_down", "train_samples", "train_flops"):
        assert run.progress.cost[cost] == fedavg.progress.cost[cost]


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [HOSTILE, NORMED], ids=["mlp", "bn"])
def test_with_a_mask_that_keeps_everything_it_is_fedavg_too(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All goes through packing, masks and their moves, which find nothing to move; only the mask travels besides."""
    monkeypatch.setattr(module(), "counts", lambda shapes, total, power: tuple(math.prod(each) for each in shapes))
    module().planned.cache_clear()
    run, fedavg = start(setting=setting, density=0.5, candidates=1), start(setting=setting, name="fedavg")
    n = plan(run).weights.total
    assert plan(run).count == n > 0
    run, fedavg = done(run), done(fedavg)
    mine = {key: run.progress.server[key] for key in ("body", "head")}
    assert largest_difference(mine, fedavg.progress.server) == 0.0
    visits = setting.cohort_size(setting.clients) * setting.rounds
    assert spent(run)[1] == spent(fedavg)[1] and spent(run)[0] == spent(fedavg)[0] + visits * math.ceil(n / 8)
    module().planned.cache_clear()


@pytest.mark.equivalence
def test_with_one_candidate_and_no_moves_it_is_sgd_on_masked_weights() -> None:
    run = start(candidates=1, adjust=0.0, setting=replace(HOSTILE, clip=None))
    server, data = run.progress.server, data_of(run, 0)
    hidden, head = server["body"]["hidden"], server["head"]
    mask = server["mask"].reshape(hidden["weight"].shape)
    largest = hidden["weight"].abs().flatten().sort(descending=True).values[int(mask.sum()) - 1]
    assert torch.equal(mask, hidden["weight"].abs() >= largest) and int(mask.sum()) == 416 - 64
    leaves = (hidden["weight"] * mask, hidden["bias"], head["weight"], head["bias"])
    w = [torch.nn.Parameter(leaf.clone()) for leaf in leaves]
    optimiser = torch.optim.SGD(w, run.setting.lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    for batch in data.batches(run.setting.epochs):
        optimiser.zero_grad()
        z = F.relu(F.linear(batch.x.flatten(1), w[0] * mask, w[1]))
        F.cross_entropy(F.linear(z, w[2], w[3]), batch.y).backward()
        optimiser.step()
    upload = trip(run)
    expected = (w[0].detach()[mask], *(leaf.detach() for leaf in w[1:]))
    body, head = upload["body"], upload["head"]
    found = (body["kept"], body["hidden"]["bias"], head["weight"], head["bias"])
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < 1e-6
    before = run.progress.server["mask"].clone()
    assert torch.equal(done(run).progress.server["mask"], before)


@pytest.mark.equivalence
@pytest.mark.parametrize("fields", [{"adjust": 0.0}, {"until": 0.0}])
def test_without_moves_masks_stand_still_from_the_choice_on_and_nothing_is_named(fields: dict[str, Any]) -> None:
    run = start(setting=DEEP, candidates=1, every=1, **fields)
    mask = run.progress.server["mask"]
    assert [run.algorithm.exchanges(run.task_at(r)) for r in range(3)] == 3 * [(Exchange(),)]
    assert "growth" not in trip(run) and torch.equal(done(run).progress.server["mask"], mask)
    other = done(start(setting=DEEP, candidates=1, every=1, adjust=0.0))
    assert largest_difference(run.progress.server, other.progress.server) == 0.0


@pytest.mark.equivalence
def test_where_candidates_are_alike_the_choice_says_nothing() -> None:
    """A network with one layer of weights: however many there are, that keeps the same number."""
    runs = [done(start(every=1, candidates=candidates)) for candidates in (1, 4)]
    models = [{key: run.progress.server[key] for key in ("body", "head", "mask")} for run in runs]
    assert largest_difference(models[0], models[1]) == 0.0
    losses = runs[1].progress.server["losses"]
    assert float(losses.std()) == 0.0 < float(losses[0])


# What is pruned -------------------------------------------------------------------------------------------------------


def test_pruned_places_are_zero_in_every_model_and_layers_keep_their_number() -> None:
    run = start(setting=replace(DEEP, rounds=6), every=1, until=1.0, adjust=0.4, density=0.1)
    kept, masks = None, []
    for _ in range(6):
        run.step()
        mask = run.progress.server["mask"]
        generic = run.algorithm.global_model(run.task, run.progress.server)
        personal = method(run).personal_model(run.task, toy.received(run, 0), {}, data_of(run, 0))
        assert generic is not None and largest_difference(generic, personal) == 0.0
        for body in (generic["body"], run.progress.server["body"]):
            assert not row(run, body)[~mask].any()
        kept = kept or by_layer(run, mask)
        assert by_layer(run, mask) == kept and tuple(kept) in plan(run).kept
        masks.append(mask)
    assert sum(not torch.equal(one, other) for one, other in itertools.pairwise(masks)) >= 3
    body = models.build("lenet5", 6, (1, 16, 16)).init(keys.key(0))["body"]
    numbers = sum(leaf.numel() for leaf in tree.flatten(body).values())
    vectors = sum(leaf.numel() for leaf in tree.flatten(body).values() if leaf.ndim == 1)
    assert sum(kept or ()) + vectors == int(0.1 * numbers)


@pytest.mark.parametrize("density", [0.1, 0.02, 0.01, 1e-6])
def test_all_candidates_have_the_density_and_none_a_layer_without_weights(density: float) -> None:
    for name in ("resnet8", "lenet5", "mlp"):
        model = models.build(name, 10, (3, 32, 32), "batch")
        found = module().planned(model, density, 7, "all")
        leaves = tree.flatten(model.init(keys.key(0, "meta"))["body"])
        numbers = sum(leaf.numel() for path, leaf in leaves.items() if not tree.is_statistic(path))
        wanted = int(density * numbers + 1e-6) - (numbers - found.weights.total)
        assert {sum(kept) for kept in found.kept} == {max(wanted, len(found.weights.paths))}
        assert min(map(min, found.kept)) >= 1 and len({*found.kept}) == (7 if name != "mlp" and density > 0.01 else
                                                                        len({*found.kept}))  # fmt: skip
    assert module().powers(5) == [1.0, 0.0, 2.0, 0.5, 1.5] and module().powers(1) == [1.0]
    assert module().powers(9)[5:] == [0.25, 0.75, 1.25, 1.75]


# When and where the mask moves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adjust", "golden"), [(0.2, [200, 195, 100, 4, 0]), (0.4, [400, 390, 200, 9, 0])], ids=["library", "FedRTS"]
)
def test_the_schedule_is_the_published_one(adjust: float, golden: list[int]) -> None:
    mask = torch.arange(20_000) < 1000
    shares = [module().moving(adjust, t, 100.0) for t in (0, 10, 50, 90, 100)]
    assert [int(module().moves(mask, share)) for share in shares] == golden
    assert module().moving(adjust, 0, 0.0) == 0 == module().moving(adjust, 101, 100.0)
    assert int(module().moves(torch.arange(1010) < 1000, 200_000)) == 10  # no more than are pruned


def test_it_moves_every_so_many_rounds_until_its_end() -> None:
    run = start(setting=replace(HOSTILE, rounds=20), every=3, until=0.5, candidates=1)
    rounds = [r for r in range(20) if method(run).grown(run.task_at(r))]
    assert rounds == [0, 3, 6, 9]
    assert [method(run).share(run.task_at(r)) for r in (0, 1, 3, 9, 12)] == [200_000, 0, 158_779, 4_894, 0]


TURNS = {
    "all": ((7, 6, 5, 4, 3, 2, 1, 0),),
    "quarter": ((7, 6), (5, 4), (3, 2), (1, 0)),
    "layer": tuple((k,) for k in range(7, -1, -1)),
}


@pytest.mark.parametrize("granularity", TURNS)
def test_layers_take_turns_from_the_output_down(granularity: str) -> None:
    weights = sparse.Weights(tuple(map(str, range(8))), ((2, 2),) * 8)
    model = models.build("mlp", 2, (1, 8, 8))
    assert module().turns(model, weights, granularity) == TURNS[granularity]
    three = sparse.Weights(tuple(map(str, range(3))), ((2, 2),) * 3)
    assert module().turns(model, three, "quarter") == ((2,), (1,), (0,))
    assert module().turns(model, sparse.Weights((), ()), "quarter") == ()


def test_blocks_of_a_network_take_turns_too() -> None:
    run = start(setting=NORMED, granularity="block")
    names = [
        {run.task.model.name and plan(run).weights.paths[k].split("/")[0] for k in turn} for turn in plan(run).turns
    ]
    assert names == [{"stage3_1"}, {"stage2_1"}, {"stage1_1"}, {"stem"}]


def test_only_layers_whose_turn_it_is_move_and_the_first_comes_again() -> None:
    run = start(setting=replace(DEEP, rounds=6), every=1, until=1.0, candidates=1, adjust=0.5)
    turns = plan(run).turns
    assert turns == ((3,), (2,), (1,), (0,))
    for r in range(6):
        before = run.progress.server["mask"]
        assert method(run).turn(run.task_at(r)) == turns[r % 4]
        run.step()
        parts = zip(
            *(mask.split(plan(run).weights.sizes) for mask in (before, run.progress.server["mask"])), strict=True
        )
        assert [k for k, (one, other) in enumerate(parts) if not torch.equal(one, other)] in ([turns[r % 4][0]], [])
        if r < 2:
            assert not torch.equal(before, run.progress.server["mask"])


@pytest.mark.parametrize("growth", ["batch", "all"])
def test_what_grows_has_the_largest_mean_gradient_and_what_goes_the_smallest_weight(growth: str) -> None:
    """By hand, with torch's gradients of each client's model after its training."""
    run = start(candidates=1, adjust=0.3, growth=growth, setting=replace(HOSTILE, participation=1.0, rounds=2))
    old = run.progress.server["mask"].clone()
    cohort, total, k = range(8), torch.zeros(4096), int(0.3 * 352)
    uploads = [trip(run, client) for client in cohort]
    sizes = [len(run.population.index[client]) for client in cohort]
    for upload, size, client in zip(uploads, sizes, cohort, strict=True):
        named = upload["growth"]
        assert named["place"].dtype == torch.int32 and named["place"].shape == named["gradient"].shape == (k,)
        if not size:
            assert not named["gradient"].any()
            continue
        body = plan(run).weights.unpack(upload["body"], old, plan(run).body)
        w = body["hidden"]["weight"].clone().requires_grad_()
        data = data_of(run, client)
        batches = list(data.batches(1, "growth"))

        def lost(x: Tensor, y: Tensor, w: Tensor = w, body: Tree = body, head: Tree = upload["head"]) -> Tensor:
            z = F.relu(F.linear(x.flatten(1), w, body["hidden"]["bias"]))
            return F.cross_entropy(F.linear(z, head["weight"], head["bias"]), y, reduction="sum")

        if growth == "all":
            value = sum((lost(batch.x, batch.y) for batch in batches), torch.zeros(())) / size
        else:
            value = lost(batches[0].x, batches[0].y) / len(batches[0].y)
        (slope,) = torch.autograd.grad(value, w)
        pruned = slope.flatten() * ~old
        assert {*named["place"].tolist()} == {*pruned.abs().argsort(descending=True)[:k].tolist()}
        torch.testing.assert_close(named["gradient"], pruned[named["place"].long()], atol=1e-6, rtol=1e-4)
        total[named["place"].long()] += size * named["gradient"]
    run.exchange(run.task_at(0), run.algorithm.exchanges(run.task_at(0))[0])
    mean = sum(n * upload["body"]["kept"] for n, upload in zip(sizes, uploads, strict=True)) / sum(sizes)
    weights = sparse.unpacked(torch.as_tensor(mean), old)
    smallest = torch.where(old, weights.abs(), math.inf).argsort()[:k]
    come = total.abs().argsort(descending=True)[:k]
    new = run.progress.server["mask"]
    assert {*torch.nonzero(new & ~old).flatten().tolist()} == {*come.tolist()}
    assert {*torch.nonzero(old & ~new).flatten().tolist()} == {*smallest.tolist()}
    sent = toy.received(run, 0, 1)
    unpacked = sparse.unpacked(sent["body"]["kept"], sparse.mask_of(sent["mask"], 4096))
    assert not unpacked[new & ~old].any()
    torch.testing.assert_close(unpacked[new & old], weights[new & old])


def test_places_that_are_left_over_say_nothing() -> None:
    """Of candidates, the widest of a turn decides how many places are named; a narrower one fills fewer."""
    run = start(setting=DEEP, every=1)
    upload, task = trip(run), run.task_at(0)
    kept = [int(0.2 * by_layer(run, run.progress.server["mask"])[k]) for k in method(run).turn(task)]
    named = upload["growth"]
    assert len(named["place"]) == method(run).grown(task) > sum(kept)
    assert not named["gradient"][sum(kept) :].any() and named["gradient"][: sum(kept)].any()


def test_an_informative_input_that_was_pruned_comes_back() -> None:
    """The toy's brightest differences lie at some pixels: with those pruned, gradients name them."""
    run = start(candidates=1, adjust=0.5, setting=replace(HOSTILE, participation=1.0, weight_decay=0.0))
    pictures = run.population.images
    means = torch.stack([pictures.plain(torch.nonzero(pictures.y == c).flatten()).flatten(1).mean(0) for c in range(6)])
    telling, dull = (means.std(0).argsort(descending=way)[:32] for way in (True, False))
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:11, dull] = True
    run.progress.server["mask"] = mask.flatten()
    assert int(mask.sum()) == plan(run).count
    run.exchange(run.task_at(0), run.algorithm.exchanges(run.task_at(0))[-1])
    grown = run.progress.server["mask"].reshape(64, 64) & ~mask
    of_telling, chance = int(grown[:, telling].sum()) / int(grown.sum()), 32 * 64 / (4096 - 352)
    assert of_telling > chance + 0.15


# Candidates -----------------------------------------------------------------------------------------------------------


def starved(shapes: Any, total: int, power: float) -> tuple[int, ...]:
    """The first candidate has next to nothing in the last layer of the body."""
    last = 1 if power == 1 else total // 2
    rest = sparse.counts(shapes[:-1], total - last, 1.0)
    return *rest, last


@cache
def knowing() -> Tree:
    """A network that federated averaging has trained."""
    return done(start(setting=replace(DEEP, rounds=30, lr=0.05), name="fedavg")).progress.server


@pytest.mark.parametrize("candidates", [1, 2])
def test_a_candidate_that_cuts_a_network_through_is_never_chosen(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module(), "counts", starved)
    module().planned.cache_clear()
    run = start(setting=replace(DEEP, participation=1.0), candidates=candidates, density=0.5, adjust=0.0)
    trained = knowing()
    run.progress.server = {**run.progress.server, **trained}
    server = run.progress.server = {
        **run.progress.server,
        "mask": plan(run).masks(trained["body"], torch.device("cpu"))[0],
    }
    task = run.task_at(0)
    for exchange in run.algorithm.exchanges(task)[:-1]:
        run.exchange(task, exchange)
    assert by_layer(run, server["mask"])[-1] == 1
    assert (by_layer(run, run.progress.server["mask"])[-1] == 1) == (candidates == 1)
    if candidates > 1:
        losses = run.progress.server["losses"]
        assert losses[1] < losses[0] - 0.1
    module().planned.cache_clear()


def test_losses_are_of_training_images_weighted_by_size() -> None:
    run = start(setting=replace(DEEP, participation=1.0), candidates=3)
    server, task = run.progress.server, run.task_at(0)
    masks = plan(run).masks(server["body"], torch.device("cpu"))
    assert [tuple(by_layer(run, mask)) for mask in masks] == list(plan(run).kept)
    sums = torch.zeros(3)
    for client, size in enumerate(toy.SIZES):
        if size:
            data = data_of(run, client)
            x, y = run.population.images.plain(data.index), data.y
            for c, mask in enumerate(masks):
                body = tree.merge(server["body"], plan(run).weights.leaves(row(run, server["body"]) * mask))
                scores = task.model.logits(server["head"], task.model.features(body, x))
                sums[c] += size * F.cross_entropy(scores, y).detach()
    (judge, _) = run.algorithm.exchanges(task)
    run.exchange(task, judge)
    torch.testing.assert_close(run.progress.server["losses"], sums / sum(toy.SIZES))
    assert torch.equal(run.progress.server["mask"], masks[int(sums.argmin())])
    assert len({*sums.tolist()}) == 3


def test_statistics_are_measured_averaged_and_judged_with() -> None:
    run = start(setting=NORMED, candidates=2)
    server, task = run.progress.server, run.task_at(0)
    measure, judge, _ = run.algorithm.exchanges(task)
    masks = plan(run).masks(server["body"], torch.device("cpu"))
    expected = []
    for mask in masks:
        stem = plan(run).weights.leaves(row(run, server["body"]) * mask)["stem"]["conv"]["weight"]
        seen = [
            F.conv2d(run.population.images.plain(data_of(run, client).index), stem, padding=stem.shape[-1] // 2)
            for client in (0, 1)
        ]
        means, variances = [x.mean((0, 2, 3)) for x in seen], [x.var((0, 2, 3)) for x in seen]
        expected.append([(9 * a + 5 * b) / 14 for a, b in (means, variances)])
    run.exchange(task, measure)
    found = run.progress.server["statistics"]["stem"]["norm"]["stats"]
    for c in range(2):
        torch.testing.assert_close(found["mean"][c], expected[c][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["var"][c], expected[c][1], atol=1e-5, rtol=1e-4)
    assert largest_difference(run.progress.server["body"], server["body"]) == 0.0
    losses = trip(run, 0, "judge")["losses"]
    for c, mask in enumerate(masks):
        body = tree.merge(server["body"], plan(run).weights.leaves(row(run, server["body"]) * mask))
        body = tree.merge(body, tree.pick(run.progress.server["statistics"], c))
        x, y = run.population.images.plain(data_of(run, 0).index), data_of(run, 0).y
        scores = task.model.logits(server["head"], task.model.features(body, x))
        assert float(losses[c]) == pytest.approx(float(F.cross_entropy(scores, y)), abs=1e-5)
    run.exchange(task, judge)
    best = int(run.progress.server["losses"].argmin())
    chosen = tree.pick(run.progress.server["statistics"], best)
    moved = {path: leaf for path, leaf in tree.flatten(run.progress.server["body"]).items() if tree.is_statistic(path)}
    assert largest_difference(tree.unflatten(moved), chosen) == 0.0


@pytest.mark.parametrize(
    ("change", "trips"),
    [
        ({}, ["measure", "judge", "local_update"]),
        ({"norm": "group"}, ["judge", "local_update"]),
        ({"statistics": "frozen"}, ["judge", "local_update"]),
    ],
)
def test_nothing_is_measured_where_there_is_nothing_to_measure(change: dict[str, Any], trips: list[str]) -> None:
    run = start(setting=replace(NORMED, rounds=2, **change))
    assert [exchange.client for exchange in run.algorithm.exchanges(run.task_at(0))] == trips
    assert [exchange.client for exchange in run.algorithm.exchanges(run.task_at(1))] == ["local_update"]
    assert bool(run.progress.server["statistics"]) == (len(trips) == 3)
    one = start(setting=replace(NORMED, **change), candidates=1)
    assert len(one.algorithm.exchanges(one.task_at(0))) == 1


# What travels ---------------------------------------------------------------------------------------------------------


def test_bytes_are_values_and_bits() -> None:
    """4 bytes a value, a bit a place on the way down, and 8 bytes for each place that is named."""
    run = start(setting=replace(DEEP, rounds=3, participation=1.0), every=2, candidates=3)
    layers, n = plan(run).weights, plan(run).weights.total
    dense = tree.nbytes(run.progress.server["head"]) + sum(
        leaf.numel() * 4 for leaf in tree.flatten(run.progress.server["body"]).values() if leaf.ndim == 1
    )
    k, bits, widest = plan(run).count, math.ceil(n / 8), sum(map(max, zip(*plan(run).kept, strict=True)))
    assert len(layers.paths) == 4 and k < widest < 3 * k
    named = [method(run).grown(run.task_at(r)) for r in range(3)]
    assert named[0] > 0 == named[1]
    found, before = [], (0.0, 0.0)
    for _ in range(3):
        run.step()
        found.append(tuple(int(b - a) for a, b in zip(before, spent(run), strict=True)))
        before = spent(run)
    judged = (8 * (4 * widest + dense + bits), 8 * 4 * 3)
    usual = (8 * (4 * k + dense + bits), 8 * (4 * k + dense))
    assert found[0] == (judged[0] + usual[0], judged[1] + usual[1] + 8 * 8 * named[0])
    assert found[1] == usual


@pytest.mark.parametrize(("density", "up", "down"), [(0.1, 0.11, 0.15), (0.02, 0.03, 0.06), (0.01, 0.02, 0.05)])
def test_a_residual_network_takes_a_tenth_of_fedavgs_bytes(density: float, up: float, down: float) -> None:
    run = start(setting=replace(NORMED, norm="group"), density=density)
    sent, whole = toy.received(run, 0, 1), tree.nbytes(run.task.init())
    assert tree.nbytes(sent) < down * whole
    assert tree.nbytes({"body": sent["body"], "head": sent["head"]}) < up * whole
    assert len(sent["mask"]) == math.ceil(plan(run).weights.total / 8)  # whatever the density


def test_what_a_client_has_is_made_of_what_travels_alone() -> None:
    """A client of another process: the bytes of the payload, and the network's shapes."""
    run = start(setting=DEEP)
    run.step()
    sent = toy.received(run, 0, 1)
    arrived = tree.unflatten(
        {path: torch.frombuffer(bytearray(leaf.numpy().tobytes()), dtype=leaf.dtype).reshape(leaf.shape)
         for path, leaf in tree.flatten(sent).items()}
    )  # fmt: skip
    assert sum(len(leaf.numpy().tobytes()) for leaf in tree.flatten(sent).values()) == tree.nbytes(sent)
    model, mask = method(run).unpacked(run.task_at(1), arrived)
    generic = run.algorithm.global_model(run.task, run.progress.server)
    assert generic is not None and largest_difference(model, generic) == 0.0
    assert torch.equal(mask, run.progress.server["mask"])


def test_a_board_knows_what_is_sent_from_shapes_alone() -> None:
    from bench.validation.expected import _count

    run = start(setting=DEEP)
    found = {}
    for device in ("meta", "cpu"):
        shapes = _count(run.algorithm, run.task.model, run.setting, 6, 8, device)
        found[device] = [each.changing for each in shapes.trips]
        assert not shapes.packed
    run = done(run)
    assert 6 * sum(found["meta"]) == spent(run)[0] and found["meta"] == found["cpu"]


# What it costs, and with what it goes ---------------------------------------------------------------------------------


def test_it_learns_nearly_as_much_with_a_tenth() -> None:
    setting = replace(toy.SETTING, rounds=12, eval_every=12)
    assert measured(toy.finish(start(setting=setting, every=2)), "generic") > 0.85


@pytest.mark.parametrize("part", ["topk", "sign"])
def test_channels_that_remember_are_refused(part: str) -> None:
    with pytest.raises(BadConfig, match=rf"^fedtiny\+{part}: {part} is of the kind channel, which makes no sense here: "
                       r"what a client has not sent waits by its place, and the mask moves places$"):  # fmt: skip
        parse_algorithms(f"fedtiny+{part}")


@cache
def with_part(part: str) -> Run:
    (algorithm,) = parse_algorithms(f"fedtiny(every=1){part}")
    setting = replace(DEEP, rounds=2, eval_every=2)
    return toy.finish(toy.run(algorithm, setting=setting, dataset=LARGE))


@pytest.mark.parametrize("part", ["qsgd", "krum", "median", "focal", "tau_norm"])
def test_parts_that_remember_nothing_act_on_what_is_kept(part: str) -> None:
    one, other = with_part(f"+{part}"), with_part("")
    body = tree.flatten(one.progress.server["body"])
    assert largest_difference(tree.unflatten(body), other.progress.server["body"]) > (
        1e-5 if part != "tau_norm" else -1
    )
    assert one.outcome().metrics != other.outcome().metrics or part != "tau_norm"
    mask = one.progress.server["mask"]
    assert not plan(other).weights.row(one.progress.server["body"], mask.device)[~mask].any()


def test_noise_hides_a_model_whose_mask_stands_still_and_no_other() -> None:
    moving, choosing, still = parse_algorithms(
        "fedtiny(candidates=1)+dp, fedtiny(adjust=0)+dp, fedtiny(candidates=1, adjust=0)+dp"
    )
    hides = "noise hides one update of body and head a round"
    with pytest.raises(BadConfig, match=f"{hides}, and growth/place would be sent in the clear"):
        done(toy.run(moving, setting=HOSTILE))
    with pytest.raises(BadConfig, match=f"{hides}, and losses would be sent in the clear"):
        done(toy.run(choosing, setting=HOSTILE))
    run = done(toy.run(still, setting=HOSTILE))
    mask = run.progress.server["mask"]
    assert not run.progress.server["body"]["hidden"]["weight"].flatten()[~mask].any()
