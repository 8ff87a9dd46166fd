"""DAFOS-Net: who plays whom in an episode, what it costs and pulls at, what its network sees, and where it is FedBN."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, tree
from bench.contract import toy
from bench.models import is_norm
from bench.models.layers import linear
from bench.plugins.registry import ALGORITHMS
from bench.splits.split import make_split
from bench.training.job import Job
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, done, method

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, epochs=1, weight_decay=1e-2, momentum=0.9, clip=1.0)
DEEP = replace(SETTING, model="resnet8", norm="batch", batch_size=8, rounds=1)
FEW = (12, 16, 0, 0, 0, 0, 0, 0)
ALONE = (9, 0, 0, 0, 0, 0, 0, 0)


def module() -> Any:
    return importlib.import_module("bench.algorithms.dafos")


def made(**fields: Any) -> Any:
    return ALGORITHMS["dafos"](**fields)


def start(name: str = "dafos", setting: Any = SETTING, engine: str = "serial", sizes: Any = None, **fields: Any) -> Run:
    if setting.model == "resnet8":  # whose steps are dear
        sizes, fields = sizes or FEW, {"episodes": 2, **fields} if name == "dafos" else fields
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes or toy.SIZES)


def batch_of(y: list[int], weight: list[float] | None = None, seed: int = 0) -> Batch:
    labels = torch.tensor(y)
    rows = torch.ones(len(y)) if weight is None else torch.tensor(weight)
    return Batch(keys.normal(keys.key(9), len(y), 1, 8, 8), labels, rows, torch.arange(len(y)), keys.key(seed))


def cast(batch: Batch, shots: int = 4) -> Any:
    return module().Roles.of(batch, 6, shots)


def network(seed: int = 4) -> Tree:
    sizes = ((32, 3), (16, 32), (1, 16))
    return {str(k): linear(keys.fold(keys.key(seed), k), *size) for k, size in enumerate(sizes)}


def asked(run: Run, **fields: Any) -> Any:
    """What a method says of images in an open-set test, of a model with a network."""
    return lambda z, support, labels: made(**fields).open_set(run.task, {"outlier": network()}, z, support, labels)


# Who plays whom -------------------------------------------------------------------------------------------------------

MIXED = [3, 0, 3, 3, 0, 2, 3, 0, 5, 3, 2, 0, 3, 2]
"""Of 3 six images, of 0 four, of 2 three, of 5 one."""


def test_half_of_the_classes_are_known_and_the_first_images_of_each_are_its_shots() -> None:
    seen = set()
    for seed in range(12):
        batch = batch_of(MIXED, seed=seed)
        roles = cast(batch)
        known = roles.known.nonzero().flatten().tolist()
        seen.add(tuple(known))
        assert len(known) == 2 and set(known) <= {0, 2, 3}, "of three with several images, two; 5 has but one"
        for c, (shots, queries) in {3: (4, 2), 0: (3, 1), 2: (2, 1)}.items():
            here = batch.y == c
            if c in known:
                assert roles.shot[here][:, c].tolist() == [1.0] * shots + [0.0] * queries, "in the batch's order"
                assert roles.query[here].tolist() == [0.0] * shots + [1.0] * queries
                assert not roles.strange[here].any()
            else:
                assert roles.strange[here].all() and not roles.query[here].any() and not roles.shot[here].any()
        assert float(roles.shot.sum()) == sum({3: 4, 0: 3, 2: 2}[c] for c in known)
        assert roles.strange[batch.y == 5].tolist() == [1.0] and float(roles.both) == 1.0
        again = cast(batch_of(MIXED, seed=seed))
        assert torch.equal(again.shot, roles.shot) and torch.equal(again.known, roles.known)
    assert len(seen) == 3, "drawn anew for each batch"


def test_shots_are_as_many_as_is_said_at_most() -> None:
    batch = batch_of([1] * 7 + [4] * 7)
    for shots, expected in ((1, 1), (4, 4), (6, 6), (9, 6)):
        roles = cast(batch, shots)
        assert int(roles.known.sum()) == 1 and float(roles.shot.sum()) == expected
        assert float(roles.query.sum()) == 7 - expected and float(roles.strange.sum()) == 7


def test_padding_plays_nobody() -> None:
    batch = batch_of([*MIXED, 5, 5, 1, 1], [1.0] * len(MIXED) + [0.0] * 4)
    roles, expected = cast(batch), cast(batch_of(MIXED))
    for name in ("shot", "query", "strange"):
        found = getattr(roles, name)
        assert torch.equal(found[: len(MIXED)], getattr(expected, name)) and not found[len(MIXED) :].any(), name
    assert torch.equal(roles.known, expected.known)


@pytest.mark.parametrize("y", [[2] * 9, [0, 1, 2, 3], [4], []])
def test_without_two_classes_one_of_several_images_nothing_is_played(y: list[int]) -> None:
    batch = batch_of(y) if y else replace(batch_of([1]), weight=torch.zeros(1))
    assert float(cast(batch).both) == 0.0


def test_a_client_of_one_class_trains_as_in_fedbn_and_its_momentum_and_statistics_move_by_no_episode() -> None:
    runs = [start(name, DEEP, sizes=ALONE) for name in ("dafos", "fedbn")]
    for run in runs:
        run.population.images.y[:] = 2
        done(run)
    found, expected = (run.progress.server for run in runs)
    assert largest_difference({key: found[key] for key in expected}, expected) == 0.0
    assert largest_difference(runs[0].store[0], runs[1].store[0]) == 0.0
    assert largest_difference(found["outlier"], start(setting=DEEP).progress.server["outlier"]) == 0.0


# What an episode pulls at ---------------------------------------------------------------------------------------------


def by_hand(z: Tensor, y: Tensor, roles: Any, layers: Tree, outlier: float, triplet: float) -> Tensor:
    """The loss of an episode, image by image."""
    known = roles.known.nonzero().flatten().tolist()
    means = {c: z[roles.shot[:, c] > 0].mean(0) for c in known}
    far = {c: {i: (z[i] - means[c]).square().mean() for i in range(len(z))} for c in known}
    queries, strangers = (each.nonzero().flatten().tolist() for each in (roles.query, roles.strange))
    classes, told, triples = [], [], []
    for i in queries + strangers:
        roots = torch.stack([far[c][i] + 1e-6 for c in known]).sqrt().sort().values
        roots = torch.cat([roots, roots[-1:].repeat(3)])[:3]
        x = torch.stack([roots[0], roots[1] - roots[0], roots[2] - roots[1]])
        for k, layer in enumerate(layers.values()):
            x = F.linear(x if k == 0 else x.relu(), layer["weight"], layer["bias"])
        x = x + roots[0]
        truth = torch.tensor([0.0 if i in queries else 1.0])
        told.append(F.binary_cross_entropy_with_logits(x, truth) / (2 * len(queries if i in queries else strangers)))
    for i in queries:
        logits = -torch.stack([far[c][i] for c in known])
        classes.append(F.cross_entropy(logits, torch.tensor(known.index(int(y[i])))))
        nearest = torch.stack([far[int(y[i])][j] for j in strangers]).min()
        triples.append((0.5 + far[int(y[i])][i] - nearest).clamp(min=0))
    return torch.stack(classes).mean() + outlier * torch.stack(told).sum() + triplet * torch.stack(triples).mean()


@pytest.mark.parametrize(("outlier", "triplet"), [(0.3, 0.1), (2.0, 0.0), (0.0, 0.7)])
@pytest.mark.parametrize("y", [MIXED, [1, 4] * 5, [*range(6)] * 3], ids=["two known", "one known", "three known"])
def test_a_loss_is_of_classes_of_what_is_unknown_and_of_triples(y: list[int], outlier: float, triplet: float) -> None:
    batch, layers = batch_of(y), network()
    roles = cast(batch)
    z = keys.normal(keys.key(5), len(y), 7).requires_grad_()
    other = z.detach().clone().requires_grad_()
    found = made(outlier=outlier, triplet=triplet).played(layers, z, batch, roles)
    expected = by_hand(other, batch.y, roles, layers, outlier, triplet)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    found.backward()
    expected.backward()
    assert z.grad is not None and other.grad is not None
    assert torch.allclose(z.grad, other.grad, atol=2e-5, rtol=1e-3)
    shots = roles.shot.sum(1) > 0
    assert float(z.grad[shots].abs().max()) > 1e-4, "through prototypes too"


def test_who_cannot_tell_pays_log_two_and_no_network_pays_less_where_both_look_alike() -> None:
    batch = batch_of([1, 4] * 6)
    roles = cast(batch, 3)
    alike = torch.ones(12, 5)
    for seed in range(5):
        method = made(outlier=1.0, triplet=0.0)
        assert float(method.played(network(seed), alike, batch, roles)) >= math.log(2) - 1e-6
    drawn = start().progress.server["outlier"]
    assert float(made(outlier=1.0, triplet=0.0).played(drawn, alike, batch, roles)) == pytest.approx(math.log(2), 1e-3)


def test_a_network_learns_to_tell_images_that_lie_far_from_all_prototypes() -> None:
    batch, layers = batch_of([1, 4] * 12), network()
    roles = cast(batch, 6)
    z = keys.normal(keys.key(6), 24, 5) + 3 * roles.strange[:, None]
    w = tree.map(lambda leaf: leaf.clone().requires_grad_(), layers)
    optimiser = torch.optim.SGD(list(tree.flatten(w).values()), 0.5, momentum=0.9)
    for _ in range(50):
        optimiser.zero_grad()
        value = made(outlier=1.0, triplet=0.0).played(w, z, batch, roles)
        value.backward()
        optimiser.step()
    assert float(value.detach()) < 0.1


@pytest.mark.parametrize("setting", [SETTING, DEEP], ids=["mlp", "resnet8, batch norm"])
def test_episodes_move_body_and_network_and_leave_the_head(setting: Any) -> None:
    runs = {name: start(name, setting) for name in ("dafos", "fedbn")}
    (found, mine), (expected, theirs) = (toy.upload_once(run, 1) for run in runs.values())
    assert largest_difference(found["head"], expected["head"]) == 0.0
    for path, leaf in tree.flatten(found["body"]).items():
        assert not torch.equal(leaf, tree.flatten(expected["body"])[path]), path
    assert largest_difference(found["outlier"], runs["dafos"].progress.server["outlier"]) > 1e-4
    own = tree.flatten(theirs)
    assert set(tree.flatten(mine)) == set(own) and all(map(is_norm, own))
    assert all(not torch.equal(leaf, own[path]) for path, leaf in tree.flatten(mine).items())


def test_an_episode_is_a_batch_and_each_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, batch = toy.SIZES, SETTING.batch_size
    for episodes in (0, 1, 7):
        run = done(start(episodes=episodes, setting=replace(SETTING, rounds=1)))
        assert run.progress.cost["train_samples"] == sum(sizes) + episodes * sum(min(size, batch) for size in sizes)
    drawn, cast_as_usual = [], module().Roles.of

    def watched(batch: Batch, *others: int) -> Any:
        drawn.append((tuple(batch.example.tolist()), int(batch.key)))
        return cast_as_usual(batch, *others)

    monkeypatch.setattr(module().Roles, "of", watched)
    toy.upload_once(start(), 0)
    rows, draws = (set(each) for each in zip(*drawn, strict=True))
    assert len(drawn) == len(rows) == len(draws) == 10 and {len(each) for each in rows} == {batch}


# What a network sees --------------------------------------------------------------------------------------------------


def seen(apart: list[list[float]], known: list[bool]) -> list[list[float]]:
    """The three inputs of the network, found by one that hands them on."""
    rows = []
    for k in range(3):
        weight = torch.zeros(1, 3)
        weight[0, k] = 1.0
        layers = {"0": {"weight": weight, "bias": torch.zeros(1)}}
        none = tree.map(lambda leaf: 0 * leaf, layers)
        each, least = (module().surprise(w, torch.tensor(apart), torch.tensor(known)) for w in (layers, none))
        rows.append((each - least).tolist())
    return [list(each) for each in zip(*rows, strict=True)]


def test_it_sees_the_three_smallest_distances_by_what_they_are_more() -> None:
    (found,) = seen([[25.0, 1.0, 100.0, 9.0, 0.25]], [True] * 5)
    assert found == pytest.approx([0.5, 0.5, 2.0], abs=1e-5)
    (found,) = seen([[25.0, 1.0, 100.0, 9.0, 0.25]], [True, False, True, False, False])
    assert found == pytest.approx([5.0, 5.0, 0.0], abs=1e-5), "the last stands for what is not there"
    (found,) = seen([[4.0, 16.0]], [True, False])
    assert found == pytest.approx([2.0, 0.0, 0.0], abs=1e-5)


def test_distances_are_means_of_squares() -> None:
    z, means = keys.normal(keys.key(1), 5, 8), keys.normal(keys.key(2), 3, 8)
    expected = torch.stack([(z - mean).square().mean(1) for mean in means], 1)
    torch.testing.assert_close(module().distances(z, means), expected)
    assert float(module().distances(z, z).diagonal().min()) >= 0.0


# The open-set test ----------------------------------------------------------------------------------------------------


def test_names_of_classes_and_the_order_of_shots_do_not_matter() -> None:
    run = start()
    judge, ways, shots = asked(run), 5, 3
    z, support = keys.normal(keys.key(1), 40, 16), keys.normal(keys.key(2), ways * shots, 16)
    labels = torch.arange(ways * shots) % ways
    taken, sure = judge(z, support, labels)
    assert len(taken.unique()) == ways and float(sure.std()) > 0
    renamed = torch.tensor([3, 0, 4, 1, 2])
    order = keys.permutation(keys.key(3), ways * shots)
    for classes, rows in ((renamed, torch.arange(15)), (torch.arange(ways), order), (renamed, order)):
        other, alike = judge(z, support[rows], classes[labels][rows])
        assert torch.equal(other, classes[taken])
        torch.testing.assert_close(alike, sure, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ways", [1, 2, 3, 9])
def test_the_nearest_prototype_decides_the_class_and_the_network_how_surely(ways: int) -> None:
    run, layers = start(), network()
    z, support = keys.normal(keys.key(1), 10, 16), keys.normal(keys.key(2), 2 * ways, 16)
    labels = torch.arange(2 * ways) % ways
    taken, sure = asked(run)(z, support, labels)
    means = torch.stack([support[labels == c].mean(0) for c in range(ways)])
    apart = torch.stack([(z - mean).square().mean(1) for mean in means], 1)
    assert torch.equal(taken, apart.argmin(1))
    expected = module().surprise(layers, apart, torch.ones(ways, dtype=torch.bool))
    torch.testing.assert_close(sure, -expected, atol=1e-5, rtol=1e-4)


def test_at_first_an_image_is_as_surely_known_as_it_is_near() -> None:
    run = start()
    z, support, labels = keys.normal(keys.key(1), 30, 16), keys.normal(keys.key(2), 8, 16), torch.arange(8) % 4
    found = made().open_set(run.task, run.progress.server, z, support, labels)
    expected = ALGORITHMS["fedbn"]().open_set(run.task, {}, z, support, labels)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1] / 4, atol=1e-5, rtol=1e-4)  # a mean of 16 squares


@pytest.mark.parametrize("fields", [{"episodes": 0}, {"outlier": 0.0}])
def test_with_a_network_that_nothing_trains_the_nearest_distance_decides(fields: dict[str, Any]) -> None:
    run = start()
    z, support, labels = keys.normal(keys.key(1), 9, 4), keys.normal(keys.key(2), 6, 4), torch.arange(6) % 2
    found = asked(run, **fields)(z, support, labels)
    expected = ALGORITHMS["fedbn"]().open_set(run.task, {}, z, support, labels)
    assert all(map(torch.equal, found, expected))


@cache
def outcome_of(name: str, **fields: Any) -> Any:
    dataset = toy.Toy()
    setting = replace(toy.SETTING, rounds=2, unseen=3, open_classes=2, shots=2, eval_every=2)
    splits = dataset.load()
    job = Job(
        ALGORITHMS[name](**fields), dataset, splits, make_split(splits.labels, 6, setting, 0), setting, 0, "serial"
    )
    return toy.finish(Run(job, None)).outcome()


@pytest.mark.equivalence
def test_without_episodes_clients_held_out_are_told_as_in_fedbn() -> None:
    found, expected = outcome_of("dafos", episodes=0), outcome_of("fedbn")
    assert len(found.open_set) == 3 and found.open_set == expected.open_set
    assert outcome_of("dafos").open_set != expected.open_set


def test_a_client_held_out_trains_norm_layers_as_in_fedbn_and_has_the_servers_network_beside() -> None:
    run, fedbn = (start(name, DEEP, sizes=(0, 3, 0, 0, 0, 0, 0, 0)) for name in ("dafos", "fedbn"))
    server, task = run.progress.server, run.task_at(0)
    mine = method(run).newcomer(task, server, data_of(run, 1))
    assert largest_difference(mine, method(fedbn).newcomer(task, fedbn.progress.server, data_of(fedbn, 1))) == 0.0
    assert largest_difference(mine, run.store.initial) > 1e-2
    model = method(run).personal_model(task, server, mine, data_of(run, 1))
    assert largest_difference(model, tree.merge(server, mine)) == 0.0 and model.keys() == {"body", "head", "outlier"}


# Where it is another method -------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_episodes_it_is_fedavg_on_a_network_without_norm_layers(engine: str) -> None:
    dafos, fedavg = (
        toy.finish(start(name, replace(SETTING, rounds=3, unseen=1), engine, **fields))
        for name, fields in (("dafos", {"episodes": 0}), ("fedavg", {}))
    )
    found, expected = dafos.progress.server, fedavg.progress.server
    assert largest_difference({key: found[key] for key in expected}, expected) == 0.0
    mine, theirs = dafos.outcome().metrics, fedavg.outcome().metrics
    assert all(mine[metric] == theirs[metric] for metric in ("personal", "personal.masked", "unseen"))
    assert mine["generic"] is None


@pytest.mark.equivalence
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_without_episodes_it_is_fedbn(norm: str) -> None:
    setting = replace(DEEP, norm=norm)
    none, fedbn = done(start(setting=setting, episodes=0)), done(start("fedbn", setting))
    found, expected = none.progress.server, fedbn.progress.server
    assert largest_difference({key: found[key] for key in expected}, expected) == 0.0
    assert all(largest_difference(none.store[k], fedbn.store[k]) == 0.0 for k in (0, 1))
    assert largest_difference(found["outlier"], start(setting=setting).progress.server["outlier"]) == 0.0


def test_engines_agree_with_batch_norm_and_clients_that_play_nothing() -> None:
    setting = replace(DEEP, momentum=0.5)
    sizes = (12, 16, 1, 0, 0, 0, 0, 0)
    one, other = (done(start(setting=setting, engine=each, sizes=sizes)) for each in ("serial", "stacked"))
    assert largest_difference(toy.states(one), toy.states(other)) < 2e-4
