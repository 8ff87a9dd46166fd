"""OSUDA: golden values of the glide and of what channels are held by, its corners, and that no label is read."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import cache, partial, partialmethod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Adaptation, LocalData, Task, Tree, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.data import Images
from bench.models import layers
from bench.models.networks import Block, Network
from bench.plugins.registry import ALGORITHMS
from bench.results.cautions import cautions
from bench.training.engine import TOLERANCE
from bench.training.rounds import Run
from bench.tree import largest_difference

BATCH = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, batch_size=4, participation=1.0)
SETTING = replace(BATCH, unseen=1, unseen_labels=False)
FEW = (6, 0, 0, 0, 0, 0, 0, 7)
"""Examples of clients; the last is held out."""
SHOWN = toy.Toy(test=30)
"""Test images are dear to a network with batch norm."""


def module() -> Any:
    return importlib.import_module("bench.algorithms.osuda")


def made(**fields: Any) -> Any:
    return ALGORITHMS["osuda"](**fields)


@cache
def run_of(name: str = "osuda", engine: str = "serial", labels: bool = False, **fields: Any) -> Run:
    setting = replace(SETTING, unseen_labels=labels)
    return toy.finish(toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=FEW, dataset=SHOWN))


def unseen(run: Run) -> dict[str, Tree]:
    """Give the models of the client held out, by name."""
    task, server = run.task_at(0), run.progress.server
    named = run.evaluator.models(task, server, run.algorithm.broadcast(task, server), run.store, [7], True)
    return {name: model for name, (model,) in named.items()}


# A network of one norm layer on pixels, whose facts can be had by hand ------------------------------------------------


class Normed(Network):
    """One norm layer of batch norm on the pixels of each channel, and the head."""

    @property
    def feature_size(self) -> int:
        return math.prod(self.shape)

    def init_body(self, key: Tensor) -> Tree:
        return {"first": {"norm": layers.norm_layer("batch", self.shape[0], key.device)}}

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (Block("first", ("first",), partial(features)),)


def features(body: Tree, x: Tensor) -> Tensor:
    return layers.norm("batch", body["first"]["norm"], x).flatten(1)


def task_of(**changed: Any) -> Task:
    return replace(toy.task(made()), model=Normed("normed", 6, (1, 8, 8), "batch"), lr=0.5, **changed)


def data_of(run: Run, client: int = 0) -> LocalData:
    visit = run.population.visit(client, 0, {})
    counts, n = visit.class_counts, torch.tensor(len(visit.index))
    return LocalData(run.population.images, visit.index, n, visit.key, counts, 8, client_key=visit.client_key)


@cache
def plain() -> LocalData:
    return data_of(toy.run(made(), setting=BATCH))


def trained(task: Task) -> Tree:
    """Give a model whose statistics are those of the first client, and whose head knows its images."""
    model = task.init()
    model = tree.merge(model, task.statistics_of(model, plain()))
    return {**model, "head": task.sgd(lambda p, b: task.loss({**model, **p}, b), {"head": model["head"]},
                                      plain().batches(3))["head"]}  # fmt: skip


# Golden -----------------------------------------------------------------------------------------------------


def two() -> tuple[Tree, Tree]:
    return tuple(
        {"a": {"norm": {"stats": {"mean": torch.tensor(mean), "var": torch.tensor(var)}}}}
        for mean, var in (((0.0, 1.0), (1.0, 4.0)), ((1.0, 1.0), (1.0, 1.0)))
    )  # type: ignore[return-value]


def test_channels_that_look_alike_are_held_more_firmly() -> None:
    (held,) = module().transferability(*two()).values()
    assert held.tolist() == pytest.approx([0.857143, 1.142857], abs=1e-4)
    firm = module().beside({"a": {"norm": {"weight": torch.zeros(2), "bias": torch.zeros(2)}}}, {"a/norm": held})
    assert firm["a"]["norm"]["bias"].tolist() == pytest.approx([1.857143, 2.142857], abs=1e-4)


def test_statistics_glide() -> None:
    glide = partial(made(decay=3.0).glided, *two())
    at = [glide(torch.tensor(t / 3))["a"]["norm"]["stats"] for t in range(4)]
    assert [float(each["mean"][0]) for each in at] == pytest.approx([0, 0.632121, 0.864665, 0.950213], abs=1e-5)
    assert [float(each["var"][1]) for each in at] == pytest.approx([4, 2.103638, 1.406006, 1.149361], abs=1e-5)


def test_what_is_drawn_back_goes_no_further_than_where_it_was() -> None:
    start, moved = {"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([1.05, 1.5, 0.0])}
    back = module().drawn_back(moved, start, {"w": torch.tensor([1.0, 2.0, 1.0])}, 0.1)
    assert back["w"].tolist() == pytest.approx([1.0, 1.3, 0.1])


def test_the_entropy_of_an_answer() -> None:
    found = module().entropies(torch.tensor([[0.0, 0, 0, 0], [100, 0, 0, 0], [math.log(3), 0, -1e4, -1e4]]))
    assert found.tolist() == pytest.approx([math.log(4), 0, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)], abs=1e-5)


# Statistics of a client's images ----------------------------------------------------------------------------


def test_statistics_are_those_of_all_images_however_they_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    task, taken = task_of(), plain()
    brighter = torch.linspace(-2, 2, 60)[:, None, None, None]  # so that batches have means of their own
    x = taken.images.plain(taken.index) + brighter
    data = replace(taken, images=Images(x, taken.y, (0.0,), (1.0,), scale=1.0), index=torch.arange(60))
    whole = task.statistics_of(task.init(), data)["body"]["first"]["norm"]["stats"]
    assert float(whole["mean"]) == pytest.approx(float(x.mean()), abs=1e-5)
    assert float(whole["var"]) == pytest.approx(float(x.var()), rel=1e-5)
    few = partialmethod(LocalData.plain_batches, size=7)
    monkeypatch.setattr(LocalData, "plain_batches", few)
    parts = task.statistics_of(task.init(), data)["body"]["first"]["norm"]["stats"]
    torch.testing.assert_close(parts["mean"], whole["mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts["var"], whole["var"], rtol=5e-3, atol=1e-5)
    nobody = replace(data, index=data.index[:0], n=torch.tensor(0))
    start = tree.split(task.init(), layers.is_norm_statistic)[0]
    assert largest_difference(task.statistics_of(task.init(), nobody), start) == 0


def test_adabn_gives_images_that_are_stretched_and_lifted_their_answers_back() -> None:
    """3 x + 2 of a training client's images: with its own statistics they are the same images."""
    task, data = task_of(), plain()
    model = trained(task)
    far = replace(data, images=Stretched(data.images))  # type: ignore[arg-type]
    adapted = made(eta=0.0, entropy=0.0).adapted(task, model, far)
    x = data.images.plain(data.index)
    wanted = task.logits(model, x)
    torch.testing.assert_close(task.logits(adapted, 3 * x + 2), wanted, rtol=1e-3, atol=1e-4)
    assert float((task.logits(model, 3 * x + 2) - wanted).abs().max()) > 0.1


class Stretched:
    """Images that another camera took."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getattr__(self, name: str) -> Any:
        return getattr(self.images, name)

    def plain(self, index: Tensor) -> Tensor:
        x: Tensor = self.images.plain(index)
        return 3 * x + 2

    def augmented(self, index: Tensor, *more: Any) -> Tensor:
        return self.plain(index)


# Corners ----------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
def test_its_corners() -> None:
    task, data = task_of(), plain()
    model = trained(task)
    far = replace(data, images=Stretched(data.images)).unlabelled()  # type: ignore[arg-type]
    target = task.statistics_of(model, far)
    for still in ({"entropy": 0.0}, {"consistency": 1e6}):
        adapted = made(eta=1.0, decay=0.0, **still).adapted(task, model, far)
        assert largest_difference(adapted, model) == 0  # the generic model, to the bit
    adabn = made(eta=0.0, entropy=0.0).adapted(task, model, far)
    assert largest_difference(adabn, tree.merge(model, target)) == 0
    tent = made(eta=0.0, consistency=0.0).adapted(task, model, far)
    assert largest_difference(tree.split(tent, layers.is_norm_statistic)[0], target) == 0
    assert largest_difference(model["head"], tent["head"]) == 0
    held = made(eta=0.0).adapted(task, model, far)
    before, free, firm = (each["body"]["first"]["norm"]["weight"] for each in (model, tent, held))
    assert 0 < float((free - before).abs()) > float((firm - before).abs())
    x = far.images.plain(far.index)
    sure = [float(module().entropies(task.logits(each, x)).mean()) for each in (adabn, tent)]
    assert sure[1] < sure[0]
    ended = made(entropy=0.0, decay=2.0).adapted(task, model, far)
    at, of, end = (each["body"]["first"]["norm"]["stats"]["mean"] for each in (model, target, ended))
    torch.testing.assert_close(end, math.exp(-2) * at + (1 - math.exp(-2)) * of)


def test_a_network_without_running_statistics_stays_as_it_is() -> None:
    task = toy.task(made())
    assert made().adapted(task, task.init(), plain()).keys() == task.init().keys()
    assert largest_difference(made().adapted(task, task.init(), plain()), task.init()) == 0


def test_answers_are_made_surer_under_the_gliding_statistics_not_under_those_of_a_batch() -> None:
    task, data = task_of(), plain().unlabelled()
    model = trained(task)
    other = tree.map_paths(lambda path, leaf: leaf + 1 if path.endswith("stats/mean") else leaf, model)
    method = made(consistency=0.0, decay=0.0, epochs=1)
    one, two = (method.adapted(task, each, data)["body"]["first"]["norm"]["bias"] for each in (model, other))
    assert not torch.equal(one, two)


# What the consistency is for ---------------------------------------------------------------------------------


def test_entropy_alone_gives_a_client_of_mostly_one_class_that_class_and_the_consistency_prevents_it() -> None:
    """28 images of one class on one side, 4 of the other hardly on the other: all statistics stay at the model's."""
    side = torch.cat([torch.linspace(0.5, 1.5, 28), torch.full((4,), -0.2)])
    x, y = torch.stack([side, -side], 1)[:, :, None, None], torch.tensor([0] * 28 + [1] * 4)
    images = Images(x, y, (0.0, 0.0), (1.0, 1.0), scale=1.0)
    data = replace(plain(), images=images, index=torch.arange(32), n=torch.tensor(32)).unlabelled()
    task = replace(task_of(), model=Normed("normed", 2, (2, 1, 1), "batch"), num_classes=2)
    model = {**task.init(), "head": {"weight": torch.eye(2), "bias": torch.zeros(2)}}

    def answers(**fields: float) -> Tensor:
        return task.logits(made(decay=0.0, **fields).adapted(task, model, data), x).argmax(1)

    assert torch.equal(task.logits(model, x).argmax(1), y)
    assert not answers(consistency=0.0).any()
    assert torch.equal(answers(), y)


# Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_clients_that_train_have_the_bits_of_fedavg(engine: str) -> None:
    mine, theirs = run_of(engine=engine), run_of("fedavg", engine)
    assert mine.outcome().digest == theirs.outcome().digest
    ours, usual = mine.outcome().metrics, theirs.outcome().metrics
    assert all(ours[key] == value for key, value in usual.items() if not key.startswith("unseen"))


@pytest.mark.equivalence
def test_without_epochs_clients_held_out_have_fedavgs_model() -> None:
    mine, theirs = run_of(epochs=0), run_of("fedavg")
    assert largest_difference(unseen(mine)["unseen"], unseen(theirs)["unseen"]) == 0
    assert mine.outcome().metrics["unseen"] == theirs.outcome().metrics["unseen"]
    assert run_of.__wrapped__(epochs=0).progress.cost.get("adaptation_samples", 0.0) == 0


def test_engines_agree_and_nobody_reads_a_label() -> None:
    ways = [run_of(), run_of(engine="stacked"), run_of(labels=True)]
    found = [unseen(run) for run in ways]
    assert found[0].keys() == {"unseen:0 epochs", "unseen:5 epochs", "unseen"}
    assert largest_difference(found[0]["unseen"], found[1]["unseen"]) < TOLERANCE
    assert largest_difference(found[0]["unseen"], found[2]["unseen"]) == 0
    assert largest_difference(found[0]["unseen:0 epochs"], ways[0].progress.server) == 0


def test_norm_layers_move_and_nothing_else() -> None:
    runs = [run_of(engine=engine, consistency=0.0, entropy=0.1) for engine in ("serial", "stacked")]
    adapted, stacked = (unseen(run)["unseen"] for run in runs)
    assert largest_difference(adapted, stacked) < TOLERANCE
    moved = tree.flatten(tree.sub(adapted, runs[0].progress.server))
    moving = {tuple(path.split("/")[-2:]) for path, leaf in moved.items() if bool(leaf.any())}
    assert moving == {("norm", "weight"), ("norm", "bias"), ("stats", "mean"), ("stats", "var")}


def test_what_it_takes_is_counted() -> None:
    assert run_of.__wrapped__().progress.cost["adaptation_samples"] == pytest.approx(7 * (5 + 1 / 3))
    assert run_of.__wrapped__(eta=0.0, entropy=0.0).progress.cost["adaptation_samples"] == pytest.approx(7 / 3)


# The stage and what is said ---------------------------------------------------------------------------------


def test_a_stage_that_a_method_does_itself() -> None:
    (stage,) = stages(made(epochs=3).newcomer_adaptation(toy.task(made())))
    assert str(stage) == "3 epochs of body at 1 × lr by adapted without labels"
    assert made(epochs=0).newcomer_adaptation(toy.task(made())) is None and made().adaptation(toy.task(made())) is None
    with pytest.raises(ValueError, match="by = 'adapted': what the method does is its own; leave loss and steps out"):
        Adaptation(by="adapted", steps=3)
    with pytest.raises(ValueError, match="labels = False: cross-entropy needs labels"):
        Adaptation(epochs=1, labels=False)


def test_a_table_says_what_is_known_of_clients_held_out() -> None:
    board = SimpleNamespace(clients=None, setting={}, rows=(), packages={})
    told = []
    for setting in ({}, {"unseen": 5}, {"unseen": 1, "unseen_labels": False}):
        told.append(cautions(SimpleNamespace(**{**vars(board), "setting": setting})))  # type: ignore[arg-type]
    assert told[0] == []
    assert told[1] == [
        "Of 5 clients held out of training the labels are known: unseen is after tuning by these, unless a method "
        "tunes without them."
    ]
    assert told[2] == [
        "Of 1 client held out of training no label is known: unseen is without any tuning, unless a method tunes "
        "without labels."
    ]
