"""Streams of batches, views, and parts of a client's data: the same padded and unpadded, one by one and stacked."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, keys, losses, tree
from bench.contract import checks, toy
from bench.data import AUGMENTATIONS, Images
from bench.training import engine as engines
from bench.training.parcel import pack, unpack

SIZE, CLASSES, PADDING = 4, 5, 7
SIZES = (0, 1, 3, 4, 5, 12, 13)
"""None, one, a batch and one more or less; as many as classes; a multiple of a batch and one more."""


def client(n: int, padding: int = 0, augment: str = "crop_flip", key: int = 3, own: int = 8) -> LocalData:
    """A client of n examples of five classes, the first of which is as large as the others together."""
    total = 40
    x = keys.integers(keys.key(1), 256, total, 2, 6, 6).to(torch.uint8)
    y = (torch.arange(total) % 10).clamp(max=CLASSES - 1)
    images = Images(x, y, (0.5, 0.4), (0.2, 0.3), augment)
    rows = keys.permutation(keys.key(own), total)[:n]
    return LocalData(
        images=images,
        index=torch.cat([rows, rows.new_zeros(padding)]),
        n=torch.tensor(n),
        key=keys.key(key),
        class_counts=torch.bincount(y[rows], minlength=CLASSES),
        batch_size=SIZE,
        client_key=keys.key(own),
        padded=padding > 0,
    )


def passes(n: int) -> int:
    """Batches of an epoch."""
    return -(-n // SIZE)


def real(batches: Any, views: int = 1) -> list[dict[str, Tensor]]:
    """All there is in batches without their padding; batches of padding only are left out."""
    found = []
    for batch in batches:
        kept = batch.weight == 1
        if kept.any():
            parts = {"x": batch.x, "y": batch.y, "example": batch.example, "keys": batch.keys}
            found.append({name: part[kept] for name, part in parts.items()})
    return found


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a
    )


# Several batches made together ----------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"views": 2}, {"weighted": True}, {"batch_size": 8}], ids=str)
def test_batches_that_are_made_together_are_those_made_one_by_one(
    options: dict[str, Any], augment: str, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = client(13, padding, augment)
    weights = torch.arange(13.0 + padding) if options.pop("weighted", False) else None
    found = []
    for at_once in (0, 2 * SIZE * 72, 2**18):
        monkeypatch.setattr("bench.data.images._AT_ONCE", at_once)
        found.append(list(data.batches(2, weights=weights, **options)))
    for batches in found[1:]:
        assert equal(real(batches), real(found[0])) and len(batches) == len(found[0])
        assert [int(each.first) for each in batches] == [int(each.first) for each in found[0]]


@pytest.mark.parametrize("padding", [0, PADDING])
def test_a_stacked_client_has_each_batch_in_one_piece(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = Images.augmented

    def noted(self: Images, index: Tensor, *given: Any) -> Tensor:
        made.append(len(index))
        return plain(self, index, *given)

    monkeypatch.setattr(Images, "augmented", noted)
    batches = list(client(12, padding).batches(1))
    assert made == ([len(batch.y) for batch in batches] if padding else [12])
    assert all(batch.x.permute(0, 2, 3, 1).is_contiguous() for batch in batches)


def test_only_so_many_are_made_together_as_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    images = client(13).images
    monkeypatch.setattr("bench.data.images._AT_ONCE", 72 * 4 * 5 + 1)
    assert [images.batches_at_once(size) for size in (4, 20, 40)] == [5, 1, 1]
    assert images.batches_at_once(5) == 1  # 360 numbers: the next batch would begin between two vectors
    assert client(13, augment="batch_crop_flip").images.batches_at_once(4) == 1


def test_a_stream_that_is_left_counts_the_batches_that_were_taken() -> None:
    data = client(13, augment="none")
    assert len(list(itertools.islice(data.batches(1), 2))) == 2 and data.samples() == 2 * SIZE


# So many steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("n", SIZES)
def test_steps_are_the_first_batches_of_endless_epochs(n: int, augment: str, padding: int) -> None:
    epochs = real(client(n, augment=augment).batches(3, "a"))
    for steps in (1, 2, 3 * passes(n)):
        data = client(n, padding, augment)
        batches = list(data.batches(steps=steps, salt="a"))
        assert len(batches) == (steps if len(data.index) else 0)
        assert equal(real(batches), epochs[:steps])
        assert float(data.samples()) == sum(len(batch["y"]) for batch in epochs[:steps])


@pytest.mark.parametrize("n", SIZES[1:])
def test_steps_of_whole_epochs_are_epochs_to_the_bit(n: int) -> None:
    for batch, other in zip(client(n).batches(2), client(n).batches(steps=2 * passes(n)), strict=True):
        for name in ("x", "y", "weight", "example", "keys"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_a_client_without_examples_has_no_step_or_padding_only() -> None:
    assert list(client(0).batches(steps=3)) == []
    padded = list(client(0, PADDING).batches(steps=3, views=2, weights=torch.zeros(PADDING)))
    assert len(padded) == 3 and not any(batch.weight.any() for batch in padded)
    assert all(len(batch.x) == 2 * SIZE for batch in padded)


def test_a_stream_that_is_cut_short_is_counted_by_batches() -> None:
    for padding in (0, PADDING):
        data = client(13, padding)
        list(itertools.islice(data.batches(3), 6))  # an epoch of 4, 4, 4, 1 (and padding), and more
        list(itertools.islice(data.plain_batches(size=5), 2))
        list(data.batches(1))
        assert float(client(13, padding).samples()) == 0
        some = client(13, padding)
        list(itertools.islice(some.batches(steps=9), 3))
        assert float(some.samples()) == 12
        assert float(data.samples()) == pytest.approx((13 + 2 * 4 if not padding else 13 + 4) + 10 / 3 + 13)


def test_a_batch_size_of_ones_own() -> None:
    sizes = [len(batch.y) for batch in client(13).batches(1, batch_size=6)]
    assert sizes == [6, 6, 1]
    assert equal(
        real(client(13, PADDING).batches(steps=5, batch_size=6)), real(client(13).batches(2, batch_size=6))[:5]
    )


@pytest.mark.parametrize("asked", [{}, {"epochs": 1, "steps": 1}])
def test_epochs_or_steps_must_be_said(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a number of epochs or of steps, and not both"):
        client(5).batches(**asked)  # type: ignore[arg-type]


# Draws with replacement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_weighted_draws_are_the_same_padded(n: int) -> None:
    short, long = client(n), client(n, PADDING)
    few, many = ((1 / data.class_counts.clamp(min=1))[data.y] for data in (short, long))
    epochs = real(short.batches(2, weights=few))
    assert sum(len(batch["y"]) for batch in epochs) == 2 * n  # an epoch is n draws
    assert all((batch["example"] < n).all() and torch.equal(batch["y"], short.y[batch["example"]]) for batch in epochs)
    assert equal(epochs, real(long.batches(2, weights=many)))
    assert equal(epochs, real(long.batches(steps=2 * passes(n), weights=many)))
    assert float(short.samples()) == 2 * n and float(long.samples()) == 4 * n


def test_examples_are_drawn_as_often_as_their_weight_says() -> None:
    data = client(20)
    weights = torch.arange(20.0) % 4
    drawn = torch.cat([batch.example for batch in data.batches(500, weights=weights)])
    share = torch.bincount(drawn, minlength=20) / len(drawn)
    assert (share[weights == 0] == 0).all()
    assert torch.allclose(share, weights / weights.sum(), atol=0.01)  # six standard errors


def test_weights_of_zero_are_all_equal() -> None:
    drawn = torch.cat([batch.example for batch in client(5).batches(400, weights=torch.zeros(5))])
    assert (torch.bincount(drawn, minlength=5) - 400).abs().max() < 100


def test_an_example_that_is_drawn_again_is_another_picture() -> None:
    (batch,) = client(4).batches(1, weights=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert batch.example.tolist() == [2] * 4 and batch.y.unique().numel() == 1
    assert len({tuple(image.flatten().tolist()) for image in batch.x}) > 1


def test_draws_are_unrelated_to_the_order_of_epochs_and_to_other_salts() -> None:
    data = client(40)
    orders = [
        torch.cat([batch.example for batch in data.batches(1, salt, weights=weights)])
        for salt, weights in (("", None), ("", torch.ones(40)), ("b", torch.ones(40)))
    ]
    assert sorted(orders[0].tolist()) == list(range(40)) != sorted(orders[1].tolist())
    first = keys.permutation(keys.fold(data.key, "order  0"), 40)
    assert torch.equal(orders[0], first)  # the stream that published results were trained on
    ranks = torch.argsort(orders[0]).float()  # of each example: as its random bits are
    assert abs(float(torch.corrcoef(torch.stack([ranks, orders[1].float()]))[0, 1])) < 0.5
    assert not torch.equal(orders[1], orders[2])


def test_weights_by_class_that_were_not_laid_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights are \(5,\), and there are 13 examples; give one for each"):
        client(13).batches(1, weights=torch.ones(CLASSES))
    assert len(list(client(CLASSES).batches(1, weights=torch.ones(CLASSES)))) == 2  # L = C cannot be told apart


# Views and randomness of an example -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("augment", ["crop_flip", "batch_crop_flip"])
@pytest.mark.parametrize("padding", [0, PADDING])
def test_the_first_of_two_views_is_the_batch_of_one(padding: int, augment: str, steps: int | None) -> None:
    asked: dict[str, Any] = {"epochs": 2} if steps is None else {"steps": steps}
    one, two = client(13, padding, augment), client(13, padding, augment)
    for single, double in zip(one.batches(**asked), two.batches(**asked, views=2), strict=True):
        half = len(single.y)
        assert torch.equal(double.x[:half], single.x) and torch.equal(double.keys[:half], single.keys)
        for name in ("y", "weight", "example"):
            assert torch.equal(getattr(double, name), getattr(single, name).repeat(2))
        seen = single.weight == 1
        assert not seen.any() or not torch.equal(double.x[half:][seen], single.x[seen])
        assert not set(double.keys[half:].tolist()) & set(single.keys.tolist())
    assert float(two.samples()) == 2 * float(one.samples())


def test_randomness_of_an_example_depends_on_its_place_alone() -> None:
    wide, narrow = (client(13).batches(2, batch_size=size) for size in (13, 2))
    (first, second), parts = list(wide), list(narrow)
    assert torch.equal(torch.cat([batch.keys for batch in parts[:7]]), first.keys)
    assert torch.equal(torch.cat([batch.keys for batch in parts[7:]]), second.keys)
    others = [next(client(13, key=key).batches(1, salt)) for key, salt in ((3, ""), (3, "b"), (4, ""))]
    everything = torch.cat([first.keys, second.keys, *(batch.keys for batch in others[1:])])
    assert len(everything.unique()) == len(everything)
    plain = torch.cat([batch.keys for batch in client(13).plain_batches(size=5)])
    assert len(plain.unique()) == 13 and torch.equal(plain, next(client(13).plain_batches()).keys)


def test_plain_batches_know_their_examples() -> None:
    data = client(13, PADDING)
    batches = list(data.plain_batches(size=6))
    assert torch.equal(torch.cat([batch.example for batch in batches]), torch.arange(13 + PADDING))
    assert torch.equal(data.y[batches[1].example], batches[1].y)


def test_a_batch_may_be_made_by_hand() -> None:
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, 1, 2]), torch.ones(3))
    assert batch.keys.unique().shape == (3,) and batch.example.shape == (0,)


def test_rows_of_draws_are_those_of_their_keys() -> None:
    many = keys.fold(keys.key(0), torch.arange(6))
    for rows, one in ((keys.uniform_rows, keys.uniform), (keys.normal_rows, keys.normal)):
        drawn = rows(many, 4)
        assert drawn.shape == (6, 4) and drawn.dtype == torch.float32
        assert torch.equal(drawn, torch.stack([one(key, 4) for key in many]))
        assert torch.equal(rows(many[2:5], 4), drawn[2:5])
        stacked = torch.func.vmap(lambda mine, rows=rows: rows(mine, 4))(many.reshape(2, 3))
        assert torch.equal(stacked.reshape(6, 4), drawn)


def test_keys_of_names_are_folded_together() -> None:
    names = ["order a 0", "order a 1", ""]
    each = keys.fold_each(keys.key(5), names)
    assert each.tolist() == [keys.fold(keys.key(5), name).item() for name in names]
    assert keys.fold_each(keys.key(5), []).shape == (0,)


def test_draws_by_weight_do_not_change_with_what_stands_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0])
    drawn = keys.weighted(keys.key(2), weights, 50)
    assert set(drawn.tolist()) == {1, 3}
    monkeypatch.setattr(keys, "bits", lambda key, n: torch.zeros(n, dtype=torch.int64))
    assert keys.weighted(keys.key(2), weights, 2).tolist() == [1, 1]  # the lowest draw is of no weight of zero
    monkeypatch.undo()
    longer = keys.weighted(keys.key(2), torch.cat([weights, torch.zeros(9)]), 60)
    assert torch.equal(longer[:50], drawn)


def test_one_hot_works_in_the_gradient_of_stacked_clients() -> None:
    logits, y = keys.normal(keys.key(0), 2, 4, 3), torch.tensor([[0, 1, 2, 2], [1, 1, -1, 0]])

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return -(losses.one_hot(y, 3) * logits.log_softmax(1)).sum()

    gradient = torch.func.vmap(torch.func.grad(loss))(logits, y)
    expected = torch.autograd.functional.jacobian(
        lambda z: sum(torch.nn.functional.cross_entropy(z[k], y[k], ignore_index=-1, reduction="sum") for k in (0, 1)),
        logits,
    )
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert losses.one_hot(torch.tensor([2, -1]), 3).tolist() == [[0, 0, 1], [0, 0, 0]]


# Parts ------------------------------------------------------------------------------------------------------


def kept(data: LocalData) -> list[int]:
    """Rows of a client's examples, without padding."""
    return data.index[: int(data.n)].tolist()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("n", [*SIZES, 40])
def test_a_part_is_set_aside_class_by_class(n: int, share: float) -> None:
    for padding in (0, PADDING):
        whole = client(n, padding)
        rest, aside = whole.part(share, "validation")
        wanted = [int(count * share + 1e-6) for count in whole.class_counts.tolist()]
        assert aside.class_counts.tolist() == wanted and int(aside.n) == sum(wanted)
        assert rest.class_counts.tolist() == [c - a for c, a in zip(whole.class_counts.tolist(), wanted, strict=True)]
        for part in (rest, aside):
            found = torch.bincount(part.y[: int(part.n)], minlength=CLASSES)
            assert torch.equal(found, part.class_counts)
            assert kept(part) == [row for row in kept(whole) if row in kept(part)]  # in stored order
            assert padding or len(part.index) == part.n
        assert sorted(kept(rest) + kept(aside)) == sorted(kept(whole))
        assert [kept(part) for part in client(n).part(share, "validation")] == [kept(rest), kept(aside)]


@pytest.mark.parametrize("padded", [False, True])
def test_a_share_is_what_a_person_means_by_it(padded: bool) -> None:
    images = Images(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.zeros(100).long(), (0.5,), (0.2,))
    everything = images, torch.arange(100), torch.tensor(100), keys.key(0), torch.tensor([100])
    data = LocalData(*everything, batch_size=SIZE, padded=padded)
    for percent in range(101):
        rest, aside = data.part(percent / 100, "validation")
        assert (int(aside.n), int(rest.n)) == (percent, 100 - percent) and len(aside.index) >= percent


def test_a_part_is_the_same_in_every_round_and_no_other_clients_or_purposes() -> None:
    def aside(purpose: str = "validation", key: int = 3) -> list[int]:
        return kept(client(40, key=key).part(0.5, purpose)[1])

    assert aside() == aside(key=4)
    assert aside() != aside("mixture")
    one, other = (client(40, own=own).part(0.5, "validation")[1].index for own in (8, 9))
    assert kept(replace(client(40), client_key=keys.key(9)).part(0.5, "validation")[1]) != aside()
    assert len(one) == len(other)


def test_every_example_may_be_set_aside() -> None:
    chosen = torch.zeros(40)
    for own in range(400):
        chosen[replace(client(40), client_key=keys.key(own)).part(0.5, "v")[1].index] += 1
    assert ((chosen - 200).abs() < 60).all()  # six standard deviations


def test_batches_of_parts_are_the_same_padded_and_counted_apart() -> None:
    found = []
    for padding in (0, PADDING):
        data = client(13, padding)
        rest, aside = data.part(0.4, "validation")
        inner, _ = rest.part(0.5, "validation")
        batches = [*rest.batches(2), *aside.batches(steps=3, views=2), *inner.plain_batches(), *data.batches(1)]
        found.append(real(batches))
        if not padding:
            m, r, i = int(aside.n), int(rest.n), int(inner.n)
            views = sum(len(batch.y) for batch in client(13).part(0.4, "validation")[1].batches(steps=3, views=2))
            assert 0 < m <= SIZE and views == 2 * 3 * m
            expected = 2 * r + views + i / 3 + 13
        assert float(data.samples()) == pytest.approx(expected)
    assert equal(*found)


def test_a_client_too_small_to_set_anything_aside_trains_as_ever() -> None:
    rest, aside = client(3).part(0.2, "validation")
    assert len(aside.index) == 0 and equal(real(rest.batches(2)), real(client(3).batches(2)))
    assert list(aside.batches(steps=2)) == []


def test_the_stream_of_what_is_aside_is_its_own() -> None:
    rest, aside = client(40).part(0.5, "validation")
    assert not torch.equal(rest.key, aside.key)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        client(5).part(share, "validation")


def test_without_labels_there_are_none_anywhere() -> None:
    whole = client(13, PADDING)
    data = whole.unlabelled()
    assert (data.y == -1).all() and not data.class_counts.any() and whole.class_counts.sum() == 13
    for batch, labelled in zip(data.batches(1, views=2), client(13, PADDING).batches(1, views=2), strict=True):
        assert (batch.y == -1).all() and torch.equal(batch.x, labelled.x)
    assert all((batch.y == -1).all() for batch in data.plain_batches())
    assert float(whole.samples()) == pytest.approx(2 * 13 + 13 / 3)
    rest, aside = data.part(0.3, "validation")
    assert (int(rest.n), int(aside.n)) == (10, 3) and (aside.y == -1).all() and not aside.class_counts.any()


# In a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling(Algorithm):
    """FedAvg that uses all of it: balanced draws of two views under noise, so many steps, a part aside."""

    def init_client(self, task: Task) -> Tree:
        return {"right": torch.zeros(()), "aside": torch.zeros((), dtype=torch.int64)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        rest, aside = data.part(0.25, "validation")
        balanced = (1 / rest.class_counts.clamp(min=1))[rest.y]

        def loss(params: Tree, batch: Batch) -> Tensor:
            noise = keys.normal_rows(batch.keys, batch.x[0].numel()).reshape(batch.x.shape)
            logits = task.logits(params, batch.x + 0.1 * noise).float()
            return losses.mean(-(losses.one_hot(batch.y, task.num_classes) * logits.log_softmax(1)).sum(1), batch)

        model = task.sgd(loss, shared, rest.batches(task.epochs, weights=balanced, views=2))
        model = task.sgd(loss, model, rest.batches(steps=5, salt="more", batch_size=4))
        model = task.sgd(task.loss, model, itertools.islice(data.batches(1, "cut"), 2))
        right = torch.zeros((), device=data.n.device)
        for batch in aside.plain_batches():
            right = right + ((task.logits(model, batch.x).argmax(1) == batch.y) * batch.weight).sum()
        chosen = (aside.index * (aside.mask > 0)).sum()
        return model, {"right": right, "aside": chosen}


PROMISES = (
    "inputs are left alone",
    "states keep keys, shapes and dtypes",
    "engines agree",
    "the seed decides, and nothing else",
    "small and empty clients are harmless",
    "stop and resume equals one go",
    "evaluation is pure",
    "test data stay out of training",
    "learns the toy problem",
)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_method_that_samples_keeps(promise: str) -> None:
    checks.ALGORITHM_PROMISES[promise](Sampling)


def test_engines_process_the_same_samples() -> None:
    setting = replace(toy.SETTING, participation=1.0, rounds=2)
    runs = [toy.finish(toy.run(Sampling(), engine, setting=setting)) for engine in ("serial", "stacked")]
    found = [run.outcome().cost["train_samples"] for run in runs]
    expected = 0.0
    for k in range(len(toy.SIZES)):
        visit = runs[0].population.visit(k, 0, {})
        n = len(visit.index)
        aside = int((visit.class_counts * 0.25 + 1e-6).floor().sum())
        rest = n - aside
        five = 5 // max(-(-rest // 4), 1) * rest + min(rest, 5 % max(-(-rest // 4), 1) * 4)
        expected += 2 * 2 * rest + five + min(n, 32) + aside / 3
    assert found == [pytest.approx(2 * expected)] * 2
    private = [[run.store[k]["aside"] for k in range(len(toy.SIZES))] for run in runs]
    assert private[0] == private[1] and any(private[0])


@dataclass(frozen=True, kw_only=True)
class Few(Algorithm):
    """A few steps only, of what is not aside: with batch norm, more make much of little rounding."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        rest, _ = data.part(0.25, "validation")
        return task.sgd(task.loss, shared, rest.batches(steps=4)), private


def test_engines_agree_where_padding_would_move_the_statistics_of_norm_layers() -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, participation=1.0)
    one, other = (toy.finish(toy.run(Few(), engine, setting=setting)) for engine in ("serial", "stacked"))
    assert tree.largest_difference(toy.states(one), toy.states(other)) < 5e-3  # with padding in serial 5e-2 and more


def test_the_randomness_of_a_client_is_the_same_in_every_round_and_travels() -> None:
    population = toy.run(Sampling()).population
    visits = {(k, r): population.visit(k, r, {}) for k in (0, 1) for r in (0, 3)}
    assert len({int(visit.key) for visit in visits.values()}) == 4
    assert {(k, int(visit.client_key)) for (k, _), visit in visits.items()} == {
        (k, int(visits[k, 0].client_key)) for k in (0, 1)
    }
    assert int(visits[0, 0].client_key) != int(visits[1, 0].client_key)
    parcel, _ = pack(visits[0, 3])
    assert torch.equal(unpack(parcel)[0].client_key, visits[0, 3].client_key)
    assert torch.equal(pickle.loads(pickle.dumps(visits[0, 3])).client_key, visits[0, 3].client_key)
    assert int(toy.run(Sampling(), seed=1).population.visit(0, 0, {}).client_key) != int(visits[0, 0].client_key)


def test_stacked_clients_are_handed_padded_data_and_single_ones_are_not() -> None:
    run, seen = toy.run(Sampling()), []

    def look(task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        seen.append(data.padded)
        return {"n": data.n}

    visits = [run.population.visit(k, 0, {}) for k in (0, 4)]
    for engine in (engines.serial, engines.stacked):
        engine(look, run.task_at(0), {}, run.population.images, visits)
    assert seen == [False, False, True]


def test_a_part_is_the_same_after_a_run_was_taken_up_again(tmp_path: Path) -> None:
    run = toy.run(Sampling(), setting=replace(toy.SETTING, participation=1.0), checkpoint=tmp_path / "run.pt")
    run.saved = -float("inf")
    run.step()
    first = [run.store[k]["aside"].item() for k in range(len(toy.SIZES))]
    again = toy.finish(
        toy.run(Sampling(), setting=replace(toy.SETTING, participation=1.0), checkpoint=tmp_path / "run.pt")
    )
    assert [again.store[k]["aside"].item() for k in range(len(toy.SIZES))] == first
