"""FedDecorr: the card's values and numpy's, what is 0 and when, and what it does to features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Loss, Task, keys, losses, tree
from bench.contract import toy
from bench.data import Batch
from bench.plugins.registry import PARTS, label
from bench.protocol.composed import Composed
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from tests import virtual

SETTING = replace(toy.SETTING, rounds=2)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
BY_BATCH = pytest.mark.parametrize("by_batch", [True, False])
ROWS = torch.tensor([[1.0, 2, 0], [2, 1, 1], [3, 4, 1], [4, 3, 0]])
"""Features whose correlations are 0.6, 0 and 0."""


def part_of(**fields: Any) -> Loss:
    part = PARTS["feddecorr"](**fields)
    assert isinstance(part, Loss)
    return part


def task_of(num_classes: int = 5) -> Task:
    return replace(toy.task(toy.Host()), num_classes=num_classes)


def term(z: Tensor, padding: int = 0, weight: float = 1.0, by_batch: bool = True) -> Tensor:
    """What the part adds to cross-entropy; all logits are 0."""
    real = (torch.arange(len(z)) < len(z) - padding).float()
    batch = Batch(torch.zeros(len(z), 1, 1, 1), torch.zeros(len(z), dtype=torch.int64), real)
    logits, part = torch.zeros(len(z), 5), part_of(weight=weight, by_batch=by_batch)
    return part.loss(task_of(), logits, z, batch, torch.ones(5)) - losses.cross_entropy(logits, batch)


def random(rows: int, width: int = 7, name: str = "z") -> Tensor:
    return keys.normal(keys.fold(keys.key(3), name), rows, width)


@pytest.mark.parametrize(
    ("by_batch", "copies", "wanted"), [(True, 1, 0.27), (True, 4, 1.6875), (False, 1, 0.12), (False, 4, 0.12)]
)
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_cards_values_are_found(by_batch: bool, copies: int, wanted: float, weight: float) -> None:
    value = float(term(ROWS.repeat(copies, 1), weight=weight, by_batch=by_batch))
    assert value == pytest.approx(weight * wanted, abs=2e-6)


def test_without_its_batch_it_is_numpys_mean_squared_correlation() -> None:
    z = random(12)
    squares = np.corrcoef(z.double().numpy().T) ** 2
    wanted = (squares.sum() - 7) / 42
    assert float(term(z, by_batch=False)) == pytest.approx(wanted, rel=1e-5)
    assert float(term(z)) == pytest.approx(wanted * 11**2 / 12, rel=1e-5)


@BY_BATCH
def test_shifts_and_scales_of_a_feature_do_not_count(by_batch: bool) -> None:
    z = random(9).requires_grad_()
    value = term(z, by_batch=by_batch)
    (slope,) = torch.autograd.grad(value, z)
    other = term(z.detach() * torch.tensor([3.0, 0.1, 20, 1, 7, 0.5, 2]) - 4, by_batch=by_batch)
    assert float(other) == pytest.approx(float(value.detach()), rel=1e-4)
    assert slope.sum(0).abs().max() < 1e-6 and (slope * z.detach()).sum(0).abs().max() < 1e-5
    assert slope.abs().max() > 1e-3


@BY_BATCH
def test_padding_changes_neither_value_nor_gradient(by_batch: bool) -> None:
    z = random(9).requires_grad_()
    found = []
    for value in (term(z[:6], by_batch=by_batch), term(z, 3, by_batch=by_batch)):
        (slope,) = torch.autograd.grad(value, z)
        found.append((float(value.detach()), slope))
    (alone, cut), (padded, whole) = found
    assert padded == pytest.approx(alone, rel=1e-5)
    assert torch.allclose(cut, whole, atol=1e-6) and float(whole[6:].abs().max()) == 0.0


@BY_BATCH
@pytest.mark.parametrize("what", ["one", "none", "equal", "zeros", "dead", "tiny", "huge", "one feature"])
def test_values_and_gradients_are_finite(what: str, by_batch: bool) -> None:
    z = random(6)
    z = {
        "equal": z[:1].repeat(6, 1),
        "zeros": torch.zeros(6, 7),
        "dead": torch.cat([z[:, :4], torch.zeros(6, 3)], 1),
        "tiny": 1e-30 * z,
        "huge": 1e15 * z,
        "one feature": z[:, :1],
    }.get(what, z).requires_grad_()
    value = term(z, {"one": 5, "none": 6}.get(what, 0), by_batch=by_batch)
    (slope,) = torch.autograd.grad(value, z)
    assert bool(value.isfinite()) and bool(slope.isfinite().all()) and float(slope.abs().max()) < 1e3
    if what not in ("dead", "huge"):
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)


def test_it_is_mapped_over_clients() -> None:
    z = random(3 * 8).reshape(3, 8, 7)
    weight = torch.tensor([[1.0] * 8, [1.0] * 5 + [0.0] * 3, [0.0] * 8])
    part, task = part_of(), task_of()

    def value(z: Tensor, weight: Tensor) -> Tensor:
        batch = Batch(torch.zeros(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64), weight)
        return part.loss(task, z[:, :5], z, batch, torch.ones(5))

    stacked, slopes = torch.func.vmap(torch.func.grad_and_value(value))(z, weight)[::-1]
    for k in range(3):
        slope, alone = torch.func.grad_and_value(value)(z[k], weight[k])
        assert torch.allclose(stacked[k], alone, atol=1e-5) and torch.allclose(slopes[k], slope, atol=1e-5)


def test_autocast_does_not_round_correlations() -> None:
    z = random(9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = term(z)
    assert rough.dtype == torch.float32 and torch.equal(rough, term(z.float()))


def test_without_features_there_is_a_sentence() -> None:
    batch = Batch(torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="features = None: this loss is one of features, and the method has none"):
        part_of().loss(task_of(), torch.zeros(2, 5), None, batch, torch.ones(5))


def test_on_the_device_nobody_waits_for_it() -> None:
    """As in `tests.test_virtual`, of local work alone."""
    with virtual.device() as device:
        z, here = random(9).to(device).requires_grad_(), random(9).requires_grad_()
        y, weight = torch.zeros(9, dtype=torch.int64), (torch.arange(9) < 7).float()
        batches = [Batch(torch.zeros(9, 1, 1, 1).to(where), y.to(where), weight.to(where)) for where in (device, "cpu")]
        part, task = part_of(), task_of()
        with virtual.waits() as found:
            value = part.loss(task, z[:, :5], z, batches[0], torch.ones(5, device=device))
            (slope,) = torch.autograd.grad(value, z)
        assert not found
        again = part.loss(task, here[:, :5], here, batches[1], torch.ones(5))
        assert torch.equal(value.cpu(), again) and torch.equal(slope.cpu(), torch.autograd.grad(again, here)[0])


def ran(algorithm: Any, engine: str = "serial", **setting: Any) -> Run:
    if isinstance(algorithm, str):
        (algorithm,) = parse_algorithms(algorithm)
    return toy.finish(toy.run(algorithm, engine, setting=replace(SETTING, **setting)))


@pytest.mark.equivalence
@ENGINES
def test_at_weight_0_it_is_not_there_and_would_change_no_bit(engine: str) -> None:
    (fedavg,), (row,) = parse_algorithms("fedavg"), parse_algorithms("fedavg+feddecorr(weight=0)")
    assert label(row) == "fedavg"
    mine, plain = ran(Composed(fedavg, (part_of(weight=0.0),)), engine), ran(fedavg, engine)
    assert mine.outcome().digest == plain.outcome().digest
    assert ran("fedavg+feddecorr", engine).outcome().digest != plain.outcome().digest


def test_nothing_more_is_sent_and_no_pass_is_made() -> None:
    assert ran("fedavg+feddecorr").progress.cost["bytes_up"] == ran("fedavg").progress.cost["bytes_up"]
    assert ran("fedavg+feddecorr").progress.cost["train_samples"] == ran("fedavg").progress.cost["train_samples"]


def test_features_are_less_correlated_than_those_of_fedavg() -> None:
    """What the paper is for: more directions in which features differ."""
    found = []
    for row in ("fedavg", "fedavg+feddecorr(weight=1)"):
        run = ran(row, participation=1.0, rounds=4)
        with torch.no_grad():
            z = run.task.model.features(run.progress.server["body"], run.population.images.plain(torch.arange(120)))
        found.append((float(term(z, by_batch=False)), float(torch.linalg.svdvals(z - z.mean(0))[:3].sum() /
                                                            torch.linalg.svdvals(z - z.mean(0)).sum())))  # fmt: skip
    (usual, largest), (less, smaller) = found
    assert less < 0.8 * usual and smaller < largest
    assert tree.is_finite(run.progress.server)
