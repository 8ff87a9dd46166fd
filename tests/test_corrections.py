"""Corrections without training: what they make of a head is computed by hand; of a method they change tests alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Correction, Task, Tree, UsesPrior
from bench.contract import toy
from bench.plugins.registry import PARTS, label
from bench.protocol.composed import Composed
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run

SETTING = replace(toy.SETTING, rounds=2, unseen=1, eval_every=2)
ENGINES = ("serial", "stacked")
LOGITS = (2.0, 1.0, 0.0)
COUNTS = (70.0, 20.0, 10.0)
"""The example of the cards."""


def task_of(num_classes: int, prior: Tensor | None = None) -> Task:
    return replace(toy.run(toy.Host()).task, num_classes=num_classes, prior=prior)


def corrected(
    part: Correction, bias: tuple[float, ...], own: tuple[float, ...] | None, prior: Any = None, estimated: Any = None
) -> Tensor | None:
    """Give the bias that a part makes of one: the logits of an image whose features are zeros."""
    head = {"weight": torch.ones(len(bias), 2), "bias": torch.tensor(bias)}
    task = task_of(len(bias), None if prior is None else torch.tensor(prior))
    counts = part.counts(
        task,
        None if own is None else torch.tensor(own),
        None if estimated is None else torch.tensor(estimated),
    )
    changed = part.correct(task, {"head": head}, counts)
    if changed is None:
        return None
    assert changed.keys() == {"head"} and torch.equal(changed["head"]["weight"], head["weight"])
    assert torch.equal(head["bias"], torch.tensor(bias))
    found: Tensor = changed["head"]["bias"]
    return found


def adjustment(**fields: Any) -> Correction:
    part = PARTS["posthoc_logit_adjustment"](**fields)
    assert isinstance(part, Correction)
    return part


def mask() -> Correction:
    part = PARTS["class_mask"]()
    assert isinstance(part, Correction)
    return part


def ran(text: str, engine: str = "serial", **setting: Any) -> Run:
    (algorithm,) = parse_algorithms(text)
    return toy.finish(toy.run(algorithm, engine, setting=replace(SETTING, **setting)))


def metrics(run: Run) -> dict[str, float | None]:
    return run.outcome().metrics


# Post-hoc logit adjustment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_adjusted_logits_are_those_computed_by_hand(tau: float) -> None:
    found = corrected(adjustment(tau=tau), LOGITS, COUNTS)
    assert found is not None
    wanted = np.array(LOGITS) - tau * np.log(np.array(COUNTS) / sum(COUNTS))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    if tau == 1.0:
        assert found.tolist() == pytest.approx((2.356675, 2.609438, 2.302585), abs=1e-6)
        assert int(found.argmax()) == 1


def test_the_prior_is_whose_it_says_it_is() -> None:
    known: dict[str, Any] = {"prior": (0.25, 0.25, 0.5), "estimated": (10.0, 30.0, 60.0)}
    for prior, wanted in (
        ("local", np.array(COUNTS) / 100),
        ("global", np.array(known["prior"])),
        ("estimated", np.array(known["estimated"]) / 100),
        ("uniform", np.ones(3) / 3),
    ):
        for own in (COUNTS, None):
            found = corrected(adjustment(prior=prior), LOGITS, own, **known)
            if prior == "local" and own is None:
                assert found is None  # the model of all, at a server that knows nobody's counts
            else:
                assert found is not None
                assert found.tolist() == pytest.approx(np.array(LOGITS) - np.log(wanted), abs=1e-5)


def test_adjustment_turns_the_best_rule_under_one_prior_into_the_best_under_equal_classes() -> None:
    """Of classes that are normal around ±1 the two rules are known: z is linear, and only its bias has the prior."""
    means, prior = np.array([-1.0, 1.0]), np.array([0.9, 0.1])
    bias = -(means**2) / 2 + np.log(prior)
    found = corrected(adjustment(), tuple(bias.tolist()), (90.0, 10.0))
    assert found is not None
    x = np.linspace(-2, 2, 41)[:, None]
    balanced = (x * means - means**2 / 2).argmax(1)
    assert ((x * means + found.numpy()).argmax(1) == balanced)[x[:, 0] != 0].all()
    assert ((x * means + bias).argmax(1) != balanced).sum() == 10


def test_an_absent_class_leaves_the_prediction_or_counts_what_it_says() -> None:
    found = corrected(adjustment(), (0.0, 0.0, 500.0), (6.0, 2.0, 0.0))
    assert found is not None and bool(found.isfinite().all())
    assert found[:2].tolist() == pytest.approx(-np.log([0.75, 0.25]), abs=1e-6) and found[2] < -1e8
    found = corrected(adjustment(absent=0.5), (0.0, 0.0, 0.0), (6.0, 2.0, 0.0))
    assert found is not None
    assert found.tolist() == pytest.approx(-np.log(np.array([6, 2, 0.5]) / 8.5), abs=1e-6)


@pytest.mark.parametrize("absent", ["out", 0.5])
def test_without_examples_no_class_is_preferred(absent: Any) -> None:
    found = corrected(adjustment(absent=absent), LOGITS, (0.0, 0.0, 0.0))
    assert found is not None
    assert (found - found[0]).tolist() == pytest.approx((0.0, -1.0, -2.0), abs=1e-6)
    if absent == "out":
        assert found.tolist() == list(LOGITS)


@pytest.mark.equivalence
def test_at_tau_0_it_is_not_there_and_would_change_no_bit() -> None:
    (algorithm,) = parse_algorithms("fedavg+posthoc_logit_adjustment(tau=0)")
    assert label(algorithm) == "fedavg"
    for own in (COUNTS, (6.0, 2.0, 0.0), (0.0, 0.0, 0.0)):
        found = corrected(adjustment(tau=0.0), (0.1, -0.0, 3.3), own)
        assert found is not None and torch.equal(found, torch.tensor((0.1, -0.0, 3.3)))


def test_it_takes_off_what_balanced_softmax_put_on() -> None:
    """Logits shifted in training by log n and corrected by it again are those of the test, up to a constant."""
    shifted = np.array(LOGITS) + np.log(COUNTS)
    found = corrected(adjustment(), tuple(shifted.tolist()), COUNTS)
    assert found is not None
    assert (found - found[0]).tolist() == pytest.approx((0.0, -1.0, -2.0), abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_by_default_only_personal_models_are_corrected_and_with_a_prior_of_all_every_model(engine: str) -> None:
    plain = ran("fedavg", engine)
    for prior, generic in (("local", False), ("global", True), ("estimated", True)):
        run = ran(f"fedavg+posthoc_logit_adjustment(prior='{prior}')", engine)
        found, usual = metrics(run), metrics(plain)
        assert found["personal:uncorrected"] == usual["personal"] != found["personal"]
        assert ("generic:uncorrected" in found) == generic
        assert found.get("generic:uncorrected", found["generic"]) == usual["generic"]
        server = run.progress.server
        assert all(torch.equal(server["head"][k], plain.progress.server["head"][k]) for k in ("weight", "bias"))


def test_a_model_is_corrected_by_the_frequencies_of_all_data() -> None:
    run = ran("fedavg+posthoc_logit_adjustment(prior='global', tau=0.5)")
    task, server = run.task_at(1), run.progress.server
    found = run.algorithm.corrected(task, run.algorithm.broadcast(task, server), {"head": server["head"]}, None)
    assert found is not None and task.prior is not None
    counts = sum(run.population.class_counts(k).double() for k in range(run.population.size))
    assert isinstance(counts, Tensor)
    wanted = server["head"]["bias"].numpy() - 0.5 * np.log((counts / counts.sum()).numpy())
    assert found["head"]["bias"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_what_the_server_learns_is_said_and_paid_for() -> None:
    for prior, tier, needs in (("local", "S", []), ("estimated", "L", []), ("global", "L", ["prior"])):
        (row,) = parse_algorithms(f"fedavg+posthoc_logit_adjustment(prior='{prior}')")
        assert isinstance(row, Composed) and isinstance(row.parts[0], UsesPrior)
        assert (row.tier, sorted(row.needs)) == (tier, needs)
    run, plain = ran("fedavg+posthoc_logit_adjustment(prior='estimated')"), ran("fedavg")
    sent = sum(len(run.population.cohort(r)) for r in range(2))
    for way in ("bytes_up", "bytes_down"):
        assert run.progress.cost[way] - plain.progress.cost[way] == 4 * 6 * sent


def test_after_tau_normalisation_there_is_no_bias_but_the_prior() -> None:
    (row,) = parse_algorithms("fedavg+tau_norm+posthoc_logit_adjustment(prior='uniform')")
    head = {"weight": torch.tensor([[3.0, 4.0], [0.0, 2.0]]), "bias": torch.tensor([5.0, -5.0])}
    found = row.corrected(task_of(2), {}, {"head": head}, None)
    assert found is not None
    assert found["head"]["weight"].tolist() == [pytest.approx([0.6, 0.8]), [0.0, 1.0]]
    assert found["head"]["bias"].tolist() == pytest.approx([np.log(2)] * 2)


# Class mask -------------------------------------------------------------------------------------------------


def test_a_mask_takes_absent_classes_out_and_leaves_the_others_their_bits() -> None:
    found = corrected(mask(), (0.1, 900.0, -0.3, 2e4), (3.0, 0.0, 1.0, 0.0))
    assert found is not None and bool(found.isfinite().all())
    assert torch.equal(found[[0, 2]], torch.tensor((0.1, -0.3)))
    assert float(found[[1, 3]].max()) < -1e8 and int(found.argmax()) == 0


def test_a_mask_leaves_alone_who_has_every_class_or_no_example_and_the_model_of_all() -> None:
    for own in ((1.0, 2.0, 3.0), (0.0, 0.0, 0.0)):
        found = corrected(mask(), LOGITS, own)
        assert found is not None and torch.equal(found, torch.tensor(LOGITS))
    assert corrected(mask(), LOGITS, None, prior=(0.5, 0.5, 0.0), estimated=(1.0, 1.0, 0.0)) is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedavg_ft(finetune_epochs=1)", "fedrep(head_epochs=1)"])
def test_a_masked_method_is_tested_as_the_masked_column_says_and_trained_as_ever(method: str, engine: str) -> None:
    mine, plain = ran(f"{method}+class_mask", engine), ran(method, engine)
    assert mine.outcome().digest == plain.outcome().digest
    found, usual = metrics(mine), metrics(plain)
    assert found["generic"] == usual["generic"] and "generic:uncorrected" not in found
    for kind in ("personal", "unseen"):
        assert found[f"{kind}:uncorrected"] == usual[kind]
        assert found[kind] == usual[f"{kind}.masked"] == found[f"{kind}.masked"]
    assert found["personal"] != usual["personal"]


def test_a_held_out_client_whose_labels_nobody_knows_is_not_masked() -> None:
    found, usual = (metrics(ran(each, unseen_labels=False)) for each in ("fedavg+class_mask", "fedavg"))
    assert found["unseen"] == usual["unseen"]
    assert found["personal"] == usual["personal.masked"] != usual["personal"]


def test_masking_and_adjusting_do_not_get_in_each_others_way() -> None:
    tree: Tree = {"head": {"weight": torch.ones(3, 2), "bias": torch.tensor(LOGITS)}}
    found = []
    for text in ("class_mask+posthoc_logit_adjustment", "posthoc_logit_adjustment+class_mask"):
        (row,) = parse_algorithms(f"fedavg+{text}")
        assert isinstance(row, Composed)
        model = dict(tree)
        for part in row.parts:
            assert isinstance(part, Correction)
            model |= part.correct(task_of(3), model, torch.tensor((6.0, 2.0, 0.0))) or {}
        found.append(model["head"]["bias"])
    for bias in found:
        assert bias[:2].tolist() == pytest.approx(np.array(LOGITS[:2]) - np.log([0.75, 0.25]), abs=1e-6)
        assert bool(bias.isfinite().all()) and float(bias[2]) < -1e8
