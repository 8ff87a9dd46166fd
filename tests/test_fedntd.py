"""FedNTD: the divergence by torch's own, a client's steps against a loop written out, FedAvg without distillation."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of

SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def divergence(teacher: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    ALGORITHMS["fedntd"]()
    found: Tensor = import_module("bench.algorithms.fedntd").divergence(teacher, logits, y)
    return found


def others(logits: Tensor, y: Tensor) -> Tensor:
    """The columns that are not the label's: (B, C - 1)."""
    rows = [torch.cat([row[:c], row[c + 1 :]]) for row, c in zip(logits, y.tolist(), strict=True)]
    return torch.stack(rows)


def drawn(seed: int, classes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    teacher, logits = (3 * torch.randn(5, classes, generator=draw) for _ in range(2))
    return teacher, logits, torch.randint(classes, (5,), generator=draw)


def test_the_divergence_is_that_of_the_other_classes() -> None:
    teacher, logits, y = drawn(1)
    wanted, said = (F.log_softmax(others(each, y), 1) for each in (teacher, logits))
    expected = F.kl_div(said, wanted, reduction="none", log_target=True).sum(1)
    assert torch.allclose(divergence(teacher, logits, y), expected, atol=1e-5)
    # softmax of (0, log 3) is (1/4, 3/4), of (0, 0) it is (1/2, 1/2)
    three = torch.tensor([[0.0, 9.0, torch.tensor(3.0).log()]]), torch.zeros(1, 3), torch.tensor([1])
    assert float(divergence(*three)) == pytest.approx(0.130812, abs=1e-6)


def test_the_labels_own_logit_is_never_taught() -> None:
    teacher, logits, y = drawn(2)
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(divergence(teacher, logits, y).sum(), logits)
    own = F.one_hot(y, 6).bool()
    assert slope[own].eq(0).all() and bool((slope[~own].abs() > 1e-4).all())
    moved = torch.where(own, 50.0, teacher)
    assert torch.equal(divergence(moved, logits, y), divergence(teacher, logits, y))


def test_a_teacher_of_ones_own_mind_teaches_nothing_and_of_two_classes_none_does() -> None:
    _, logits, y = drawn(3)
    logits.requires_grad_()
    same = divergence(logits.detach(), logits, y)
    assert float(same.detach().abs().max()) < 1e-6
    assert float(torch.autograd.grad(same.sum(), logits)[0].abs().max()) < 1e-6
    assert divergence(*drawn(4, 2)).eq(0).all()


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
@ENGINES
def test_without_distillation_it_is_fedavg(engine: str, setting: Any) -> None:
    """Bit for bit: the teacher moves no statistics and takes part in no norm."""
    off, fedavg = (toy.finish(run_of(name, engine, setting, **fields)) for name, fields in
                   (("fedntd", {"distil": 0.0}), ("fedavg", {})))  # fmt: skip
    assert largest_difference(off.progress.server, fedavg.progress.server) == 0.0


@ENGINES
def test_at_the_defaults_it_is_not(engine: str) -> None:
    runs = [toy.finish(run_of(name, engine)) for name in ("fedntd", "fedavg")]
    assert largest_difference(*(run.progress.server for run in runs)) > 1e-3


@pytest.mark.parametrize(("distil", "temperature"), [(1.0, 1.0), (0.7, 3.0)])
def test_steps_are_those_of_the_papers_loss(distil: float, temperature: float) -> None:
    """Cross-entropy + beta tau² KL(teacher / tau || model / tau), the mean over a batch."""
    run = run_of("fedntd", setting=replace(toy.SETTING, momentum=0.5), distil=distil, temperature=temperature)
    start = tree.flatten(run.progress.server)
    received = list(start.values())
    w = [torch.nn.Parameter(leaf.clone()) for leaf in received]
    optimiser = torch.optim.SGD(w, run.setting.lr, 0.5)
    for batch in data_of(run, 0).batches(run.setting.epochs):
        x, y = batch.x.flatten(1), batch.y
        logits, taught = (F.linear(torch.relu(F.linear(x, *each[:2])), *each[2:]) for each in (w, received))
        wanted, said = (F.log_softmax(others(each, y) / temperature, 1) for each in (taught, logits))
        apart = F.kl_div(said, wanted, reduction="batchmean", log_target=True)
        optimiser.zero_grad()
        (F.cross_entropy(logits, y) + distil * temperature**2 * apart).backward()
        optimiser.step()
    expected = tree.unflatten(dict(zip(start, (p.detach() for p in w), strict=True)))
    assert largest_difference(toy.upload_once(run)[0], expected) < 5e-6


def test_what_the_received_model_thinks_of_other_classes_is_kept() -> None:
    """On examples of the client, after many epochs; and it learns its own classes all the same."""
    run = run_of("fedavg")
    run.step()
    received, apart = run.progress.server, []
    for distil in (0.0, 1.0, 10.0):
        run = run_of("fedntd", setting=replace(toy.SETTING, epochs=20), distil=distil)
        run.progress.server = received
        x, y = run.population.images.plain(run.population.index[1]), data_of(run, 1).y
        logits = run.task.logits(toy.upload_once(run, 1)[0], x)
        apart.append(float(divergence(run.task.logits(received, x), logits, y).mean()))
        assert float((logits.argmax(1) == y).float().mean()) > 0.95
    assert apart[0] > 3 * apart[1] > 3 * apart[2]


def test_the_teacher_goes_by_its_running_statistics() -> None:
    """Which no model that trains looks at."""
    uploads = []
    for shift in (0.0, 1.0):
        run = run_of("fedntd", setting=BATCH_NORM, distil=30.0)
        statistics, weights = tree.split(run.progress.server, tree.is_statistic)
        run.progress.server = tree.merge(tree.map(lambda leaf, by=shift: leaf + by, statistics), weights)
        uploads.append(tree.parameters(toy.upload_once(run)[0]))
    assert largest_difference(*uploads) > 1e-4


def test_nothing_more_travels() -> None:
    run, fedavg = toy.finish(run_of("fedntd")), toy.finish(run_of("fedavg"))
    for what in ("bytes_down", "bytes_up", "train_samples"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]


def test_engines_agree_under_batch_norm() -> None:
    runs = [run_of("fedntd", engine, BATCH_NORM) for engine in ("serial", "stacked")]
    found: list[Tree] = [toy.finish(run).progress.server for run in runs]
    assert largest_difference(*found) < 2e-4
